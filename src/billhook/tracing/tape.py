"""The record of a run on meta tensors: a note on every tensor, and facts between tensors."""

import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from billhook.engine import tree_leaves
from billhook.tracing.axes import Axis, Irregular, find, leaves, mark, unify

MANY = 8  # most sources to track; a residual stream has more, and needs none
SMALL = 4096  # most entries of a constant to compute


@dataclass(frozen=True)
class Rows:
    """Positions along a parameter dimension that an activation comes from.

    Attributes:
        positions: Integers, -1 for entries from elsewhere. None means all.
        exact: True if `positions` has the activation's shape, entry by entry, instead of being a set.
        more: Further positions of a set.
    """

    positions: Tensor | None
    exact: bool = False
    more: tuple[Tensor, ...] = ()

    def union(self, other: "Rows") -> "Rows":
        """Returns the union of both rows."""
        if self.positions is None or other.positions is None:
            return Rows(None)
        both = {id(rows): rows for rows in (self.positions, *self.more, other.positions, *other.more)}
        return self if len(both) == 1 + len(self.more) else Rows(self.positions, more=tuple(both.values())[1:])


Sources = dict[tuple[str, int], Rows]
"""What an activation was last multiplied with: (parameter, dimension) -> rows."""


@dataclass(eq=False, slots=True)
class Note:
    """Facts about a tensor.

    Attributes:
        axes: One axis per dimension.
        active: True if it depends on the inputs and not only on parameters.
        pending: Flags for axes, applied once the tensor's values (not only its shape) are used.
        written_sources: Sources of everything written into this memory, shared by its views.
        points: Axis that its integer values index, if any.
        columns: Such an axis for each index of the last dimension, if they differ.
        used: True once an operation has used it.
        value: Its values, if they are small and do not depend on weights or inputs.
        sources: Rows of parameters that an activation was last multiplied with.
        bent: True if a nonlinearity followed them.
        squared: True for a power, whose sum is that of a norm.
    """

    axes: list[Axis]
    active: bool = False
    points: Axis | None = None
    pending: tuple[tuple[Axis, str, str], ...] = ()
    written_sources: Sources | None = None
    columns: tuple[Axis, ...] = ()
    used: bool = False
    value: Tensor | None = None
    sources: Sources = field(default_factory=dict)
    bent: bool = False
    squared: bool = False


@dataclass(frozen=True)
class ActivationProduct:
    """A product of two activations: contracted over an axis, or elementwise.

    Attributes:
        left: Sources of the first factor.
        right: Sources of the second factor.
        left_axes: Axes of the first factor.
        right_axes: Axes of the second factor.
        over: Contracted axis; None for an elementwise product.
        bent: Whether the first and the second factor passed a nonlinearity.
    """

    left: Sources
    right: Sources
    left_axes: list[Axis]
    right_axes: list[Axis]
    over: Axis | None
    bent: tuple[bool, bool]


@dataclass
class Tape:
    """Facts about a run.

    Attributes:
        op: Current operation.
        parameters: Parameters and buffers by name.
        storages: Their names by storage.
        products: Products of two activations, in order.
        reads: Order in which parameter dimensions were first contracted with an activation.
        writes: Order in which parameter dimensions first became an activation's dimension.
        misses: Reasons for untraceable operations, with counts.
        assumed: Values assumed for code that read unknown ones, with counts.
        overwritten: Values that unknown values were written over, by storage.
    """

    op: str = ""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    storages: dict[int, str] = field(default_factory=dict)
    products: list[ActivationProduct] = field(default_factory=list)
    reads: dict[tuple[str, int], int] = field(default_factory=dict)
    writes: dict[tuple[str, int], int] = field(default_factory=dict)
    misses: Counter[str] = field(default_factory=Counter)
    assumed: Counter[str] = field(default_factory=Counter)
    overwritten: dict[int, Tensor] = field(default_factory=dict)

    def value(self, x: Tensor) -> Tensor | None:
        """Returns the values of a tensor if they are known."""
        value = note(x).value if x.is_meta else x
        return None if value is None or memory_of(value) in self.overwritten else value

    def read(self, name: str, dim: int) -> None:
        """Records the contraction of a parameter dimension with an activation."""
        self.reads.setdefault((name, dim), len(self.reads) + len(self.writes))

    def write(self, name: str, dim: int) -> None:
        """Records that a parameter dimension became an activation's dimension."""
        self.writes.setdefault((name, dim), len(self.reads) + len(self.writes))


def memory_of(tensor: Tensor) -> int:
    """Returns an identifier of a tensor's memory."""
    address: int = tensor.untyped_storage()._cdata
    return address


def note(tensor: Tensor, touch: bool = True) -> Note:
    """Returns the note on a tensor, with fresh axes if it has none."""
    known: Note | None = getattr(tensor, "_billhook", None)
    if known is None or len(known.axes) != tensor.dim():
        known = Note([Axis(n) for n in tensor.shape])
        tensor._billhook = known  # type: ignore[attr-defined]
    known.used = known.used or touch
    return known


def axes_of(tensor: Tensor) -> list[Axis]:
    """Returns the axes of a tensor, by dimension."""
    return note(tensor).axes


def apply_pending(used: Note, points: Axis | None = None) -> None:
    """Applies the pending flags of a tensor whose values are used.

    If the result does not index the same axis (`points`), that axis becomes constant.
    """
    for axis, flag, reason in used.pending:
        mark(axis, flag, reason)
    used.pending = ()
    if used.points is not None and (points is None or find(points) is not find(used.points)):
        mark(used.points, "const", "its numbers are used as values")


def record(
    out: Tensor, axes: Sequence[Axis], inputs: Iterable[Tensor], points: Axis | None = None, applied: bool = False
) -> Note:
    """Records the axes of a result and the facts it inherits from its inputs.

    The pending flags of inputs are applied, unless `applied` says that they are already.

    Raises:
        Irregular: If the axes do not fit the shape.
    """
    if tuple(map(attrgetter("size"), axes)) != tuple(out.shape):
        raise Irregular(f"axes {axes} for a tensor of shape {tuple(out.shape)}")
    notes = [(tensor, note(tensor)) for tensor in inputs]
    active = [(tensor, known) for tensor, known in notes if known.active]
    if not applied:
        for _, known in notes:
            apply_pending(known, points)
    new = Note(list(map(find, axes)), bool(active), points)
    for tensor, known in active or notes:
        new.bent = new.bent or known.bent
        sources = known.sources or known.written_sources or {}
        merge_sources(new.sources, sources if tensor.shape == out.shape else as_sets(sources))
    if len(new.sources) > MANY:
        new.sources = {}
    out._billhook = new  # type: ignore[attr-defined]
    return new


def as_sets(sources: Sources) -> Sources:
    """Returns sources whose rows are sets."""
    return {key: Rows(rows.positions, more=rows.more) if rows.exact else rows for key, rows in sources.items()}


def merge_sources(into: Sources, more: Sources) -> None:
    """Adds sources to others, in place."""
    for key, rows in more.items():
        into[key] = into[key].union(rows) if key in into else rows


def record_move(out: Tensor, axes: Sequence[Axis], x: Tensor, along: Callable[[Tensor], Tensor]) -> Note:
    """Records the result of an operation that only moves entries; see `record`.

    `along` moves the entries of any tensor of that shape in the same way.
    """
    before = note(x)
    new = record(out, axes, [x], before.points, applied=True)
    new.pending = before.pending
    new.written_sources = before.written_sources
    new.sources = {
        key: Rows(along(rows.positions), exact=True) if rows.exact and rows.positions is not None else rows
        for key, rows in before.sources.items()
    }
    return new


def tensors(tree: Any) -> list[Tensor]:  # noqa: ANN401 - whatever an op takes or gives
    """Returns the tensors in nested lists, tuples, and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def tensor_args(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yields the tensors among an operation's arguments, whose lists are never nested."""
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from (item for item in x if isinstance(item, Tensor))


def join(a: Axis, b: Axis) -> Axis:
    """Unifies two axes; if that is irregular, both become opaque."""
    try:
        return unify(a, b)
    except Irregular as error:
        for axis in (a, b):
            mark(axis, "opaque", f"irregular: {error}")
        return find(b)


def broadcast(shape: Sequence[int], inputs: Sequence[Tensor]) -> list[Axis]:
    """Returns the axes of an elementwise result, aligned from the right."""
    out: list[Axis | None] = [None] * len(shape)
    for tensor in inputs:
        missing = len(shape) - tensor.dim()
        for d, axis in enumerate(axes_of(tensor)):
            if axis.size == shape[d + missing] and axis.size != 1:
                before = out[d + missing]
                out[d + missing] = axis if before is None else join(before, axis)
    return [axis if axis is not None else Axis(size) for axis, size in zip(out, shape, strict=True)]


def is_data(axis: Axis) -> bool:
    """Returns whether an axis consists only of batch, sequence, or image positions."""
    return all("data" in leaf.notes for leaf in leaves(axis))


def keep_order(axes: Iterable[Axis], reason: str) -> None:
    """Marks the parts of axes that are not data as not reorderable."""
    for leaf in (leaf for axis in axes for leaf in leaves(axis)):
        if "data" not in leaf.notes:
            mark(leaf, "const", reason)


def mark_units(axes: Iterable[Axis], flag: str, reason: str) -> None:
    """Sets a flag on axes that are not only data."""
    for axis in axes:
        if not is_data(axis):
            mark(axis, flag, reason)


LIBRARY_FOLDERS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
"""Folders whose code is not part of the running model."""


def running_module(model: nn.Module) -> str:
    """Returns the innermost running module and its line of code."""
    line = None
    for frame, number in traceback.walk_stack(sys._getframe()):
        line = line or _line(frame.f_code, number)
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            name = next((name or type(model).__name__ for name, other in model.named_modules() if other is owner), None)
            if name is not None:
                return f"{name} ({line})" if line else name
    return line or "the model"


def line_of(error: BaseException) -> str | None:
    """Returns the innermost line of a model's code in an error's traceback."""
    lines = [_line(frame.f_code, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    return next((line for line in reversed(lines) if line), None)


def _line(code: CodeType, number: int) -> str | None:
    return None if code.co_filename.startswith(LIBRARY_FOLDERS) else f"{Path(code.co_filename).name}:{number}"
