"""Axis algebra: shared dimensions of tensors, as trees of sums and products.

An axis is a leaf, a *product* (row-major factors: heads x head_dim), or a *sum* (consecutive segments: q | k | v). `cut`,
`split`, and `unify` refine leaves in place, so that every holder of a leaf sees its new parts. An axis gives each position an
index along its leaves (`layout`). `unify` makes two axes agree, with the fewest refinements.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Literal

import numpy as np

from billhook.linalg import Indices

Op = Literal["leaf", "product", "sum"]

_numbers = itertools.count()


class Irregular(Exception):
    """Two axes cannot be cut into common regular pieces."""


class Axis:
    """A dimension: its size, factors (outermost first) or segments, and flags with reasons."""

    __slots__ = ("_same", "notes", "number", "op", "parts", "size")

    def __init__(self, size: int, op: Op = "leaf", parts: Sequence["Axis"] = (), notes: dict[str, str] | None = None) -> None:
        self.size = int(size)
        self.op = op
        self.parts = list(parts)
        self.notes = dict(notes or {})
        self.number = next(_numbers)
        self._same: Axis | None = None

    def __repr__(self) -> str:
        axis = find(self)
        if axis.op == "leaf":
            return f"a{axis.number}:{axis.size}"
        return "(" + {"product": " * ", "sum": " + "}[axis.op].join(map(repr, _parts(axis))) + ")"


def find(axis: Axis) -> Axis:
    """Returns the axis that this axis has been unified with, or itself."""
    while (same := axis._same) is not None:
        if same._same is not None:
            axis._same = same = same._same
        axis = same
    return axis


def factors(axis: Axis) -> list[Axis]:
    """Returns the flat factors of a product without size 1; any other axis is its only factor."""
    axis = find(axis)
    if axis.op == "product":
        return [factor for part in axis.parts for factor in factors(part)]
    return [axis] if axis.size != 1 else []


def segments(axis: Axis) -> list[Axis]:
    """Returns the flat segments of a sum; any other axis is its only segment."""
    axis = find(axis)
    if axis.op != "sum":
        return [axis]
    flat_segments = []
    stack = [axis]
    while stack:  # no recursion: an axis unified with itself, shifted, nests thousands deep
        part = find(stack.pop())
        if part.op == "sum":
            stack += reversed(part.parts)
        else:
            flat_segments.append(part)
    axis.parts = flat_segments
    return list(flat_segments)


def product(parts: Iterable[Axis]) -> Axis:
    """Returns the axis with these factors, outermost first."""
    flat_factors = [factor for part in parts for factor in factors(part)]
    if len(flat_factors) == 1:
        return flat_factors[0]
    return Axis(math.prod(f.size for f in flat_factors), "product", flat_factors) if flat_factors else Axis(1)


def concat(parts: Iterable[Axis]) -> Axis:
    """Returns the axis with these consecutive segments."""
    flat_segments = [segment for part in parts for segment in segments(part) if segment.size]
    if len(flat_segments) == 1:
        return flat_segments[0]
    return Axis(sum(s.size for s in flat_segments), "sum", flat_segments) if flat_segments else Axis(0)


def leaves(axis: Axis) -> list[Axis]:
    """Returns the leaves of an axis from left to right, repeated leaves several times."""
    axis = find(axis)
    return [axis] if axis.op == "leaf" else [leaf for part in _parts(axis) for leaf in leaves(part)]


def mark(axis: Axis, flag: str, reason: str = "") -> None:
    """Sets a flag on every leaf of an axis; the first reason is kept."""
    for leaf in leaves(axis):
        leaf.notes.setdefault(flag, reason)


def notes_of(axis: Axis) -> dict[str, str]:
    """Returns the flags of all leaves of an axis, with their reasons."""
    return {flag: reason for leaf in leaves(axis) for flag, reason in leaf.notes.items()}


def cut(axis: Axis, at: int) -> tuple[list[Axis], list[Axis]]:
    """Cuts an axis at a position and returns the segments before and after it.

    A product can only be cut between two indices of its first factor.
    """
    before = []
    after = segments(axis)
    while after and at >= after[0].size:
        at -= after[0].size
        before.append(after.pop(0))
    if at == 0:
        return before, after
    middle = after.pop(0)
    if middle.op == "leaf":
        low = Axis(at)
        high = Axis(middle.size - at)
        _refine(middle, "sum", [low, high])
    else:
        outer, *inner = factors(middle)
        width = middle.size // outer.size
        if at % width:
            raise Irregular(f"{axis} cannot be cut inside {middle}, at {at}")
        lows, highs = cut(outer, at // width)
        low = product([concat(lows), *inner])
        high = product([concat(highs), *inner])
    return [*before, low], [high, *after]


def split(axis: Axis, outer: int) -> tuple[list[Axis], list[Axis]]:
    """Splits an axis, and returns the factors of its outer part, of this size, and inner part."""
    if not 0 < outer <= axis.size or axis.size % outer:
        raise Irregular(f"{axis} has no outer part of size {outer}")
    inner = factors(axis)
    outer_factors = []
    while outer > 1:
        factor = inner.pop(0)
        if outer % factor.size == 0:
            outer_factors.append(factor)
            outer //= factor.size
            continue
        if factor.size % outer:
            raise Irregular(f"{axis} cannot be split at {outer}")
        width = factor.size // outer
        if factor.op == "leaf":
            head = Axis(outer)
            tail = Axis(width)
        elif all(segment.size % width == 0 for segment in segments(factor)):
            outers, inners = zip(*[split(segment, segment.size // width) for segment in segments(factor)], strict=True)
            tail = reduce(unify, map(product, inners))
            head = concat(map(product, outers))
        else:  # the segments repeat with period `width`
            head = concat(map(Axis, [1] * outer))  # size 1: no units, because other axes share the segments
            stretch, remaining = cut(factor, width)
            tail = concat(stretch)
            while remaining:
                stretch, remaining = cut(concat(remaining), width)
                tail = unify(tail, concat(stretch))
        _refine(factor, "product", [head, tail])
        return [*outer_factors, head], factors(tail) + inner
    return outer_factors, inner


def unify(a: Axis, b: Axis) -> Axis:
    """Makes two axes of equal size the same axis and returns it.

    Axes of size 1 have no identity and are left unchanged.

    Raises:
        Irregular: If their sizes differ, or they are cut so differently that no regular pieces are common to both.
    """
    a = find(a)
    b = find(b)
    if a is b:
        return b
    if a.size != b.size:
        raise Irregular(f"{a} and {b} have different sizes")
    if a.size <= 1:
        return b
    if b.op == "leaf":
        a, b = b, a
    if a.op == "leaf":
        if a in leaves(b):
            raise Irregular(f"{b} is made of {a} itself")
    elif a.op == b.op == "sum":
        _unify_sums(segments(a), segments(b))
    elif a.op == b.op:
        _unify_at(a, b, min(factors(a)[0].size, factors(b)[0].size))
    else:
        a, b = (a, b) if a.op == "sum" else (b, a)
        try:
            _unify_at(a, b, factors(b)[0].size)
        except Irregular:
            remaining = b
            *firsts, last = segments(a)
            for segment in firsts:  # cut the product where the sum is cut
                lows, highs = cut(remaining, segment.size)
                unify(segment, concat(lows))
                remaining = concat(highs)
            unify(last, remaining)
    a = find(a)
    b = find(b)
    if a is not b:
        for leaf in leaves(b):
            if not ("copied" in leaf.notes and "copied" in a.notes):  # entries that differ in one tensor are no copies
                leaf.notes.pop("copied", None)
        for flag, reason in a.notes.items():
            if flag != "copied":
                mark(b, flag, reason)
        a._same = b
    return b


def layout(axis: Axis, leaf: Axis) -> Indices:
    """Returns an axis position's index along a leaf, -1 for none: int64, `[size]`."""
    axis = find(axis)
    if axis is leaf:
        return np.arange(axis.size)
    if axis.op == "sum":
        return np.concatenate([layout(part, leaf) for part in segments(axis)])
    out = np.full(axis.size, -1)
    inner = axis.size
    for part in axis.parts if axis.size else ():
        inner //= find(part).size
        if leaf in leaves(part):
            along = layout(part, leaf)
            out = np.maximum(out, np.tile(np.repeat(along, inner), axis.size // inner // len(along)))
    return out


def crossed(axis: Axis, leaf: Axis) -> bool:
    """Returns whether a leaf is multiplied with itself in an axis."""
    axis = find(axis)
    holding = [part for part in _parts(axis) if leaf in leaves(part)]
    return (axis.op == "product" and len(holding) > 1) or any(crossed(part, leaf) for part in holding)


def multiplied_with(axis: Axis, leaf: Axis) -> set[Axis]:
    """Returns the leaves that are multiplied with a leaf in every part of an axis."""
    axis = find(axis)
    holding = [part for part in _parts(axis) if leaf in leaves(part)]
    if axis.op == "sum":
        return set.intersection(*[multiplied_with(part, leaf) for part in holding]) if holding else set()
    multiplied = set[Axis]()
    for part in axis.parts if holding else ():
        multiplied.update(multiplied_with(part, leaf) if part in holding else leaves(part))
    return multiplied


def _parts(axis: Axis) -> list[Axis]:
    """Returns the segments of a sum, or the factors of a product."""
    return segments(axis) if axis.op == "sum" else axis.parts


def _refine(leaf: Axis, op: Op, parts: list[Axis]) -> None:
    for part in parts:
        for flag, reason in leaf.notes.items():
            mark(part, flag, reason)
    leaf.op = op
    leaf.parts = parts


def _unify_sums(left: list[Axis], right: list[Axis]) -> None:
    while left and right:
        left[:1], right[:1] = segments(left[0]), segments(right[0])  # earlier unifications may have cut them
        a = left.pop(0)
        b = right.pop(0)
        if a.size > b.size:
            lows, highs = cut(a, b.size)
            a = concat(lows)
            left = highs + left
        elif b.size > a.size:
            lows, highs = cut(b, a.size)
            b = concat(lows)
            right = highs + right
        unify(a, b)


def _unify_at(a: Axis, b: Axis, outer: int) -> None:
    a_outer, a_inner = split(a, outer)
    b_outer, b_inner = split(b, outer)
    unify(product(a_outer), product(b_outer))
    unify(product(a_inner), product(b_inner))
