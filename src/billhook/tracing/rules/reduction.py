"""Ops that take a dimension away, norms over dimensions, and ops that work along one."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from billhook.tracing.axes import Axis, mark, notes_of, product, split
from billhook.tracing.rules.elementwise import elementwise
from billhook.tracing.rules.movement import ranked
from billhook.tracing.tape import Tape, axes_of, broadcast, join, note, put, tensors

NORMS = {"mean", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm"}
INDICES = {"max", "min", "median", "mode"}  # of those that also say where


def reduction(tape: Tape, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - any reduction
    """Removes a dimension; in whatever order its indices stood, the result is the same."""
    if args and isinstance(args[0], Tensor):
        elementwise(tape, out, x, *args, **kwargs)  # max(x, y)
        return
    dims = _dims(tape.op, x.dim(), args, kwargs)
    axes = axes_of(x)
    for d in dims:
        mark(axes[d], "normed" if tape.op in NORMS or note(x).squared else "reduced", tape.op)
    for result in tensors(out):
        kept = [Axis(1) if d in dims else axis for d, axis in enumerate(axes) if result.dim() == x.dim() or d not in dims]
        indices = tape.op in ("argmax", "argmin") or (isinstance(out, tuple) and result is out[-1] and tape.op in INDICES)
        for d in dims if indices else ():
            ranked(axes[d])
        put(result, kept, [x], points=product(axes[d] for d in sorted(dims)) if indices else None)


def distance(tape: Tape, out: Tensor, x: Tensor, y: Tensor, *args: Any) -> None:  # noqa: ANN401 - how it is reduced, and more
    """Compares two tensors in a loss, entry by entry or as one number."""
    axes = broadcast(np.broadcast_shapes(x.shape, y.shape), [x, y])
    if out.dim() != len(axes):
        for axis in axes:
            mark(axis, "reduced", tape.op)
    put(out, axes if out.dim() == len(axes) else [], [x, y])


def _dims(op: str, rank: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """Returns the dimensions that are removed; all of them where none is named."""
    dim = kwargs.get("dim")
    if dim is None:  # norms take their order before the dimensions, as a plain number
        numbers = [a for a in args if not isinstance(a, bool | float) and a is not None]
        lists = [a for a in numbers if isinstance(a, list | tuple)]
        dim = lists[0] if lists else numbers[0] if numbers and op not in ("norm", "linalg_vector_norm") else None
    if dim is None or dim == []:
        return set(range(rank))
    return {d % max(rank, 1) for d in ([dim] if isinstance(dim, int) else dim)}


def softmax(tape: Tape, out: Tensor, x: Tensor, dim: int, *args: Any) -> None:  # noqa: ANN401 - dtype
    """Weighs entries so that they sum to one along a dimension."""
    mark(axes_of(x)[dim], "softmax", tape.op)
    put(out, axes_of(x), [x])


def layer_norm(
    tape: Tape, out: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *args: Any  # noqa: ANN401
) -> None:  # fmt: skip
    """Normalises and scales the last dimensions."""
    for i in range(1, len(shape) + 1):
        mark(axes_of(x)[-i], "normed", tape.op)
        for parameter in (weight, bias):
            if isinstance(parameter, Tensor):
                join(axes_of(parameter)[-i], axes_of(x)[-i])
    put(tensors(out)[0], axes_of(x), tensors((x, weight, bias)))


def group_norm(
    tape: Tape, out: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hw: int, groups: int, eps: float  # noqa: ANN401
) -> None:  # fmt: skip
    """Channels in consecutive groups of a fixed number, each normalised by itself."""
    _scale(x, weight, bias)
    outer, _ = split(axes_of(x)[1], groups)
    mark(product(outer), "fixed", "the groups of a group norm")
    mark(axes_of(x)[1], "normed", tape.op)
    put(tensors(out)[0], axes_of(x), tensors((x, weight, bias)))


def batch_norm(tape: Tape, out: Any, x: Tensor, *parameters: Any, **kwargs: Any) -> None:  # noqa: ANN401 - several overloads
    """Normalises each channel by itself, with weight, bias and running statistics of its own."""
    _scale(x, *tensors(parameters))
    put(tensors(out)[0], axes_of(x), [x, *tensors(parameters)])


def _scale(x: Tensor, *parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            join(axes_of(parameter)[0], axes_of(x)[1])


def weight_norm(tape: Tape, out: Any, v: Tensor, g: Tensor, dim: int = 0) -> None:  # noqa: ANN401 - two tensors
    """Makes a weight of direction times length."""
    for d in range(v.dim()):
        if g.shape[d] == v.shape[d]:
            join(axes_of(v)[d], axes_of(g)[d])
        else:
            mark(axes_of(v)[d], "normed", tape.op)
    put(tensors(out)[0], axes_of(v), [v, g])


def ordered(tape: Tape, out: Any, x: Tensor, dim: int | Sequence[int] = -1, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    """Runs along dimensions in their order."""
    axes = axes_of(x)
    for d in [dim] if isinstance(dim, int) else dim:
        mark(axes[d], "const", f"its order matters to {tape.op}")
    for result in tensors(out):
        kept = [axis if axis.size == n else Axis(n, notes=notes_of(axis)) for axis, n in zip(axes, result.shape, strict=True)]
        put(result, kept, [x])


RULES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "any", "all", "var_mean", "norm", "prod",
         "linalg_vector_norm", "logsumexp", "count_nonzero", "nansum", "_is_all_true", "_is_any_true"),
        reduction,
    ),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax"), softmax),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layer_norm),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "_batch_norm_no_update",
         "cudnn_batch_norm", "batch_norm"),
        batch_norm,
    ),
    **dict.fromkeys(("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
                     "binary_cross_entropy_with_logits"), distance),
    "native_group_norm": group_norm,
    "_weight_norm_interface": weight_norm,
    **dict.fromkeys(
        ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "_fft_r2c", "_fft_c2c", "_fft_c2r"), ordered
    ),
}  # fmt: skip
