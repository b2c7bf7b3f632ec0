"""The methods by their short names."""

from collections.abc import Mapping
from typing import Any, Literal

from billhook.arguments import one_of
from billhook.kv_heads.methods.aligned import Aligned
from billhook.kv_heads.methods.auto import Auto
from billhook.kv_heads.methods.base import KVMethod
from billhook.kv_heads.methods.baselines import First, RandomHeads
from billhook.kv_heads.methods.mean import Mean
from billhook.kv_heads.methods.svd import SVD
from billhook.model.plan import subclasses

Name = Literal["mean", "first", "random", "aligned", "svd", "auto"]
METHODS: dict[Name, type[KVMethod]] = {
    "mean": Mean,
    "first": First,
    "random": RandomHeads,
    "aligned": Aligned,
    "svd": SVD,
    "auto": Auto,
}


def method_of(method: KVMethod | Name) -> KVMethod:
    """Returns the method, made with its defaults if only its short name is given."""
    if isinstance(method, KVMethod):
        return method
    one_of("method", method, Name)
    return METHODS[method]()


def read_method(plain: Any) -> KVMethod:  # noqa: ANN401
    """Makes a method of its class's name and its arguments, as a plan's JSON has them; the class must have been imported."""
    known: dict[str, type[KVMethod]] = {kind.__name__: kind for kind in subclasses(KVMethod)[1:]}
    if not isinstance(plain, Mapping) or len(plain) != 1 or not isinstance(arguments := next(iter(plain.values())), Mapping):
        raise ValueError(f"plan: method is {plain!r}, and must be a class's name with its arguments, as to_json makes it")
    (name,) = plain
    if name not in known:
        raise ValueError(f"plan: there is no method {name!r} among {', '.join(sorted(known))}: import what defines it first")
    return known[name](**arguments)
