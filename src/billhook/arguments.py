"""Argument checks, with errors of the form `argument=value must be ...`."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

CONTAINERS = (Iterable, Collection, Sequence, Mapping, list, tuple, dict)


def check_int(name: str, value: object, least: int = 1) -> None:
    """Raises an error unless a value is an integer of at least `least`.

    >>> check_int("examples", 0)
    Traceback (most recent call last):
    ValueError: examples=0 must be a whole number of at least 1
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def check_number(name: str, value: object, least: float | None = None, above: float | None = None) -> None:
    """Raises an error unless a value is a finite number within the bounds.

    >>> check_number("damping", 0, above=0)
    Traceback (most recent call last):
    ValueError: damping=0 must be a number above 0
    """
    if not _is_finite(value) or (least is not None and value < least) or (above is not None and value <= above):
        at_least = "" if least is None else f" of at least {least:g}"
        greater = "" if above is None else f" above {above:g}"
        raise ValueError(f"{name}={value!r} must be a number{at_least}{greater}")


def check_fraction(name: str, value: object, legal: str = "[0, 1)", of: str = "") -> None:
    """Raises an error unless a value is in an interval, with a hint for percentages.

    Args:
        name: Argument name.
        value: Argument value.
        legal: The interval; a round bracket excludes the bound.
        of: Name of the total for the message, such as "the heads".

    >>> check_fraction("ratio", 1.0, of="the heads")
    Traceback (most recent call last):
    ValueError: ratio=1.0 must be a fraction of the heads in [0, 1)
    >>> check_fraction("sparsity", 50)
    Traceback (most recent call last):
    ValueError: sparsity=50 must be in [0, 1); did you mean 0.5?
    """
    low, high = map(float, legal[1:-1].split(","))
    excluded = [bound for bound, bracket in ((low, legal[0]), (high, legal[-1])) if bracket in "()"]

    def is_inside(value: float) -> bool:
        return low <= value <= high and value not in excluded

    if not _is_finite(value) or not is_inside(value):
        hint = percentage_hint(value) if _is_finite(value) and is_inside(value / 100) else ""
        raise ValueError(f"{name}={value!r} must be {f'a fraction of {of} ' if of else ''}in {legal}{hint}")


def percentage_hint(value: float) -> str:
    """Returns the hint of a message for a number in (1, 100], which may be a percentage.

    >>> percentage_hint(30), percentage_hint(0.3), percentage_hint(4096)
    ('; did you mean 0.3?', '', '')
    """
    return f"; did you mean {value / 100:g}?" if 1 < value <= 100 else ""


def check_one_of(name: str, value: object, legal: Any) -> None:  # noqa: ANN401 - a Literal has no type
    """Raises an error unless a value is among the legal words.

    Args:
        name: Argument name.
        value: Argument value.
        legal: The words, or a `Literal`.

    >>> check_one_of("per", "layer", ("head", "kv_head"))
    Traceback (most recent call last):
    ValueError: per='layer' must be one of head, kv_head
    """
    words: Iterable[object] = get_args(legal) or legal
    if not any(type(value) is type(word) and value == word for word in words):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, words))}")


def check_path(name: str, value: object, endings: Iterable[str] = ()) -> None:
    """Raises an error unless a value is a path, with a legal ending.

    >>> check_path("plot_file", "report.foo", [".png", ".pdf"])
    Traceback (most recent call last):
    ValueError: plot_file='report.foo' must be a path that ends in .png, .pdf
    """
    legal = list(endings)
    is_path = isinstance(value, str | Path) and str(value).strip() != ""
    if not is_path or (legal and Path(str(value)).suffix.lower() not in legal):
        raise ValueError(f"{name}={value!r} must be a path{' that ends in ' if legal else ''}{', '.join(legal)}")


def parse_memory(name: str, value: str) -> int:
    """Parses an amount of memory and returns it in bytes.

    >>> parse_memory("memory", "8GiB"), parse_memory("memory", "1.5 GB")
    (8589934592, 1500000000)
    >>> parse_memory("memory", "8")
    Traceback (most recent call last):
    ValueError: memory='8' must be a number with a unit, such as 8GiB or 900MB
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", value)
    if match is None or not float(match[1]):
        raise ValueError(f"{name}={value!r} must be a number with a unit, such as 8GiB or 900MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2]) + 1))


def check_types(function: Callable[..., Any], arguments: Mapping[str, object]) -> None:
    """Raises an error for arguments that do not match the annotations of a function or class.

    Args:
        function: The function, or a class whose `__init__` is annotated.
        arguments: Arguments by name, from `locals()` at the start of a function or from `vars(self)`.

    >>> def scale(model: str, by: float = 1.0) -> None:
    ...     check_types(scale, locals())
    >>> scale("tiny", "double")
    Traceback (most recent call last):
    ValueError: by='double' must be a number
    """
    for name, kind in _annotations(function).items():
        if name in arguments and not _fits(arguments[name], kind):
            hint, text = getattr(arguments[name], "no_model", ""), repr(arguments[name])  # a report instead of its model
            if len(text) >= 80 or "\n" in text:
                text = f"a {type(arguments[name]).__name__}"
            raise ValueError(f"{name}={text} must be {_legal(kind)}{f': {hint}' if hint else ''}")


@cache
def _annotations(function: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]
    return {name: kind for name, kind in hints.items() if name != "return"}


def _fits(value: object, kind: Any, within: bool = False) -> bool:  # noqa: ANN401 - annotations have no type
    """Returns True if a value matches an annotation; items within containers match by type."""
    kind = getattr(get_origin(kind) or kind, "__value__", kind)  # of a `type` alias, such as `NDArray` of numpy 2.5
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, TypeVar):
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, member, within) for member in inside)
    if origin is Literal:
        return any(type(value) is type(word) and (within or value == word) for word in inside)
    if kind in (int, float):
        return isinstance(value, int | float | str | None) if within else _is_finite(value) and isinstance(value, int | kind)
    if origin is type:
        return isinstance(value, type) and issubclass(value, getattr(inside[0], "__bound__", None) or inside[0])
    if not isinstance(value, Sequence if origin is list else origin or kind):
        return False
    if isinstance(value, str | bytes) or origin not in CONTAINERS:
        return not isinstance(value, str | bytes) or str in (kind, *inside)
    if isinstance(value, Mapping) and issubclass(origin, Mapping):
        items = value.values() if isinstance(value, dict) else ()  # other mappings may have to load each value
        return _all_fit(value, inside[0]) and _all_fit(items, inside[1])
    return not isinstance(value, Collection) or _all_fit(value, inside[0])


def _all_fit(items: Iterable[object], kind: Any) -> bool:  # noqa: ANN401
    return all(_fits(item, kind, within=True) for item in items)


def _legal(kind: Any) -> str:  # noqa: ANN401
    origin, inside = get_origin(kind), get_args(kind)
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", NoneType: "None"}
    if origin in (Union, UnionType):
        literals_first = sorted(inside, key=lambda kind: "Literal" not in str(kind))
        return " or ".join(dict.fromkeys(_legal(kind) for kind in literals_first if kind is not int or float not in inside))
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}"
    if origin is Callable:
        return "a function"
    name = kind.__name__ if isinstance(kind, type) and not inside else re.sub(r"\b(\w+\.)+", "", str(kind))
    return names.get(kind) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
