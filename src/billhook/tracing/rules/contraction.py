"""Rules of matrix products, convolutions, pooling, and resizing."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from billhook.tracing.axes import Axis, find, mark, notes_of, product, split, unify
from billhook.tracing.rules.movement import Rules, narrow
from billhook.tracing.tape import (
    ActivationProduct,
    Rows,
    Tape,
    as_sets,
    axes_of,
    broadcast,
    join,
    keep_order,
    mark_units,
    memory_of,
    note,
    record,
    tensors,
)


def contract(tape: Tape, out: Tensor, axes: list[Axis], x: Tensor, i: int, y: Tensor, j: int) -> None:
    """Contracts the last dimension i of x with dimension j of y.

    The last but one dimension of x and the other of y remain.
    """
    over = join(axes_of(x)[i], axes_of(y)[j])
    nx = note(x)
    ny = note(y)
    if nx.active and ny.active:
        mark(over, "contracted", tape.op)
        tape.products.append(ActivationProduct(nx.sources, ny.sources, nx.axes, ny.axes, over, (nx.bent, ny.bent)))
        new = record(out, axes, [x, y])
        new.sources = as_sets(nx.sources | ny.sources)
        return
    new = record(out, axes, [x, y])
    if nx.active or ny.active:
        weight, dim, kept = (y, j, 2 * y.dim() - 3 - j) if nx.active else (x, i, i - 1)
        for name, d, _ in parameter_rows(tape, weight, dim):
            tape.read(name, d)
        new.sources = {}
        new.bent = False
        shape = [1] * out.dim()
        shape[-1 if nx.active else -2] = -1  # the rows lie along this dimension of the result
        for name, d, rows in parameter_rows(tape, weight, kept):
            new.sources[name, d] = Rows(None) if rows is None else Rows(rows.view(shape).expand(out.shape), exact=True)
        for name, d in new.sources:
            tape.write(name, d)


def parameter_rows(tape: Tape, weight: Tensor, dim: int) -> list[tuple[str, int, Tensor | None]]:
    """Returns the parameters behind a weight's dimension, with dimension and positions."""
    name = tape.storages.get(memory_of(weight))
    if name is not None:  # a view of a parameter: its dimension and positions follow from the strides
        stride = weight.stride(dim)
        size = weight.shape[dim]
        parameter = tape.parameters[name]
        for d, (unit, length) in enumerate(zip(parameter.stride(), parameter.shape, strict=True)):
            if unit and stride % unit == 0 and stride // unit * (size - 1) < length and length > 1:
                start = weight.storage_offset() // unit % length
                return [(name, d, start + stride // unit * torch.arange(size, dtype=torch.int32))]
    axis = find(axes_of(weight)[dim])  # computed from parameters: keep parameters that have the axis
    candidates = [name for name, _ in note(weight).sources]
    every = torch.arange(weight.shape[dim], dtype=torch.int32)
    return [(n, d, every) for n in candidates for d, other in enumerate(axes_of(tape.parameters[n])) if find(other) is axis]


def mm(tape: Tape, out: Tensor, x: Tensor, y: Tensor, **kwargs: Any) -> None:  # noqa: ANN401 - dtype
    """Contracts [a, k] with [k, b]."""
    contract(tape, out, [axes_of(x)[0], axes_of(y)[1]], x, 1, y, 0)


def bmm(tape: Tape, out: Tensor, x: Tensor, y: Tensor, **kwargs: Any) -> None:  # noqa: ANN401 - dtype
    """Contracts [n, a, k] with [n, k, b] for each n; with k = 1, multiplies entries."""
    batch = join(axes_of(x)[0], axes_of(y)[0])
    if x.shape[2] == 1 and not (note(x).active and note(y).active):  # rotary frequencies times positions
        record(out, [batch, axes_of(x)[1], axes_of(y)[2]], [x, y])
        return
    if note(x).active and note(y).active:
        mark(batch, "batched", tape.op)
    contract(tape, out, [batch, axes_of(x)[1], axes_of(y)[2]], x, 2, y, 1)


def mv(tape: Tape, out: Tensor, x: Tensor, y: Tensor) -> None:
    """Contracts [a, k] or [k] with [k]."""
    join(axes_of(x)[-1], axes_of(y)[0])
    record(out, axes_of(x)[:-1], [x, y])


def with_bias(product: Callable[..., None]) -> Callable[..., None]:
    """Returns the rule of a product with an added bias."""

    def rule(tape: Tape, out: Tensor, bias: Tensor, x: Tensor, y: Tensor, **kwargs: Any) -> None:  # noqa: ANN401 - factors
        product(tape, out, x, y)
        _add(out, bias)

    return rule


def linear(tape: Tape, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Contracts [..., k] with [b, k], on devices that do not decompose it."""
    contract(tape, out, [*axes_of(x)[:-1], axes_of(weight)[0]], x, x.dim() - 1, weight, 1)
    if bias is not None:
        _add(out, bias)


def attention(tape: Tape, out: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    """Computes fused softmax(q k^T) v, [b, heads, s, d], with grouped queries."""
    Q = axes_of(q)
    K = axes_of(k)
    V = axes_of(v)
    unify(Q[1], product([K[1], Axis(Q[1].size // K[1].size)]))
    for a, b in ((Q[0], K[0]), (K[0], V[0]), (K[1], V[1]), (K[2], V[2]), (Q[3], K[3])):
        join(a, b)
    mark(Q[1], "batched", tape.op)
    mark(Q[3], "contracted", tape.op)
    nq, nk, nv = map(note, (q, k, v))
    scores = as_sets(nq.sources | nk.sources)
    tape.products.append(ActivationProduct(nq.sources, nk.sources, Q, K, Q[3], (False, False)))
    tape.products.append(ActivationProduct(scores, nv.sources, [*Q[:3], K[2]], V, K[2], (False, False)))
    mask = kwargs.get("attn_mask", args[0] if args and isinstance(args[0], Tensor) else None)
    if isinstance(mask, Tensor):
        for of_mask, axis in zip(axes_of(mask)[::-1], (K[2], Q[2], Q[1], Q[0]), strict=False):
            if of_mask.size == axis.size:
                join(of_mask, axis)
    result = out if isinstance(out, Tensor) else out[0]
    record(result, [Q[0], Q[1], Q[2], V[3]], [q, k, v]).sources = scores | nv.sources


def solve(tape: Tape, out: Tensor, a: Tensor, b: Tensor, **kwargs: Any) -> None:  # noqa: ANN401 - which triangle
    """Computes a^-1 b, or b a^-1 if left=False, for a batch: [..., n, n] with [..., n, k]."""
    axes = list(axes_of(b))
    A = axes_of(a)
    for d in range(1, b.dim() - 1):
        if d <= a.dim() - 2 and a.shape[-2 - d] == b.shape[-2 - d]:
            axes[-2 - d] = join(axes[-2 - d], A[-2 - d])
    solved = -2 if kwargs.get("left", True) else -1
    mark_units((join(A[-1], A[-2]), axes[solved]), "const", f"its order matters to {tape.op}")
    record(out, axes, [a, b])


def _add(out: Tensor, bias: Tensor) -> None:
    before = note(out)
    new = record(out, broadcast(out.shape, [out, bias]), [out, bias])
    new.active = before.active or note(bias).active
    new.sources = before.sources
    new.bent = before.bent


def convolution(
    tape: Tape, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> None:  # fmt: skip
    """Convolves [n, channels, *positions] with [out, channels per group, *kernel]."""
    X = axes_of(x)
    W = axes_of(weight)
    if groups == 1:
        weight_in, weight_out = (W[0], W[1]) if transposed else (W[1], W[0])
        join(X[1], weight_in)
        for name, d, _ in parameter_rows(tape, weight, 0 if transposed else 1):
            tape.read(name, d)
    else:
        group = Axis(groups)
        join(X[1], product([group, Axis(X[1].size // groups)]))
        join(W[0], product([group, Axis(W[0].size // groups)]))
        join(X[1] if transposed else product(split(X[1], groups)[1]), W[0] if transposed else W[1])
        weight_out = product([group, W[1]]) if transposed else W[0]
    if bias is not None:
        join(weight_out, axes_of(bias)[0])
    for axis in W[2:]:
        mark(axis, "fixed", "the window of a convolution")
    keep_order(X[2:], f"its order matters to {tape.op}")
    positions = [
        X[d] if weight.shape[d] == 1 and X[d].size == out.shape[d] else Axis(out.shape[d], notes=_data(X[d]))
        for d in range(2, out.dim())
    ]
    new = record(out, [X[0], weight_out, *positions], tensors((x, weight, bias)))
    new.bent = False
    new.sources = {}
    if not transposed and note(x).active:
        channels = [1, -1] + [1] * (out.dim() - 2)
        for name, d, rows in parameter_rows(tape, weight, 0):
            exact = rows.view(channels).expand(out.shape) if groups == 1 and rows is not None else None
            new.sources[name, d] = Rows(rows) if exact is None else Rows(exact, exact=True)
        for name, d in new.sources:
            tape.write(name, d)


def resize(tape: Tape, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - any pooling or resizing op
    """Keeps batch and channels, and changes positions (pooling, resizing, padding)."""
    axes = axes_of(x)
    for result in tensors(out):
        kept = result.dim() - (1 if "1d" in tape.op else 3 if "3d" in tape.op else 2)
        keep_order(axes[kept:], f"its order matters to {tape.op}")
        new = [axes[d] if d < kept or x.shape[d] == n else Axis(n, notes=_data(axes[d])) for d, n in enumerate(result.shape)]
        record(result, new, [x])


def windows(tape: Tape, out: Tensor, x: Tensor, kernel: Sequence[int], *args: Any) -> None:  # noqa: ANN401 - strides
    """Unfolds images (im2col): every channel with every kernel position, for every position."""
    axes = axes_of(x)
    keep_order(axes[-2:], f"its order matters to {tape.op}")
    window = [Axis(k, notes={"fixed": "the window of im2col"}) for k in kernel]
    record(out, [*axes[:-3], product([axes[-3], *window]), Axis(out.shape[-1], notes=_data(axes[-1]))], [x])


def unfold(tape: Tape, out: Tensor, x: Tensor, dim: int, size: int, step: int) -> None:
    """Splits a dimension into windows and positions within them."""
    axes = list(axes_of(x))
    dim = dim % x.dim()
    keep_order([axes[dim]], f"its order matters to {tape.op}")
    within = Axis(size, notes=_data(axes[dim]))
    axes[dim] = Axis(out.shape[dim], notes=_data(axes[dim]))
    record(out, [*axes, within], [x])


def grid_sampler(tape: Tape, out: Tensor, x: Tensor, grid: Tensor, *args: Any) -> None:  # noqa: ANN401 - how, and at edges
    """Samples [n, channels, *positions] at a grid [n, *positions, coordinates]."""
    axes = axes_of(x)
    at = axes_of(grid)
    keep_order(axes[2:], f"its order matters to {tape.op}")
    mark(at[-1], "fixed", "coordinates")
    record(out, [join(axes[0], at[0]), axes[1], *at[1:-1]], [x, grid])


def glu(tape: Tape, out: Tensor, x: Tensor, dim: int = -1) -> None:
    """Gates the first half with the second."""
    axes = list(axes_of(x))
    n = x.shape[dim] // 2
    axes[dim] = join(narrow(axes[dim], 0, n), narrow(axes_of(x)[dim], n, 2 * n))
    mark(axes[dim], "bent", tape.op)
    record(out, axes, [x])


def _data(axis: Axis) -> dict[str, str]:
    """Returns the flags of an axis that its resized positions inherit."""
    return {flag: why for flag, why in notes_of(axis).items() if flag in ("data", "opaque", "const")}


RULES: Rules = {
    "mm": mm,
    "addmm": with_bias(mm),
    "bmm": bmm,
    "baddbmm": with_bias(bmm),
    "addmv": with_bias(mv),
    **dict.fromkeys(("mv", "dot", "vdot"), mv),
    "linear": linear,
    "linalg_solve_triangular": solve,
    **dict.fromkeys(
        ("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_fused_attention_overrideable",
         "_scaled_dot_product_attention_math"),
        attention,
    ),
    "convolution": convolution,
    "im2col": windows,
    "unfold": unfold,
    "glu": glu,
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_3d", "grid_sampler"), grid_sampler),
    **dict.fromkeys(
        ("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d",
         "adaptive_avg_pool1d", "adaptive_max_pool2d", "_adaptive_avg_pool3d", "upsample_bicubic2d", "upsample_bilinear2d",
         "upsample_nearest2d", "upsample_nearest1d", "upsample_linear1d", "_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa",
         "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "upsample_trilinear3d"),
        resize,
    ),
}  # fmt: skip
