"""Rules of elementwise operations, factories, reductions, norms, and scans."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.tracing.axes import Axis, mark, notes_of, product, split
from billhook.tracing.rules.movement import Rules, mark_ranked
from billhook.tracing.tape import (
    ActivationProduct,
    Tape,
    apply_pending,
    as_sets,
    axes_of,
    broadcast,
    join,
    mark_units,
    merge_sources,
    note,
    record,
    tensor_args,
    tensors,
)

NONLINEAR = {
    "celu", "elu", "erf", "expm1", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid_forward", "mish",
    "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "tanh", "_prelu_kernel", "threshold",
}  # fmt: skip
KEEPS_INDICES = {"_to_copy", "clone", "copy", "detach", "alias", "lift", "contiguous", "where", "masked_fill"}
CLAMPS = {"clamp", "clamp_min", "clamp_max"}
COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}  # as in the module `operator`
UNTAGGED = {"floor_divide", "remainder", "fmod", "polar", "complex", "native_dropout", "bernoulli_", "uniform_", "normal_",
            "addcmul", "addcdiv", "lerp", "angle", "real", "imag", "logaddexp", "copysign"}  # fmt: skip


def elementwise(tape: Tape, out: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - any op
    """Joins the axes of equal positions, aligned from the right."""
    inputs = list(tensor_args(args, kwargs))
    name = tape.op.removesuffix("_")
    for result in tensors(out):
        axes = broadcast(result.shape, inputs)
        points = _points(name, result, inputs, args)
        for tensor in inputs:
            apply_pending(note(tensor), note(tensor).points)
        new = record(result, axes, inputs, points, applied=True)
        new.squared = name in ("pow", "square")
        if new.active and (name in NONLINEAR or (name == "mul" and _record_product(tape, inputs))):
            new.bent = True
            mark_units(axes, "bent", tape.op)
        if name == "add" and len(inputs) == 2:
            left, right = map(note, inputs)
            is_product = any(rows.exact for rows in (*left.sources.values(), *right.sources.values()))
            if left.active and right.active and is_product and left.sources.keys() != right.sources.keys():
                mark_units(axes[-1:] if result.dim() < 4 else axes, "added", "a residual stream")


def _points(op: str, out: Tensor, inputs: list[Tensor], args: tuple[Any, ...]) -> Axis | None:
    """Returns the axis that the result indexes; marks axes whose indices are used as values."""
    pointing = [known.points for known in map(note, inputs) if known.points is not None]
    if not pointing:
        return None
    first, *others = pointing
    is_integer = not out.dtype.is_floating_point and out.dtype != torch.bool
    same_size = len(set(map(operator.attrgetter("size"), pointing))) == 1
    if op in CLAMPS and is_integer and _harmless(op, first.size, *args[1:]):
        return first
    if op in KEEPS_INDICES and is_integer and same_size and not any(_may_point(x, first.size) for x in (*inputs, *args)):
        for other in others:
            first = join(first, other)
        return first
    if op in ("eq", "ne") and len(others) == 1 and same_size:
        join(first, others[0])
        return None
    if op in COMPARISONS and len(inputs) == 1 and _same_for_all(op, first.size, args[-1]):
        return None
    for axis in pointing:
        mark(axis, "const", f"its numbers are used as values by {op}")
    return None


def _may_point(x: Any, size: int) -> bool:  # noqa: ANN401 - an argument
    """Returns whether a plain argument next to indices may be mistaken for an index."""
    if isinstance(x, Tensor):
        if x.dtype == torch.bool or note(x).points is not None:
            return False
        value = note(x).value
        return value is None or bool(((value >= 0) & (value < size)).any())
    return isinstance(x, int | float) and 0 <= x < size


def _same_for_all(op: str, size: int, number: float) -> bool:
    """Returns whether a comparison with a number is the same for every index."""
    if op in ("eq", "ne"):
        return not 0 <= number < size
    compare = getattr(operator, op)
    return bool(compare(0, number) == compare(size - 1, number))


def _harmless(op: str, size: int, *bounds: Any) -> bool:  # noqa: ANN401 - a number, a tensor or None
    """Returns whether bounds leave every index unchanged."""
    low, high = (*bounds, None)[:2] if op != "clamp_max" else (None, bounds[0])
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return False
    return (low is None or low <= 0) and (high is None or high >= size - 1)


def _record_product(tape: Tape, inputs: list[Tensor]) -> bool:
    """Records the product of two activations from different rows."""
    if len(inputs) != 2 or inputs[0].dim() != inputs[1].dim():
        return False
    left, right = map(note, inputs)
    if not (left.active and right.active and left.sources and right.sources):
        return False
    same = left.sources.keys() == right.sources.keys()
    if same and all(left.sources[k].positions is right.sources[k].positions for k in left.sources):
        return left.bent != right.bent
    tape.products.append(ActivationProduct(left.sources, right.sources, left.axes, right.axes, None, (left.bent, right.bent)))
    return True


def factory(tape: Tape, out: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - any op
    """Creates a tensor with unknown axes, or with those of another tensor."""
    new = record(out, axes_of(args[0]) if tape.op.endswith("_like") else [Axis(n) for n in out.shape], [])
    new.active = True
    new.written_sources = {}


def copy(tape: Tape, out: Tensor, x: Tensor, source: Tensor, *args: Any) -> None:  # noqa: ANN401 - non_blocking
    """Writes into memory, whose sources then include the written tensor's."""
    written = note(x).written_sources
    elementwise(tape, out, x, source)
    if written is not None:
        merge_sources(written, as_sets(note(source).sources))
        note(out).written_sources = written


def constant(tape: Tape, out: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - any op
    """Creates values that differ between indices."""
    notes = {"const": f"its values are a constant of the code ({tape.op})"}
    record(out, [Axis(n, notes=notes) for n in out.shape], []).active = True


def eye(tape: Tape, out: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - any overload
    """Creates an identity matrix: the same axis in both dimensions."""
    if out.shape[0] != out.shape[1]:
        return constant(tape, out)
    axis = Axis(out.shape[0])
    record(out, [axis, axis], []).active = True
    return None


def arange(tape: Tape, out: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - any overload
    """Counts 0, 1, 2, ...: values that index their own axis. Other ranges are constants."""
    start, step = (args[0], args[2] if len(args) > 2 else 1) if len(args) > 1 else (0, 1)
    if (start, step) != (0, 1) or out.dtype.is_floating_point:
        return constant(tape, out)
    axis = Axis(out.shape[0])
    record(out, [axis], [], points=axis).active = True
    return None


def compare(tape: Tape, out: Tensor, x: Tensor, others: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - any op
    """Compares every entry with all of some others, which are sorted for bucketize."""
    if tape.op == "bucketize":
        mark(product(axes_of(others)), "const", f"its order matters to {tape.op}")
    record(out, axes_of(x), [x, others])


def triangle(tape: Tape, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - any op
    """Keeps or drops an entry by its position."""
    elementwise(tape, out, x)
    for axis in note(out).axes[-2:]:
        mark(axis, "const", f"its order decides what {tape.op} keeps")


NORMS = {"mean", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm"}
INDICES = {"max", "min", "median", "mode"}  # reductions that also return indices


def reduction(tape: Tape, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - any reduction
    """Removes dimensions; the order of their indices does not matter."""
    if args and isinstance(args[0], Tensor):
        elementwise(tape, out, x, *args, **kwargs)  # max(x, y)
        return
    axes = axes_of(x)
    dim = kwargs.get("dim")
    if dim is None:
        # the first argument of these is the order of the norm
        rest = args[1:] if tape.op in ("norm", "linalg_vector_norm", "linalg__powsum") else args
        dim = next((a for a in rest if isinstance(a, int | list | tuple) and not isinstance(a, bool)), None)
    named = range(x.dim()) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    dims = {d % max(x.dim(), 1) for d in named}
    for d in dims:
        mark(axes[d], "normed" if tape.op in NORMS or note(x).squared else "reduced", tape.op)
    for result in tensors(out):
        kept = [Axis(1) if d in dims else axis for d, axis in enumerate(axes) if result.dim() == x.dim() or d not in dims]
        indices = tape.op in ("argmax", "argmin") or (isinstance(out, tuple) and result is out[-1] and tape.op in INDICES)
        for d in dims if indices else ():
            mark_ranked(axes[d])
        record(result, kept, [x], points=product(axes[d] for d in sorted(dims)) if indices else None)


def distance(tape: Tape, out: Tensor, x: Tensor, y: Tensor, *args: Any) -> None:  # noqa: ANN401 - how it is reduced, and more
    """Compares two tensors in a loss, entry by entry or reduced to a number."""
    axes = broadcast(np.broadcast_shapes(x.shape, y.shape), [x, y])
    if out.dim() != len(axes):
        for axis in axes:
            mark(axis, "reduced", tape.op)
    record(out, axes if out.dim() == len(axes) else [], [x, y])


def softmax(tape: Tape, out: Tensor, x: Tensor, dim: int, *args: Any) -> None:  # noqa: ANN401 - dtype
    """Normalizes entries along a dimension to a sum of 1."""
    mark(axes_of(x)[dim], "softmax", tape.op)
    record(out, axes_of(x), [x])


def layer_norm(
    tape: Tape, out: Any, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *args: Any  # noqa: ANN401
) -> None:  # fmt: skip
    """Normalizes and scales the last dimensions."""
    for i in range(1, len(shape) + 1):
        mark(axes_of(x)[-i], "normed", tape.op)
        for parameter in (weight, bias):
            if isinstance(parameter, Tensor):
                join(axes_of(parameter)[-i], axes_of(x)[-i])
    record(tensors(out)[0], axes_of(x), tensors((x, weight, bias)))


def group_norm(
    tape: Tape, out: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hw: int, groups: int, eps: float  # noqa: ANN401
) -> None:  # fmt: skip
    """Normalizes consecutive groups of channels separately."""
    _scale(x, weight, bias)
    outer, _ = split(axes_of(x)[1], groups)
    mark(product(outer), "fixed", "the groups of a group norm")
    mark(axes_of(x)[1], "normed", tape.op)
    record(tensors(out)[0], axes_of(x), tensors((x, weight, bias)))


def batch_norm(tape: Tape, out: Any, x: Tensor, *parameters: Any, **kwargs: Any) -> None:  # noqa: ANN401 - several overloads
    """Normalizes each channel by itself, with its own parameters and statistics."""
    _scale(x, *tensors(parameters))
    record(tensors(out)[0], axes_of(x), [x, *tensors(parameters)])


def _scale(x: Tensor, *parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            join(axes_of(parameter)[0], axes_of(x)[1])


def weight_norm(tape: Tape, out: Any, v: Tensor, g: Tensor, dim: int = 0) -> None:  # noqa: ANN401 - two tensors
    """Computes a weight from direction and length."""
    for d in range(v.dim()):
        if g.shape[d] == v.shape[d]:
            join(axes_of(v)[d], axes_of(g)[d])
        else:
            mark(axes_of(v)[d], "normed", tape.op)
    record(tensors(out)[0], axes_of(v), [v, g])


def ordered(tape: Tape, out: Any, x: Tensor, dim: int | Sequence[int] = -1, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    """Accumulates or transforms along dimensions, whose order matters."""
    axes = axes_of(x)
    for d in [dim] if isinstance(dim, int) else dim:
        mark(axes[d], "const", f"its order matters to {tape.op}")
    for result in tensors(out):
        kept = [axis if axis.size == n else Axis(n, notes=notes_of(axis)) for axis, n in zip(axes, result.shape, strict=True)]
        record(result, kept, [x])


RULES: Rules = {
    **dict.fromkeys(
        ("_to_copy", "masked_fill_", "masked_fill", "fill_", "zero_", "clone", "detach", "alias", "contiguous",
         *NONLINEAR, *UNTAGGED, "_conj", "conj", "lift", "lift_fresh_copy", "resolve_conj", "view_as_real_copy"),
        elementwise,
    ),
    **dict.fromkeys(
        ("empty", "zeros", "ones", "full", "new_empty", "new_zeros", "new_ones", "new_full", "scalar_tensor", "rand", "randn",
         "empty_strided", "new_empty_strided", "bernoulli", "randint", "_efficientzerotensor",
         "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
        factory,
    ),
    **dict.fromkeys(("linspace", "logspace", "lift_fresh", "hann_window", "tril_indices", "triu_indices"), constant),
    **dict.fromkeys(("copy_", "copy"), copy),
    "arange": arange,
    "eye": eye,
    "bucketize": compare,
    "isin": compare,
    "tril": triangle,
    "triu": triangle,
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
