"""The record of a run on meta tensors: a note on every tensor, and the facts that lie between tensors."""

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from billhook.engine.trees import tree_leaves
from billhook.tracing.axes import Axis, Irregular, find, leaves, mark, unify

MANY = 8  # sources; a residual stream has more, and there nobody asks for them
SMALL = 4096  # entries of a constant that is worth computing


@dataclass(frozen=True)
class Rows:
    """Positions along a dimension of a parameter that an activation comes from.

    Attributes:
        positions: Whole numbers; -1 where it does not come from there. None stands for all.
        exact: Whether `positions` has the activation's own shape, position by position, rather than being a set.
        more: Further positions, of a set.
    """

    positions: Tensor | None
    exact: bool = False
    more: tuple[Tensor, ...] = ()

    def as_set(self) -> "Rows":
        """Returns the same rows, no longer position by position."""
        return Rows(self.positions, more=self.more) if self.exact else self

    def union(self, other: "Rows") -> "Rows":
        """Returns the rows of both."""
        if self.positions is None or other.positions is None:
            return Rows(None)
        both = {id(rows): rows for rows in (self.positions, *self.more, other.positions, *other.more)}
        return self if len(both) == 1 + len(self.more) else Rows(self.positions, more=tuple(both.values())[1:])


Sources = dict[tuple[str, int], Rows]
"""What an activation was last multiplied with: (parameter, dimension) -> rows."""


class Note:
    """The facts known of one tensor.

    Attributes:
        axes: One a dimension.
        active: Whether it depends on the inputs, rather than on parameters alone.
        pending: Marks on axes of what it was taken from, due as soon as its values are used and not just its shape.
        pool: For memory that is written piece by piece, the sources of all that was written, shared by its views.
        points: The axis that its whole numbers index, if they do.
        columns: The same for each index of the last dimension, where they differ.
        used: Whether an op has asked for it.
        value: What it holds, where that is small and does not depend on weights or inputs.
        sources: Which rows of which parameters an activation was last multiplied with.
        bent: Whether something non-linear came after them.
        squared: Whether it is a power, whose sum is that of a norm.
    """

    __slots__ = ("active", "axes", "bent", "columns", "pending", "points", "pool", "sources", "squared", "used", "value")

    def __init__(self, axes: Sequence[Axis], active: bool = False, points: Axis | None = None) -> None:
        self.axes, self.active, self.points = list(axes), active, points
        self.columns: tuple[Axis, ...] = ()
        self.pool: Sources | None = None
        self.pending: tuple[tuple[Axis, str, str], ...] = ()
        self.value: Tensor | None = None
        self.sources: Sources = {}
        self.bent = self.used = self.squared = False


@dataclass(frozen=True)
class ActivationProduct:
    """Two activations that were multiplied: contracted over an axis, or element by element.

    Attributes:
        left: The sources of the first.
        right: The sources of the second.
        left_axes: The axes of the first.
        right_axes: The axes of the second.
        over: The contracted axis; None for a product element by element.
        bent: Whether something non-linear had been done to the first, and to the second.
    """

    left: Sources
    right: Sources
    left_axes: list[Axis]
    right_axes: list[Axis]
    over: Axis | None
    bent: tuple[bool, bool]


@dataclass
class Tape:
    """The facts of a run.

    Attributes:
        op: The operation at hand.
        parameters: Parameters and buffers by name.
        storages: Their names by storage.
        meetings: Products of two activations, in order.
        reads: When a dimension of a parameter was first contracted with an activation, in the order of all such events.
        writes: When a dimension of a parameter first became one of an activation.
        misses: Why axes are opaque, with how often.
        assumed: What a value was taken to be where code asks for one that nobody knows.
        overwritten: Values over which something unknown was written, by storage.
    """

    op: str = ""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    storages: dict[int, str] = field(default_factory=dict)
    meetings: list[ActivationProduct] = field(default_factory=list)
    reads: dict[tuple[str, int], int] = field(default_factory=dict)
    writes: dict[tuple[str, int], int] = field(default_factory=dict)
    misses: dict[str, int] = field(default_factory=dict)
    assumed: dict[str, int] = field(default_factory=dict)
    overwritten: dict[int, Tensor] = field(default_factory=dict)

    def value(self, x: Tensor) -> Tensor | None:
        """Returns the values of a tensor, where they are known."""
        value = note(x).value if x.is_meta else x
        return None if value is None or memory_of(value) in self.overwritten else value

    def read(self, name: str, dim: int) -> None:
        """Notes the contraction of a parameter's dimension with an activation."""
        self.reads.setdefault((name, dim), len(self.reads) + len(self.writes))

    def write(self, name: str, dim: int) -> None:
        """Notes a parameter's dimension as one that has become an activation's."""
        self.writes.setdefault((name, dim), len(self.reads) + len(self.writes))


def memory_of(tensor: Tensor) -> int:
    """Returns what tells the memory of a tensor from that of all others that are there."""
    address: int = tensor.untyped_storage()._cdata
    return address


def note(tensor: Tensor, touch: bool = True) -> Note:
    """Returns the note on a tensor; one that nobody has noted anything on gets fresh axes."""
    known: Note | None = getattr(tensor, "_billhook", None)
    if known is None or len(known.axes) != tensor.dim():
        known = Note([Axis(n) for n in tensor.shape])
        tensor._billhook = known  # type: ignore[attr-defined]
    known.used = known.used or touch
    return known


def axes_of(tensor: Tensor) -> list[Axis]:
    """Returns the axes of a tensor, one a dimension."""
    return note(tensor).axes


def apply_pending(used: Note, points: Axis | None = None) -> None:
    """Uses the values of a tensor: marks what was due, and where they point unless the result still points there."""
    for axis, flag, reason in used.pending:
        mark(axis, flag, reason)
    used.pending = ()
    if used.points is not None and (points is None or find(points) is not find(used.points)):
        mark(used.points, "const", "its numbers are used as values")


def record(
    out: Tensor, axes: Sequence[Axis], inputs: Iterable[Tensor], points: Axis | None = None, applied: bool = False
) -> Note:
    """Notes the axes of a result, and what it inherits from the inputs; their values are used, unless that is `applied`.

    Raises:
        Irregular: If the axes do not fit the shape.
    """
    if tuple(axis.size for axis in axes) != tuple(out.shape):
        raise Irregular(f"axes {axes} for a tensor of shape {tuple(out.shape)}")
    notes = [(tensor, note(tensor)) for tensor in inputs]
    active = [(tensor, known) for tensor, known in notes if known.active]
    if not applied:
        for _, known in notes:
            apply_pending(known, points)
    new = Note([find(axis) for axis in axes], bool(active), points)
    for tensor, known in active or notes:
        new.bent = new.bent or known.bent
        if sources := known.sources or known.pool:
            exact = tensor.shape == out.shape
            merge_sources(new.sources, {key: rows if exact else rows.as_set() for key, rows in sources.items()})
    if len(new.sources) > MANY:
        new.sources = {}
    out._billhook = new  # type: ignore[attr-defined]
    return new


def merge_sources(into: Sources, more: Sources) -> None:
    """Adds sources to others."""
    for key, rows in more.items():
        into[key] = into[key].union(rows) if key in into else rows


def record_move(out: Tensor, axes: Sequence[Axis], x: Tensor, along: Callable[[Tensor], Tensor]) -> Note:
    """Notes the result of an op that only moves entries, as `along` moves those of any tensor of that shape; see `record`."""
    before = note(x)
    new = record(out, axes, [x], before.points, applied=True)
    new.pending, new.pool = before.pending, before.pool
    new.sources = {
        key: Rows(along(rows.positions), exact=True) if rows.exact and rows.positions is not None else rows
        for key, rows in before.sources.items()
    }
    return new


def tensors(tree: Any) -> list[Tensor]:  # noqa: ANN401 - whatever an op takes or gives
    """Returns the tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def tensor_args(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yields the tensors among the arguments of an op; lists of them are never nested."""
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from (item for item in x if isinstance(item, Tensor))


def join(a: Axis, b: Axis) -> Axis:
    """Unifies two axes; where that is irregular, both become opaque."""
    try:
        return unify(a, b)
    except Irregular as error:
        for axis in (a, b):
            mark(axis, "opaque", f"irregular: {error}")
        return find(b)


def broadcast(shape: Sequence[int], inputs: Sequence[Tensor]) -> list[Axis]:
    """Returns the axes of an elementwise result: aligned from the right, equal sizes are the same axis."""
    out: list[Axis | None] = [None] * len(shape)
    for tensor in inputs:
        missing = len(shape) - tensor.dim()
        for d, axis in enumerate(axes_of(tensor)):
            if axis.size == shape[d + missing] and axis.size != 1:
                before = out[d + missing]
                out[d + missing] = axis if before is None else join(before, axis)
    return [axis if axis is not None else Axis(size) for axis, size in zip(out, shape, strict=True)]


def is_data(axis: Axis) -> bool:
    """Tells whether an axis is made of batch, sequence or image positions alone."""
    return all("data" in leaf.notes for leaf in leaves(axis))


def keep_order(axes: Iterable[Axis], reason: str) -> None:
    """Marks the parts of axes that are not data as not to be reordered."""
    for leaf in (leaf for axis in axes for leaf in leaves(axis)):
        if "data" not in leaf.notes:
            mark(leaf, "const", reason)


def mark_units(axes: Iterable[Axis], flag: str, reason: str) -> None:
    """Notes a flag on axes, except for those that are data alone."""
    for axis in axes:
        if not is_data(axis):
            mark(axis, flag, reason)


NOT_THE_MODELS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
"""Folders whose code is not the code of the model that runs."""


def running_module(model: nn.Module) -> str:
    """Finds the innermost module of a model that is running, and the line of its code."""
    line = None
    for frame, number in traceback.walk_stack(sys._getframe()):
        line = line or _line(frame.f_code, number)
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and (name := _name(model, owner)) is not None:
            return f"{name} ({line})" if line else name
    return line or "the model"


def line_of(error: BaseException) -> str | None:
    """Finds the innermost line of a model's code that an error came through."""
    lines = [_line(frame.f_code, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    return next((line for line in reversed(lines) if line), None)


def _line(code: CodeType, number: int) -> str | None:
    return None if code.co_filename.startswith(NOT_THE_MODELS) else f"{Path(code.co_filename).name}:{number}"


def _name(model: nn.Module, module: nn.Module) -> str | None:
    return next((name or type(model).__name__ for name, other in model.named_modules() if other is module), None)
