"""Remembers what has been found of a model, for every model that is alike in all that decides it."""

import io
import pickle
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from hashlib import blake2b
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig

from billhook.model.hooks import is_part

Found = TypeVar("Found")
Results = dict[object, tuple[torch.Size, tuple[int, ...], torch.dtype]]

MOST, MOST_BYTES, MOST_RESULTS = 1024, 2**25, 8192
"""How much is remembered of models, and of what classes build: of each shape, the search for its config builds dozens."""

# The only state of the process that billhook keeps: without it half of a short fit is spent on finding the same again.
# Findings are bytes, so that whatever a caller does to one does not reach the next, and no model is held.
_findings: OrderedDict[Hashable, bytes] = OrderedDict()
_built: OrderedDict[Hashable, bytes] = OrderedDict()
_results: dict[torch.dtype, Results] = {}
_lock = threading.Lock()


def remembered(find: Callable[[], Found], model: nn.Module, *given: Hashable) -> Found:
    """Returns what `find` finds of a model; calls it only if it is not known of any model that is alike.

    It can be pickled, and follows from the model's `sight` and from what is `given`: a name for it, and what else decides it.
    """
    seen = sight(model)
    return find() if seen is None else _looked_up(_findings, (seen, given, torch.get_default_dtype()), find)


def remembered_built(find: Callable[[], Found], kind: type[nn.Module], config: PretrainedConfig, *given: Hashable) -> Found:
    """Returns what `find` finds of what a class builds from a config; calls it only if it is not known of an equal config."""
    written = io.BytesIO()
    writer = _Writer(written, set())
    try:
        writer.dump(config)
    except Exception:  # whatever a config of somebody's own holds
        return find()
    key = (ref(kind), blake2b(written.getbuffer()).digest(), tuple(writer.code), given, torch.get_default_dtype())
    return _looked_up(_built, key, find)


def _looked_up(findings: OrderedDict[Hashable, bytes], key: Hashable, find: Callable[[], Found]) -> Found:
    with _lock:
        known = findings.get(key)
        if known is not None:
            findings.move_to_end(key)
    if known is not None:
        again: Found = pickle.loads(known)
        return again
    found = find()
    try:
        written = pickle.dumps(found)
    except RecursionError:  # some axes are made of thousands of others
        return found
    with _lock:
        findings[key] = written
        while len(findings) > MOST or (len(findings) > 1 and sum(map(len, findings.values())) > MOST_BYTES):
            findings.popitem(last=False)
    return found


def results_of_ops() -> Results:
    """Returns the sizes, strides and dtypes that ops gave on meta tensors, by op and arguments; whoever finds more adds them."""
    with _lock:
        known = _results.setdefault(torch.get_default_dtype(), {})
        if len(known) > MOST_RESULTS:
            known.clear()
    return known


class Repeated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Does ops on meta tensors once for all that are alike, as layers repeat: torch finds many of their shapes in Python."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.repeats: dict[OpOverload, bool] = {}
        self.results = results_of_ops()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Spares torch the question at every op whether it should be compiled: nothing is on meta."""
        return False

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Does an op, or gives a tensor like the one that it gave before."""
        return self.once(func, args, kwargs or {})

    def once(self, func: OpOverload, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        """Does an op, unless its result is known."""
        if (repeats := self.repeats.get(func)) is None:
            repeats = self.repeats[func] = _repeats(func)
        key = _key(func, args, kwargs) if repeats else None
        if key is not None and (known := self.results.get(key)) is not None:
            shape, stride, dtype = known
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        out = func(*args, **kwargs)
        if key is not None and out.is_meta:
            self.results[key] = (out.shape, out.stride(), out.dtype)
        return out


def _repeats(func: OpOverload) -> bool:
    """Tells whether the result of an op is new memory whose shape, strides and dtype follow from those of its arguments."""
    schema = func._schema
    plain = not any(a.alias_info for a in (*schema.arguments, *schema.returns))
    one = len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
    random = torch.Tag.nondeterministic_seeded in func.tags
    return plain and one and not random and schema.name not in ("aten::_to_copy", "aten::empty")


def _key(func: OpOverload, args: Any, kwargs: Any) -> object:  # noqa: ANN401
    """Returns all that decides the shape of an op's result; None if that is not known."""
    parts: list[object] = [func]
    for x in (*args, *kwargs.items()):
        if isinstance(x, Tensor):
            if not x.is_meta:
                return None
            parts.append((x.shape, x.stride(), x.dtype))
        elif isinstance(x, list | tuple):
            inner = _key(func, x, {})
            if inner is None:
                return None
            parts.append(inner)
        else:
            parts.append((type(x), x))
    return tuple(parts)


def forget() -> None:
    """Forgets all findings: needed only after replacing code of models other than their classes' `forward`."""
    with _lock:
        _findings.clear()
        _built.clear()
        _results.clear()


def sight(model: nn.Module) -> Hashable | None:
    """Returns all of a model that decides how it runs on meta tensors; models of equal sight are alike.

    It tells the class of each module and that class's `forward`, every attribute to any depth, configs too, and of each tensor
    the size, strides, dtype, whether it is trained, and which other names hold it. Values, devices and modes do not count.

    It is None if something may decide it that cannot be seen: hooks of others (except such as keep shapes), a module's own
    `forward`, tensors that are quantised, sharded or neither parameters nor buffers (except such as have no values, as those
    of blocks that were removed), or an attribute that is not pickled.
    """
    for module in model.modules():
        own = vars(module).get("forward")
        if not (own is None or _keeps_shapes(own)) or not all(map(is_part, _counting_hooks(module))):
            return None
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return None
    written = io.BytesIO()
    writer = _Writer(written, {id(tensor) for tensor in (*model.parameters(), *model.buffers())})
    try:
        writer.dump(model)
    except Exception:  # whatever a class of somebody's own raises
        return None
    return blake2b(written.getbuffer()).digest(), tuple(writer.code)


class _Writer(pickle.Pickler):
    """Writes a model without the values of its tensors, to be compared and never to be read."""

    UNSEEN = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
    PLAIN = frozenset({str, int, float, bool, type(None), tuple, list, dict, set, OrderedDict})  # most of what there is

    def __init__(self, file: io.BytesIO, own: set[int]) -> None:
        super().__init__(file, protocol=5)
        self.own = own
        self.code: dict[ReferenceType[Any], int] = {}  # classes and functions, and the numbers that stand for them
        self.tensors: dict[int, int] = {}

    def persistent_id(self, one: object) -> Hashable | None:
        """Returns what stands for a tensor, a class or a function; None for what is written as it is."""
        if type(one) in self.PLAIN:
            return None
        if isinstance(one, Tensor):
            if not (id(one) in self.own or one.is_meta) or type(one) not in (Tensor, nn.Parameter):
                raise TypeError("values of this tensor may decide how the model runs")
            number = self.tensors.setdefault(id(one), len(self.tensors))
            return number, tuple(one.shape), one.stride(), str(one.dtype), one.requires_grad
        if isinstance(one, type):
            runs = [one.forward] if issubclass(one, nn.Module) else []
            return tuple(self.code.setdefault(ref(code), len(self.code)) for code in (one, *runs))
        if isinstance(one, BuiltinFunctionType | CodeType) or (isinstance(one, FunctionType) and _is_plain(one)):
            return self.code.setdefault(ref(one), len(self.code))
        return None

    def reducer_override(self, one: object) -> Any:  # noqa: ANN401 - as pickle has it
        """Writes the attributes that a copy of a module has, the function behind a method, and what one of transformers holds."""
        if isinstance(one, nn.Module):
            if hasattr(one, "__deepcopy__"):
                raise TypeError("a copy of this module may have other attributes")
            state: dict[str, Any] = one.__getstate__()  # type: ignore[no-untyped-call]
            seen = {name: value for name, value in state.items() if name not in self.UNSEEN and not _keeps_shapes(value)}
            return object.__new__, (type(one),), seen | {"hooks": _counting_hooks(one)}
        if isinstance(one, MethodType):
            return MethodType, (one.__func__, one.__self__)
        if isinstance(one, FunctionType) and _is_made(one):
            return tuple, ((one.__code__, [cell.cell_contents for cell in one.__closure__ or ()], one.__defaults__),)
        if isinstance(one, FunctionType):
            raise TypeError("what this function holds may decide how the model runs")
        return NotImplemented


def _counting_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if not _keeps_shapes(hook)]


def _keeps_shapes(one: object) -> bool:
    """Finds whether an attribute says that it decides nothing of how a model runs on meta tensors."""
    return getattr(type(one), "keeps_shapes", False) is True


def _is_plain(function: FunctionType) -> bool:
    """Finds whether a function holds nothing of its own, or is what its module has by its name."""
    if _is_made(function):
        return False
    return function.__closure__ is None or getattr(sys.modules.get(function.__module__), function.__name__, None) is function


def _is_made(function: FunctionType) -> bool:
    """Finds whether transformers has made a function within another, as the hooks by which it collects hidden states."""
    return (function.__module__ or "").startswith("transformers.") and "<locals>" in function.__qualname__
