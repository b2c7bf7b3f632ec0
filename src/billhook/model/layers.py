"""Prunable linear layers and convolutions: their matrices and memory layouts."""

import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.engine import ModulesByName
from billhook.model.experts import ExpertLinear, expert_layers, holder_of

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper


Convolutions = Literal["mixing", "all", "none"]  # convolutions to prune: with at least `MIXING` channels per output, all, or none
Convolution = nn.Conv1d | nn.Conv2d
MIXING = 4
"""Minimum of channels per output of a mixing convolution. Depthwise convolutions have one, and patch embeddings and stems, which
take pixels or a waveform, at most three."""


def is_convolution(module: nn.Module) -> TypeGuard[Convolution]:
    """Returns whether a module is an `nn.Conv1d` or `nn.Conv2d` with torch's forward.

    A convolution that standardizes its weight or has custom padding would compute with other weights or inputs.
    """
    if not isinstance(module, Convolution) or module._parameters.get("weight") is None:
        return False
    plain = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    return type(module).forward is plain.forward and type(module)._conv_forward is plain._conv_forward


def channels_of(convolution: Convolution) -> int:
    """Returns the number of channels per output of a convolution."""
    return convolution.in_channels // convolution.groups


def batched(convolution: Convolution, inputs: Tensor) -> Tensor:
    """Returns inputs of a convolution as `[batch, channels, *size]`, also for a single image."""
    return inputs if inputs.dim() == len(convolution.kernel_size) + 2 else inputs[None]


def output_positions(convolution: Convolution, inputs: Tensor) -> torch.Size:
    """Returns the batch size and output size of a convolution for its inputs."""
    shape = _windows(convolution, inputs.new_empty(inputs.shape, device="meta")).shape
    return shape[:1] + shape[2 : inputs.dim()]


def patches(convolution: Convolution, inputs: Tensor) -> Tensor:
    """Returns the patches that each output uses, with channels innermost as in `weight_of`.

    Inputs are `[batch, channels, *size]`.

    Returns:
        `[batch, *positions, in_features]`, and for a grouped convolution `[batch, *positions, groups, in_features]`.
    """
    windows, positions = _windows(convolution, inputs), inputs.dim() - 2
    by_group = windows.reshape(len(windows), convolution.groups, channels_of(convolution), *windows.shape[2:])
    flat = by_group.movedim(1, 2 + positions).movedim(1, -1).flatten(2 + positions)
    return flat if convolution.groups > 1 else flat.squeeze(-2)


def _windows(convolution: Convolution, inputs: Tensor) -> Tensor:
    """Returns a view of the padded inputs, `[batch, channels, *positions, *kernel]`."""
    mode = convolution.padding_mode
    padding = convolution._reversed_padding_repeated_twice  # also where it is given as "same"
    windows = pad(inputs, padding, "constant" if mode == "zeros" else mode)
    every = zip(convolution.kernel_size, convolution.stride, convolution.dilation, strict=True)
    for dim, (kernel, stride, dilation) in enumerate(every, 2):
        windows = windows.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return windows


def is_adapter(module: object) -> TypeGuard["BaseTunerLayer"]:
    """Returns whether a module wraps a layer with PEFT adapters."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def is_trained_copy(module: object) -> TypeGuard["AuxiliaryTrainingWrapper"]:
    """Returns whether a module wraps another with a trained copy (`modules_to_save`)."""
    if "peft" not in sys.modules:
        return False
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, AuxiliaryTrainingWrapper)


def base_of(module: "BaseTunerLayer") -> nn.Module:
    """Returns the model's own layer beneath all adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer.get_base_layer(module)


def active_in(layer: Any) -> list[str]:  # noqa: ANN401 - PEFT does not type its layers
    """Lists the active adapters of a LoRA layer."""
    return [] if layer.disable_adapters else [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


PACKED = ("qweight", "weight_packed", "W_q")
"""Weight names of quantized layers other than `nn.Linear` (GPTQ and AWQ, compressed-tensors, HQQ)."""
NEW = "_billhook_new"  # attribute of modules that were not in the checkpoint, such as a new task head
CLASSIFIERS = ("Classification", "QuestionAnswering", "MultipleChoice")
"""Parts of the names of model classes with a classification head."""
PRUNED = 0.01  # minimum sparsity of a pruned weight; rounding leaves a few zeros in dense weights


def prunable(module: nn.Module, output_embeddings: bool = False, convolutions: Convolutions = "mixing") -> dict[str, nn.Module]:
    """Finds the prunable linear layers and convolutions of a module, by name.

    By default, convolutions with fewer than four channels per output are excluded, such as depthwise convolutions, patch
    embeddings, and stems. Convolutions with a custom forward are never included.

    Unless `output_embeddings` is True, the output embedding (from `get_output_embeddings`, or with an embedding's weight), a
    classification head, and a pooler that was not in the checkpoint are excluded. Embeddings, PEFT matrices, and trained copies
    of PEFT (`modules_to_save`) are always excluded. A shared weight is listed once. Under an adapter, the base layer is listed by
    the name of the wrapped layer. Matrices of experts are listed within `expert_layers`. Quantized and computed weights raise.

    >>> list(prunable(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))))
    ['1']
    """
    left_out = set() if output_embeddings else _outputs(module)
    linears = {}
    weights = set()
    for name, part in _walk(module, "", left_out):
        if is_packed(part):
            raise ValueError(f"{name} is quantized ({type(part).__name__}). Prune the model before it is quantized.")
        holder, attribute = holder_of(part)
        weight = holder._parameters.get(attribute)
        if _is_among(part, convolutions) and id(weight) not in left_out and _identity(part) not in weights:
            if weight is None:
                raise ValueError(f"the weight of {name} is computed, such as by a parametrization. Make it a parameter first.")
            kind = f"{type(part).__name__}, {type(weight.data).__name__} of {weight.dtype}"
            if weight.layout is not torch.strided:
                raise ValueError(f"{name}.weight has the sparse layout {weight.layout}. Convert it with to_dense() first.")
            if is_quantized(weight):
                raise ValueError(f"{name} is quantized ({kind}). Prune the model before it is quantized.")
            weights.add(_identity(part))
            linears[name] = part
    return linears


def weight_holders(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Returns where each prunable weight is, by layer, or by stack of experts."""
    with expert_layers(model):
        linears = prunable(model, output_embeddings=True, convolutions="all")
    return {stored_name(name, linear): holder_of(linear) for name, linear in linears.items()}


def is_pruned(zeros: int, weights: int) -> bool:
    """Returns whether a layer with this many zeros counts as pruned."""
    return zeros >= max(1, PRUNED * weights)


def sparse_support(weight: Tensor) -> Tensor | None:
    """Returns the mask of nonzero weights of a pruned weight, bool, or None.

    In a weight that is not pruned, single zeros need not stay.
    """
    support = weight != 0
    return support if is_pruned(int((~support).sum()), support.numel()) else None


def is_packed(module: nn.Module) -> bool:
    """Returns whether a quantized layer keeps its weight under another name."""
    return any(key in module._parameters or key in module._buffers for key in PACKED) or hasattr(module, "_packed_params")


def is_quantized(tensor: Tensor) -> bool:
    """Returns whether a tensor is not floating point with at least 16 bits."""
    plain = type(tensor.data) in (Tensor, DTensor) and tensor.is_floating_point()
    return not plain or tensor.itemsize < torch.bfloat16.itemsize


def is_linear(module: nn.Module) -> bool:
    """Returns whether a module is an `nn.Linear` or `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D)


def read_dim(reader: nn.Module) -> int:
    """Returns the input dimension that a consumer layer reads: the last, or channels."""
    layer = reader.get_base_layer() if is_adapter(reader) else reader
    return -1 - len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else -1


def find_tied(model: nn.Module, linears: ModulesByName) -> list[tuple[str, nn.Module]]:
    """Finds other layers with the weight of a listed layer, with its name."""
    names, listed = {_identity(linear): name for name, linear in linears.items()}, set(linears.values())
    others = [module for module in model.modules() if module not in listed and _is_among(module, "all")]
    return [(names[_identity(module)], module) for module in others if _identity(module) in names]


def to_layout(linear: nn.Module, matrix: Tensor) -> Tensor:
    """Converts a matrix `[out, in]` to the memory layout of a layer."""
    if is_convolution(linear):
        return matrix.reshape(len(matrix), *linear.kernel_size, channels_of(linear)).movedim(-1, 1).contiguous()
    return matrix.t() if isinstance(linear, Conv1D) else matrix


def weight_view(linear: nn.Module) -> Tensor:
    """Returns a view of the weight, `[out, in]` or `[out, *kernel, channels]`."""
    weight = linear.get_parameter("weight").detach()
    return weight if isinstance(linear, ExpertLinear) else view_in(linear, weight)


def view_in(linear: nn.Module, stored: Tensor) -> Tensor:
    """Returns a view as `weight_view`, of a tensor like the parameter with the weight."""
    if isinstance(linear, ExpertLinear):
        return linear.of_stack(stored)
    return stored.movedim(1, -1) if is_convolution(linear) else to_layout(linear, stored)


def stored_name(name: str, linear: nn.Module) -> str:
    """Returns the name of a layer, or of the parameter that stacks it with other experts."""
    return linear.stacked(name) if isinstance(linear, ExpertLinear) else name


def weight_of(linear: nn.Module) -> Tensor:
    """Returns the weight as `[out_features, in_features]`, without gradient.

    Convolutions have an input for each kernel position and channel, channels innermost, so N:M patterns are along channels. Their
    matrix may be a copy. For linear layers it is a view.
    """
    return weight_view(linear).flatten(1)


def adjacent_inputs(linear: nn.Module) -> int:
    """Returns the number of contiguous inputs for N:M patterns."""
    return channels_of(linear) if is_convolution(linear) else size_of(linear)[1]


def size_of(linear: nn.Module) -> tuple[int, int]:
    """Returns the size of `weight_of`, also without values."""
    if isinstance(linear, ExpertLinear):  # without a view, as slices of a sharded parameter are collectives
        return linear.out_features, linear.in_features
    rows, *columns = linear.get_parameter("weight").shape
    return (math.prod(columns), rows) if isinstance(linear, Conv1D) else (rows, math.prod(columns))


def matrix_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns the weight as `[out_features, in_features]`, and the bias."""
    bias = cast(Tensor | None, linear.bias)
    return weight_of(linear), None if bias is None else bias.detach()


def to_parameters(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Returns the parameters of a layer from a matrix `[out, in]` and a bias."""
    parameters = {"weight": to_layout(linear, weight)} | ({} if bias is None else {"bias": bias})
    return {name: value.to(linear.get_parameter(name)).contiguous() for name, value in parameters.items()}


def _identity(layer: nn.Module) -> tuple[int, int | None]:
    """Returns what layers with one weight have in common: its parameter, and an expert's number."""
    holder, attribute = holder_of(layer)
    return id(holder._parameters.get(attribute)), layer.number if isinstance(layer, ExpertLinear) else None


def _is_among(module: nn.Module, convolutions: Convolutions) -> bool:
    if is_convolution(module):
        return convolutions == "all" or (convolutions == "mixing" and channels_of(module) >= MIXING)
    return is_linear(module)


def _walk(module: nn.Module, name: str, left_out: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yields all modules. For PEFT wrappers, only the base layer with the outer name."""
    if id(module) in left_out or is_trained_copy(module):
        return
    if is_adapter(module):
        yield from _walk(base_of(module), name, left_out)
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, left_out)


def _outputs(module: nn.Module) -> set[int]:
    """Returns the ids of output embeddings, embedding weights, heads, and new modules."""
    identities = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for part in module.modules():
        get = getattr(part, "get_output_embeddings", None)
        output = get() if callable(get) else None
        if isinstance(output, nn.Module):
            identities |= {id(output), *map(id, output.parameters())}
        if hasattr(part, NEW):
            identities.add(id(part))
        if isinstance(part, PreTrainedModel) and any(kind in type(part).__name__ for kind in CLASSIFIERS):
            children = set(part.children())
            body = {child for child in children if child is part.base_model or isinstance(child, PreTrainedModel)}
            identities.update(map(id, children - body) if body else ())
    return identities
