"""Ops that pick by number: whatever an index points into is the axis it was made from."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.tracing.axes import Axis, mark, product
from billhook.tracing.rules.contraction import parameter_rows
from billhook.tracing.rules.movement import mark_ranked, narrow
from billhook.tracing.tape import (
    Note,
    Tape,
    apply_pending,
    axes_of,
    broadcast,
    is_data,
    join,
    keep_order,
    mark_units,
    note,
    record,
    record_move,
    tensors,
)


def point(index: Tensor, axis: Axis) -> None:
    """Picks along an axis by the values of a tensor of whole numbers."""
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
    """Notes entries of x, chosen by indices that point into its axes."""
    apply_pending(note(x), note(x).points)
    return record(out, axes, [x, *picks], note(x).points, applied=True)


def embedding(tape: Tape, out: Tensor, weight: Tensor, ids: Tensor, *args: Any) -> None:  # noqa: ANN401 - padding and so on
    """Picks rows of a table."""
    point(ids, axes_of(weight)[0])
    new = picked(out, [*axes_of(ids), axes_of(weight)[1]], weight, ids)
    new.active, new.sources = True, {}
    mark(axes_of(weight)[1], "embedded", "a table writes it")
    for name, d, _ in parameter_rows(tape, weight, 1):
        tape.write(name, d)


def index_select(tape: Tape, out: Tensor, x: Tensor, dim: int, index: Tensor) -> None:
    """Picks the indices that a tensor names, along one dimension."""
    axes = list(axes_of(x))
    point(index, axes[dim])
    axes[dim] = axes_of(index)[0] if index.dim() else Axis(1)
    picked(out, axes, x, index)


def index(tape: Tape, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> None:
    """Picks x[i, j]: the dimensions that are picked along give way to those of the indices."""
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
        _masked(out, x, indices)
        return
    at = [d for d, i in enumerate(indices) if i is not None]
    picks = [i for i in indices if i is not None]
    value = tape.value(picks[0])
    if len(picks) == 1 and picks[0].numel() == 1 and picks[0].dim() == 1 and value is not None:
        axes = list(axes_of(x))  # x[..., [-2], :]
        start = int(value) % x.shape[at[0]]
        axes[at[0]] = narrow(axes[at[0]], start, start + 1)
        record_move(out, axes, x, lambda t: t.narrow(at[0], start, 1))
        return
    for d, pick in zip(at, picks, strict=True):
        point(pick, axes_of(x)[d])
    places = broadcast(np.broadcast_shapes(*[pick.shape for pick in picks]), picks)
    first = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    kept = [(d, axis) for d, axis in enumerate(axes_of(x)) if d not in at]
    before, after = [axis for d, axis in kept if d < first], [axis for d, axis in kept if d >= first]
    new = picked(out, [*before, *places, *after], x, *picks)
    if not note(x).active and len(kept) > 1:  # whole matrices, each still a weight
        new.active, new.sources = False, note(x).sources


def _masked(out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> None:
    """Picks x[mask]: the masked dimensions become one."""
    d, mask = next((d, i) for d, i in enumerate(indices) if i is not None)
    axes = axes_of(x)
    for axis, other in zip(axes[d : d + mask.dim()], axes_of(mask), strict=True):
        join(axis, other)
    mark_units(axes[d : d + mask.dim()], "const", "the code picks along it by a mask")
    record(out, [*axes[:d], product(axes[d : d + mask.dim()]), *axes[d + mask.dim() :]], [x, mask], note(x).points)


def index_put(tape: Tape, out: Tensor, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, *args: Any) -> None:  # noqa: ANN401
    """Writes x[i] = values: what is written has the axes of what would be read."""
    at, picks = zip(*[(d, i) for d, i in enumerate(indices) if i is not None], strict=True)
    if picks[0].dtype not in (torch.bool, torch.uint8):
        size = np.broadcast_shapes(*[i.shape for i in picks])
        kept = [n for d, n in enumerate(x.shape) if d not in at]
        first = at[0] if list(at) == list(range(at[0], at[-1] + 1)) else 0
        there = x.new_empty([*kept[:first], *size, *kept[first:]])
        index(tape, there, x, indices)
        broadcast(there.shape, [there, values])
    elif values.dim():
        d, mask = at[0], picks[0]
        there = x.new_empty([*x.shape[:d], mask.numel(), *x.shape[d + mask.dim() :]])
        index(tape, there, x, indices)
        broadcast(there.shape, [there, values])
    else:
        for d, axis in enumerate(axes_of(picks[0]), at[0]):
            join(axes_of(x)[d], axis)
    record(out, axes_of(x), [x, values, *(i for i in picks if i.dtype == torch.bool)]).active = True


def masked_scatter(tape: Tape, out: Tensor, x: Tensor, mask: Tensor, source: Tensor) -> None:
    """Overwrites what a mask names by the source, entry after entry: whole rows, where the mask is the same along them."""
    axes = broadcast(out.shape, [x, mask])
    rows = mask.expand(out.shape).stride(-1) == 0 and source.shape[-1] == out.shape[-1]
    keep_order(axes_of(source)[: -1 if rows else None], "a mask says where they go, one after another")
    if rows:
        join(axes[-1], axes_of(source)[-1])
    keep_order(axes[: -1 if rows else None], "a mask says along it what is overwritten, in order")
    record(out, axes, [x, mask, source]).active = True


def nll_loss(tape: Tape, out: Sequence[Tensor], x: Tensor, target: Tensor, *args: Any) -> None:  # noqa: ANN401 - weights
    """Picks the losses of classes [n, classes, *places] that targets [n, *places] name, as one number or one a target."""
    axes = list(axes_of(x))
    point(target, axes.pop(-1 if x.dim() < 2 else 1))
    for axis, other in zip(axes, axes_of(target), strict=True):
        join(axis, other)
    for result in out:
        record(result, axes_of(target) if result.dim() else [], [x, target, *tensors(args)])


def gather(tape: Tape, out: Tensor, x: Tensor, dim: int, index: Tensor, **kwargs: Any) -> None:  # noqa: ANN401 - sparse_grad
    """Picks the index that stands at each place, along one dimension."""
    _align(x, dim, index)
    picked(out, axes_of(index), x, index)


def scatter(tape: Tape, out: Tensor, x: Tensor, dim: int, index: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    """Gathers the other way round."""
    _align(x, dim, index)
    for source in tensors(args):
        for d in range(source.dim()):
            join(narrow(axes_of(source)[d], 0, index.shape[d]), axes_of(index)[d])
        apply_pending(note(source))
    apply_pending(note(x))
    record(out, axes_of(x), tensors((x, index, args)), applied=True)


def _align(x: Tensor, dim: int, index: Tensor) -> None:
    """Joins the other dimensions, in which an index that is shorter stands at the first places."""
    point(index, axes_of(x)[dim])
    for d in range(x.dim()):
        if d != dim % x.dim():
            join(narrow(axes_of(x)[d], 0, index.shape[d]), axes_of(index)[d])


def index_add(tape: Tape, out: Tensor, x: Tensor, dim: int, index: Tensor, source: Tensor, **kwargs: Any) -> None:  # noqa: ANN401
    """Slices written, or added, where the indices say."""
    point(index, axes_of(x)[dim])
    for d in range(x.dim()):
        join(axes_of(x)[d] if d != dim % x.dim() else product(axes_of(index)), axes_of(source)[d])
    record(out, axes_of(x), [x, source])


def topk(tape: Tape, out: Sequence[Tensor], x: Tensor, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    """Picks the largest values, and the indices where they stood."""
    mark(axes_of(x)[dim], "taken", str(k))
    _rank(out, x, dim)


def sort(tape: Tape, out: Sequence[Tensor], x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - two overloads
    """Orders all values, and returns the indices where they stood."""
    numbers = [a for a in args if isinstance(a, int) and not isinstance(a, bool)]
    _rank(out, x, kwargs.get("dim", numbers[0] if numbers else -1))


def argsort(tape: Tape, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - two overloads
    """Returns the indices alone."""
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
    """Makes real and imaginary part of the last dimension, of two."""
    mark(axes_of(x)[-1], "fixed", "real and imaginary part")
    record(out, axes_of(x)[:-1], [x]).sources = {key: rows.as_set() for key, rows in note(x).sources.items()}


def as_real(tape: Tape, out: Tensor, x: Tensor) -> None:
    """Makes a last dimension, of two, of real and imaginary part."""
    record(out, [*axes_of(x), Axis(2, notes={"fixed": "real and imaginary part"})], [x])


RULES: dict[str, Callable[..., None]] = {
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
