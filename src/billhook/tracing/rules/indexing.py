"""Rules of indexing: an index tensor points into the axis that it was made from."""

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.tracing.axes import Axis, factors, leaves, mark, notes_of, product
from billhook.tracing.rules.contraction import parameter_rows
from billhook.tracing.rules.movement import Rules, mark_ranked, narrow
from billhook.tracing.tape import (
    Note,
    Tape,
    apply_pending,
    as_sets,
    axes_of,
    broadcast,
    is_data,
    join,
    keep_order,
    note,
    record,
    record_move,
    tensors,
)

MASKS = {torch.bool, torch.uint8}


def point(index: Tensor, axis: Axis) -> None:
    """Relates an index tensor to the axis that it indexes."""
    points = note(index).points
    apply_pending(note(index), points)
    if points is not None and points.size == axis.size:
        join(points, axis)
    else:
        mark(axis, "const", "the code picks along it by numbers whose origin is not known")
        if points is not None:
            mark(points, "const", "its numbers pick along another axis")
    mark(axis, "indexed", "picked by number")


def picked(out: Tensor, axes: Sequence[Axis], x: Tensor, *picks: Tensor) -> Note:
    """Records entries of x chosen by indices that point into its axes."""
    apply_pending(note(x), note(x).points)
    return record(out, axes, [x, *picks], note(x).points, applied=True)


def embedding(tape: Tape, out: Tensor, weight: Tensor, ids: Tensor, *args: Any) -> None:  # noqa: ANN401 - padding and so on
    """Looks up rows of a table."""
    point(ids, axes_of(weight)[0])
    new = picked(out, [*axes_of(ids), axes_of(weight)[1]], weight, ids)
    new.active = True
    new.sources = {}
    mark(axes_of(weight)[1], "embedded", "a table writes it")
    for name, d, _ in parameter_rows(tape, weight, 1):
        tape.write(name, d)


def index_select(tape: Tape, out: Tensor, x: Tensor, dim: int, index: Tensor) -> None:
    """Selects given indices along a dimension."""
    axes = list(axes_of(x))
    point(index, axes[dim])
    axes[dim] = axes_of(index)[0] if index.dim() else Axis(1)
    picked(out, axes, x, index)


def index(tape: Tape, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> None:
    """Indexes x[i, j]: the dimensions of the indices replace the indexed ones."""
    picks = _picks(indices)
    if not MASKS.isdisjoint(map(attrgetter("dtype"), picks.values())):
        d, mask = next(iter(picks.items()))  # the masked dimensions become a single dimension
        axes = axes_of(x)
        masked = axes_of(x)[d : d + mask.dim()]
        for axis, other in zip(masked, axes_of(mask), strict=True):
            join(axis, other)
        keep_order(masked, "the code picks along it by a mask")
        record(out, [*axes[:d], product(masked), *axes[d + mask.dim() :]], [x, mask], note(x).points)
        return
    at = list(picks)
    first_pick = next(iter(picks.values()))
    value = tape.value(first_pick)
    if len(picks) == 1 and first_pick.numel() == 1 and first_pick.dim() == 1 and value is not None:
        axes = list(axes_of(x))  # x[..., [-2], :]
        start = int(value) % x.shape[at[0]]
        axes[at[0]] = narrow(axes[at[0]], start, start + 1)
        record_move(out, axes, x, lambda t: t.narrow(at[0], start, 1))
        return
    for d, pick in picks.items():
        point(pick, axes_of(x)[d])
    shape = np.broadcast_shapes(*map(attrgetter("shape"), picks.values()))
    positions = broadcast(shape, list(picks.values()))
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0  # adjacent indices keep their place, others move to the front
    before = list[Axis]()
    after = list[Axis]()
    for d, axis in enumerate(axes_of(x)):
        if d not in picks:
            (before if d < first else after).append(axis)
    new = picked(out, [*before, *positions, *after], x, *picks.values())
    if not note(x).active and len(before) + len(after) > 1:  # selects entire matrices, which are still weights
        new.active = False
        new.sources = note(x).sources


def _picks(indices: Sequence[Tensor | None]) -> dict[int, Tensor]:
    return {d: pick for d, pick in enumerate(indices) if pick is not None}


def index_put(tape: Tape, out: Tensor, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, *args: Any) -> None:  # noqa: ANN401
    """Writes x[i] = values: the values have the axes of x[i]."""
    at, picks = zip(*_picks(indices).items(), strict=True)
    if picks[0].dtype not in MASKS:
        size = np.broadcast_shapes(*map(attrgetter("shape"), picks))
        kept = [n for d, n in enumerate(x.shape) if d not in at]
        first = at[0] if list(at) == list(range(at[0], at[-1] + 1)) else 0
        shape = [*kept[:first], *size, *kept[first:]]
    else:
        d = at[0]
        mask = picks[0]
        shape = [*x.shape[:d], mask.numel(), *x.shape[d + mask.dim() :]]
    if picks[0].dtype not in MASKS or values.dim():
        target = x.new_empty(shape)
        index(tape, target, x, indices)
        broadcast(target.shape, [target, values])
    else:
        for d, axis in enumerate(axes_of(picks[0]), at[0]):
            join(axes_of(x)[d], axis)
    record(out, axes_of(x), [x, values, *(i for i in picks if i.dtype == torch.bool)]).active = True


def masked_scatter(tape: Tape, out: Tensor, x: Tensor, mask: Tensor, source: Tensor) -> None:
    """Replaces masked entries with the source in order; entire rows if the mask allows."""
    axes = broadcast(out.shape, [x, mask])
    rows = mask.expand(out.shape).stride(-1) == 0 and source.shape[-1] == out.shape[-1]
    keep_order(axes_of(source)[: -1 if rows else None], "a mask says where they go, one after another")
    if rows:
        join(axes[-1], axes_of(source)[-1])
    keep_order(axes[: -1 if rows else None], "a mask says along it what is overwritten, in order")
    record(out, axes, [x, mask, source]).active = True


def nll_loss(tape: Tape, out: Sequence[Tensor], x: Tensor, target: Tensor, *args: Any) -> None:  # noqa: ANN401 - weights
    """Selects the loss of each target class: [n, classes, *positions] by [n, *positions]."""
    axes = list(axes_of(x))
    point(target, axes.pop(-1 if x.dim() < 2 else 1))
    for axis, other in zip(axes, axes_of(target), strict=True):
        join(axis, other)
    for result in out:
        record(result, axes_of(target) if result.dim() else [], [x, target, *tensors(args)])


def gather(tape: Tape, out: Tensor, x: Tensor, dim: int, index: Tensor, **kwargs: Any) -> None:  # noqa: ANN401 - sparse_grad
    """Selects an index for each position along a dimension."""
    _align(x, dim, index)
    picked(out, axes_of(index), x, index)


def scatter(tape: Tape, out: Tensor, x: Tensor, dim: int, index: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    """Writes entries to given indices; the reverse of gather."""
    _align(x, dim, index)
    for source in tensors(args):
        for d in range(source.dim()):
            join(narrow(axes_of(source)[d], 0, index.shape[d]), axes_of(index)[d])
        apply_pending(note(source))
    apply_pending(note(x))
    record(out, axes_of(x), tensors((x, index, args)), applied=True)


def _align(x: Tensor, dim: int, index: Tensor) -> None:
    """Joins the other dimensions; a shorter index covers the first positions."""
    point(index, axes_of(x)[dim])
    for d in range(x.dim()):
        if d != dim % x.dim():
            join(narrow(axes_of(x)[d], 0, index.shape[d]), axes_of(index)[d])


def index_add(tape: Tape, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor, **kwargs: Any) -> None:  # noqa: ANN401
    """Writes or adds slices at given indices."""
    point(index, axes_of(x)[dim])
    for d in range(x.dim()):
        join(axes_of(x)[d] if d != dim % x.dim() else product(axes_of(index)), axes_of(source)[d])
    record(out, axes_of(x), [x, source])


def topk(tape: Tape, out: Sequence[Tensor], x: Tensor, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    """Returns the largest values and their indices. An axis keeps the largest number that is taken along it."""
    # of experts in groups, a router takes the best groups first, and then k experts from these
    axis = axes_of(x)[dim]
    *groups, inner = factors(axis) or [axis]  # an axis of size 1 has no factors
    needed = -(-k // max(1, math.prod(int(notes_of(group).get("taken", group.size)) for group in groups)))
    for leaf in leaves(inner):
        leaf.notes["taken"] = str(max(needed, int(leaf.notes.get("taken", 0))))
    _rank(out, x, dim)


def sort(tape: Tape, out: Sequence[Tensor], x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - two overloads
    """Returns all values in order and their indices."""
    numbers = [a for a in args if isinstance(a, int) and not isinstance(a, bool)]
    _rank(out, x, kwargs.get("dim", numbers[0] if numbers else -1))


def argsort(tape: Tape, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - two overloads
    """Returns the indices of the sorted values."""
    sort(tape, (out, out), x, *args, **kwargs)


def _rank(out: Sequence[Tensor], x: Tensor, dim: int) -> None:
    mark(axes_of(x)[dim], "topk", "ranked")
    mark_ranked(axes_of(x)[dim])
    if (points := note(x).points) is not None:
        mark(points, "const", "its numbers are put in order")
    axes = list(axes_of(x))
    notes = {"data": "ranked"} if is_data(axes[dim]) else {}
    axes[dim] = Axis(out[0].shape[dim], notes=notes | {"const": "its indices are ranks"})
    record(out[0], axes, [x], note(x).points)
    record(out[1], axes, [x], axes_of(x)[dim])


def as_complex(tape: Tape, out: Tensor, x: Tensor) -> None:
    """Combines a last dimension of two into real and imaginary parts."""
    mark(axes_of(x)[-1], "fixed", "real and imaginary part")
    record(out, axes_of(x)[:-1], [x]).sources = as_sets(note(x).sources)


def as_real(tape: Tape, out: Tensor, x: Tensor) -> None:
    """Splits complex values into a last dimension of two."""
    record(out, [*axes_of(x), Axis(2, notes={"fixed": "real and imaginary part"})], [x])


RULES: Rules = {
    "view_as_complex": as_complex,
    "view_as_real": as_real,
    "embedding": embedding,
    "index_select": index_select,
    **dict.fromkeys(("masked_scatter", "masked_scatter_"), masked_scatter),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), nll_loss),
    "gather": gather,
    "topk": topk,
    "sort": sort,
    "argsort": argsort,
    **dict.fromkeys(("index", "_unsafe_index"), index),
    **dict.fromkeys(("index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_"), index_put),
    **dict.fromkeys(("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"), scatter),
    **dict.fromkeys(("index_add", "index_add_", "index_copy", "index_copy_"), index_add),
}
