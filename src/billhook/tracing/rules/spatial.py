"""Convolutions, pooling and resizing: channels are axes, places in an image or a recording are data."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from billhook.tracing.axes import Axis, mark, notes_of, product, split
from billhook.tracing.rules.contraction import stretches
from billhook.tracing.rules.movement import narrow
from billhook.tracing.tape import Rows, Tape, axes_of, join, keep_order, note, put, tensors


def convolution(
    tape: Tape, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> None:  # fmt: skip
    """Convolves [n, channels in, *places] with [channels out, channels in of a group, *window]."""
    X, W = axes_of(x), axes_of(weight)
    if groups == 1:
        into, outof = (W[0], W[1]) if transposed else (W[1], W[0])
        join(X[1], into)
        for name, d, _ in stretches(tape, weight, 0 if transposed else 1):
            tape.read(name, d)
    else:
        outof = _grouped(X, W, transposed, groups)
    if bias is not None:
        join(outof, axes_of(bias)[0])
    for axis in W[2:]:
        mark(axis, "fixed", "the window of a convolution")
    keep_order(X[2:], f"its order matters to {tape.op}")
    places = [
        X[d] if weight.shape[d] == 1 and X[d].size == out.shape[d] else Axis(out.shape[d], notes=_data(X[d]))
        for d in range(2, out.dim())
    ]
    new = put(out, [X[0], outof, *places], tensors((x, weight, bias)))
    new.bent, new.sources = False, {}
    if not transposed and note(x).active:
        channels = [1, -1] + [1] * (out.dim() - 2)
        for name, d, rows in stretches(tape, weight, 0):
            exact = rows.view(channels).expand(out.shape) if groups == 1 and rows is not None else None
            new.sources[name, d] = Rows(rows) if exact is None else Rows(exact, exact=True)
        for name, d in new.sources:
            tape.write(name, d)


def _grouped(X: Sequence[Axis], W: Sequence[Axis], transposed: bool, groups: int) -> Axis:
    """Channels in groups: the groups of input, weight and result are one axis."""
    group = Axis(groups)
    join(X[1], product([group, Axis(X[1].size // groups)]))
    join(W[0], product([group, Axis(W[0].size // groups)]))
    if transposed:
        join(X[1], W[0])
        return product([group, W[1]])
    join(product(split(X[1], groups)[1]), W[1])
    return W[0]


def places(tape: Tape, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - any pooling or resizing op
    """Keeps batch and channels, and changes places."""
    axes = axes_of(x)
    for result in tensors(out):
        kept = result.dim() - (1 if "1d" in tape.op else 3 if "3d" in tape.op else 2)
        keep_order(axes[kept:], f"its order matters to {tape.op}")
        new = [axes[d] if d < kept or x.shape[d] == n else Axis(n, notes=_data(axes[d])) for d, n in enumerate(result.shape)]
        put(result, new, [x])


def windows(tape: Tape, out: Tensor, x: Tensor, kernel: Sequence[int], *args: Any) -> None:  # noqa: ANN401 - strides
    """Spreads im2col: every channel with every place of its window, for every place."""
    axes = axes_of(x)
    keep_order(axes[-2:], f"its order matters to {tape.op}")
    window = [Axis(k, notes={"fixed": "the window of im2col"}) for k in kernel]
    put(out, [*axes[:-3], product([axes[-3], *window]), Axis(out.shape[-1], notes=_data(axes[-1]))], [x])


def unwindows(tape: Tape, out: Tensor, x: Tensor, size: Sequence[int], kernel: Sequence[int], *args: Any) -> None:  # noqa: ANN401
    """Gathers col2im, the other way round."""
    axes = axes_of(x)
    channels, window = split(axes[-2], out.shape[-3])
    mark(product(window), "fixed", "the window of col2im")
    keep_order(axes[-1:], f"its order matters to {tape.op}")
    put(out, [*axes[:-2], product(channels), *(Axis(n, notes=_data(axes[-1])) for n in size)], [x])


def unfold(tape: Tape, out: Tensor, x: Tensor, dim: int, size: int, step: int) -> None:
    """Windows along one dimension: their places, and within them."""
    axes, dim = list(axes_of(x)), dim % x.dim()
    keep_order([axes[dim]], f"its order matters to {tape.op}")
    within = Axis(size, notes=_data(axes[dim]))
    axes[dim] = Axis(out.shape[dim], notes=_data(axes[dim]))
    put(out, [*axes, within], [x])


def grid_sampler(tape: Tape, out: Tensor, x: Tensor, grid: Tensor, *args: Any) -> None:  # noqa: ANN401 - how, and at edges
    """Reads [n, channels, *places] at the places that a grid [n, *places, coordinates] names."""
    axes, at = axes_of(x), axes_of(grid)
    keep_order(axes[2:], f"its order matters to {tape.op}")
    mark(at[-1], "fixed", "coordinates")
    put(out, [join(axes[0], at[0]), axes[1], *at[1:-1]], [x, grid])


def glu(tape: Tape, out: Tensor, x: Tensor, dim: int = -1) -> None:
    """Gates the first half by the second."""
    axes, n = list(axes_of(x)), x.shape[dim] // 2
    axes[dim] = join(narrow(axes[dim], 0, n), narrow(axes_of(x)[dim], n, 2 * n))
    mark(axes[dim], "bent", tape.op)
    put(out, axes, [x])


def _data(axis: Axis) -> dict[str, str]:
    """Hands on that places are data, and what refuses them, to places made from them."""
    return {flag: why for flag, why in notes_of(axis).items() if flag in ("data", "opaque", "const")}


RULES: dict[str, Callable[..., None]] = {
    "convolution": convolution,
    "im2col": windows,
    "col2im": unwindows,
    "unfold": unfold,
    "glu": glu,
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d", "grid_sampler"), grid_sampler),
    **dict.fromkeys(
        ("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
         "adaptive_avg_pool1d", "adaptive_max_pool2d", "_adaptive_avg_pool3d", "upsample_bicubic2d", "upsample_bilinear2d",
         "upsample_nearest2d", "upsample_nearest1d", "upsample_linear1d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa",
         "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "upsample_trilinear3d"),
        places,
    ),
}  # fmt: skip
