"""Rules of operations that move entries: views, permutations, slices, concatenations."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from billhook.tracing.axes import Axis, Irregular, concat, cut, factors, leaves, mark, notes_of, product, segments, split
from billhook.tracing.tape import Tape, axes_of, broadcast, is_data, join, note, record, record_move

Rules = dict[str, Callable[..., None]]
"""Rules by operation."""


def view(tape: Tape, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - any reshaping op
    """Regroups the factors in order into other sizes."""
    remaining = [factor for axis in axes_of(x) for factor in factors(axis)]
    axes = list[Axis]()
    if not out.numel():
        record(out, [Axis(n, notes={"data": "empty"}) for n in out.shape], [x])
        return
    while len(axes) < out.dim():
        size = out.shape[len(axes)]
        try:
            outer_factors, remaining = split(product(remaining), size) if size != 1 else ([], remaining)
            axes.append(product(outer_factors))
        except Irregular:
            new_axes, remaining = _rearranged(remaining, out.shape[len(axes) :])
            axes += new_axes
    if remaining:
        raise Irregular(f"{product(remaining)} is left")
    record_move(out, axes, x, lambda t: t.reshape(out.shape))


def _rearranged(remaining: list[Axis], sizes: Sequence[int]) -> tuple[list[Axis], list[Axis]]:
    """Merges the fewest factors, never pruned, that fit sizes; returns new axes and the rest."""
    old = new = 1
    i = j = 0
    while i == 0 or old != new:
        if old <= new and i < len(remaining):
            old *= remaining[i].size
            i += 1
        elif j < len(sizes):
            new *= sizes[j]
            j += 1
        else:
            break
    if old != new or not all({"data", "const"} & leaf.notes.keys() for factor in remaining[:i] for leaf in leaves(factor)):
        raise Irregular(f"{product(remaining[:i])} is taken as {' x '.join(map(str, sizes[:j]))}")
    return [Axis(size, notes=notes_of(product(remaining[:i]))) for size in sizes[:j]], remaining[i:]


def permute(tape: Tape, out: Tensor, x: Tensor, dims: Sequence[int]) -> None:
    """Reorders the axes."""
    record_move(out, [axes_of(x)[d] for d in dims], x, lambda t: t.permute(*dims))


def transpose(tape: Tape, out: Tensor, x: Tensor, first: int = 0, second: int = 1) -> None:
    """Swaps two axes."""
    if x.dim() < 2:
        record_move(out, axes_of(x), x, lambda t: t)
        return
    axes = list(axes_of(x))
    axes[first], axes[second] = axes[second], axes[first]
    record_move(out, axes, x, lambda t: t.transpose(first, second))


def copies(n: int) -> Axis:
    """Returns an axis of identical copies."""
    return Axis(n, notes={"copied": f"the same {n} times"})


def mark_ranked(axis: Axis) -> None:
    """Marks copies along a compared axis as constant, because the first of equals wins."""
    for leaf in leaves(axis):
        if "copied" in leaf.notes:
            mark(leaf, "const", "copies are ranked by their place")


def expand(tape: Tape, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - sizes are in out
    """Expands dimensions of size 1 into axes of copies."""
    new = out.dim() - x.dim()
    old = axes_of(x)
    axes = [old[d - new] if d >= new and x.shape[d - new] == n else copies(n) for d, n in enumerate(out.shape)]
    record_move(out, axes, x, lambda t: t.expand(out.shape))


def repeat(tape: Tape, out: Tensor, x: Tensor, repeats: Sequence[int]) -> None:
    """Repeats the entire axis."""
    new = out.dim() - x.dim()
    old = axes_of(x)
    axes = [product([copies(n), old[d - new]]) if d >= new else copies(n) for d, n in enumerate(repeats)]
    record_move(out, axes, x, lambda t: t.repeat(repeats))


def repeat_interleave(tape: Tape, out: Tensor, x: Tensor, repeats: int, dim: int | None = None, **kwargs: Any) -> None:  # noqa: ANN401
    """Repeats each index."""
    if not isinstance(repeats, int):
        raise Irregular("how often each index is repeated depends on data")
    axes = list(axes_of(x)) if dim is not None else [product(axes_of(x))]
    axes[dim or 0] = product([axes[dim or 0], copies(repeats)])
    record_move(out, axes, x, lambda t: t.repeat_interleave(repeats, dim))


def narrow(axis: Axis, start: int, end: int) -> Axis:
    """Returns the part of an axis between two positions."""
    if start == 0 and end == axis.size:
        return axis
    if start >= end:
        return Axis(0)
    try:
        _, tail = cut(axis, start)
        middle, _ = cut(concat(tail), end - start)
    except Irregular as error:
        mark(axis, "opaque", str(error))
        return Axis(end - start, notes=notes_of(axis))
    return concat(middle)


def slice_(
    tape: Tape, out: Tensor, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> None:
    """Takes a range; with a step, the outer factor of the axis, whose inner factor is fixed."""
    axes = list(axes_of(x))
    n = x.shape[dim]
    pending: tuple[tuple[Axis, str, str], ...] = ()
    low, high = (min(max(v + n if v < 0 else v, 0), n) for v in (start or 0, n if end is None else end))
    if step == 1:
        axes[dim] = narrow(axes[dim], low, max(low, high))
    elif n % step or out.shape[dim] != n // step:
        mark(axes[dim], "const", f"the code takes one in {step} of {n}, from {low} on")
        axes[dim] = Axis(out.shape[dim], notes=notes_of(axes[dim]))
    else:
        outer, inner = split(axes[dim], n // step)
        axes[dim] = product(outer)
        pending = ((product(inner), "fixed", f"the code takes one index in {step} by its number"),)
    record_move(out, axes, x, lambda t: torch.ops.aten.slice(t, dim, start, end, step)).pending += pending


def select(tape: Tape, out: Tensor, x: Tensor, dim: int, index: int) -> None:
    """Takes a single index, which makes the indices up to it distinguishable; a negative one, those from it on."""
    axes = list(axes_of(x))
    selected = axes.pop(dim)
    if len(segments(selected)) > 1:  # Falcon takes a key and a value, -2 and -1, after any number of queries of a group
        selected = narrow(selected, 0, index + 1) if index >= 0 else narrow(selected, selected.size + index, selected.size)
    new = record_move(out, axes, x, lambda t: t.select(dim, index))
    new.pending += ((selected, "fixed", "the code takes single indices by their number"),)
    if (columns := note(x).columns) and dim % x.dim() == x.dim() - 1:
        new.points = columns[index]


def unbind(tape: Tape, out: Sequence[Tensor], x: Tensor, dim: int = 0) -> None:
    """Takes every index by itself."""
    for i, result in enumerate(out):
        select(tape, result, x, dim, i)


def split_(tape: Tape, out: Sequence[Tensor], x: Tensor, sizes: int | Sequence[int], dim: int = 0) -> None:
    """Takes consecutive ranges."""
    start = 0
    for result in out:
        axes = list(axes_of(x))
        n = result.shape[dim]
        axes[dim] = narrow(axes[dim], start, start + n)
        record_move(result, axes, x, partial(torch.narrow, dim=dim, start=start, length=n))
        start += n


def cat(tape: Tape, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> None:
    """Concatenates tensors; all other dimensions are joined."""
    parts = [part for part in parts if part.dim() == out.dim()]
    axes = list(axes_of(parts[0]))
    for part in parts[1:]:
        for d in range(out.dim()):
            if d != dim % out.dim():
                axes[d] = join(axes[d], axes_of(part)[d])
    joined = [axes_of(part)[dim] for part in parts]
    if any(map(is_data, filter(attrgetter("size"), joined))):
        for axis in joined:
            mark(axis, "data", "it stands next to positions of the input")
    axes[dim] = concat(joined)
    if axes[dim].size != out.shape[dim]:
        axes[dim] = Axis(out.shape[dim])
    record(out, axes, parts)


def stack(tape: Tape, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> None:
    """Stacks tensors along a new axis with distinguishable indices."""
    axes = broadcast(parts[0].shape, parts)
    axes.insert(dim % out.dim(), Axis(len(parts), notes={"fixed": "different things are stacked there"}))
    record(out, axes, parts)


def pad(tape: Tape, out: Tensor, x: Tensor, pads: Sequence[int], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the value
    """Adds positions before and after, or removes them if a pad is negative."""
    axes = list(axes_of(x))
    for i, (left, right) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        d = x.dim() - 1 - i
        axes[d] = narrow(axes[d], max(-left, 0), axes[d].size - max(-right, 0))
        if max(left, right) > 0:
            notes = {"copied": "padding"} | ({"data": "padding"} if is_data(axes[d]) else {})
            axes[d] = concat([Axis(max(left, 0), notes=notes), axes[d], Axis(max(right, 0), notes=notes)])
    record(out, axes, [x])


def reorder(tape: Tape, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - flip and roll differ
    """Reorders positions in a fixed way: flip, roll."""
    dims = args[0] if tape.op == "flip" else args[1] if len(args) > 1 else ()
    axes = list(axes_of(x))
    for d in {d % x.dim() for d in dims} or range(x.dim()):
        mark(axes[d], "const", f"its order matters to {tape.op}")
        axes[d] = Axis(axes[d].size, notes=notes_of(axes[d]))
    record(out, axes, [x], note(x).points)


def as_strided(tape: Tape, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - sizes, strides, offset
    """Views memory as it is."""
    strides = [[(n, stride) for n, stride in zip(t.shape, t.stride(), strict=True) if n > 1] for t in (x, out)]
    if out.shape != x.shape or strides[0] != strides[1] or out.storage_offset() != x.storage_offset():
        raise Irregular("memory is viewed with other strides")
    record_move(out, axes_of(x), x, lambda t: t)


RULES: Rules = {
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "squeeze", "unsqueeze", "squeeze_", "unsqueeze_"), view
    ),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"), split_),
    **dict.fromkeys(("t", "transpose", "transpose_", "t_"), transpose),
    **dict.fromkeys(("flip", "roll"), reorder),
    **dict.fromkeys(("as_strided", "as_strided_"), as_strided),
    "permute": permute,
    "expand": expand,
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
    "slice": slice_,
    "select": select,
    "unbind": unbind,
    "cat": cat,
    "stack": stack,
    "constant_pad_nd": pad,
}
