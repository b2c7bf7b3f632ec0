"""Refuses arguments in one voice: the name, what came, what is legal."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard, get_args


def whole(name: str, value: object, least: int = 1) -> None:
    """Refuses what is not a whole number, or too small.

    >>> whole("examples", 0)
    Traceback (most recent call last):
    ValueError: examples=0 must be a whole number of at least 1
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def number(name: str, value: object, least: float | None = None, above: float | None = None) -> None:
    """Refuses what is not a finite number, or too small.

    >>> number("damping", 0, above=0)
    Traceback (most recent call last):
    ValueError: damping=0 must be a number above 0
    """
    if not _is_finite(value) or (least is not None and value < least) or (above is not None and value <= above):
        legal = "".join(f" {word} {bound:g}" for word, bound in (("of at least", least), ("above", above)) if bound is not None)
        raise ValueError(f"{name}={value!r} must be a number{legal}")


def fraction(name: str, value: object, legal: str = "[0, 1)", of: str = "") -> None:
    """Refuses a number outside of an interval.

    Args:
        name: The argument.
        value: What came.
        legal: The interval; a round bracket leaves out the end.
        of: What it is a fraction of, for the message.

    >>> fraction("ratio", 1.0, of="the heads")
    Traceback (most recent call last):
    ValueError: ratio=1.0 must be a fraction of the heads in [0, 1)
    """
    low, high = map(float, legal[1:-1].split(","))
    ends = [end for end, bracket in ((low, legal[0]), (high, legal[-1])) if bracket in "()"]
    if not _is_finite(value) or not low <= value <= high or value in ends:
        raise ValueError(f"{name}={value!r} must be {f'a fraction of {of} ' if of else ''}in {legal}")


def one_of(name: str, value: object, legal: Any) -> None:  # noqa: ANN401 - a Literal is of no class
    """Refuses what is none of several words.

    Args:
        name: The argument.
        value: What came.
        legal: The words, or the `Literal` of them.

    >>> one_of("per", "layer", ("head", "kv_head"))
    Traceback (most recent call last):
    ValueError: per='layer' must be one of head, kv_head
    """
    words: Iterable[object] = get_args(legal) or legal
    if not any(type(value) is type(word) and value == word for word in words):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, words))}")


def a_path(name: str, value: object, endings: Iterable[str] = ()) -> None:
    """Refuses what is no path of a file or folder, or ends in none of some endings.

    >>> a_path("plot_file", "report.foo", [".png", ".pdf"])
    Traceback (most recent call last):
    ValueError: plot_file='report.foo' must be a path that ends in .png, .pdf
    """
    legal = list(endings)
    named = isinstance(value, str | Path) and str(value).strip() != ""
    if not named or (legal and Path(str(value)).suffix.lower() not in legal):
        raise ValueError(f"{name}={value!r} must be a path{' that ends in ' if legal else ''}{', '.join(legal)}")


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
