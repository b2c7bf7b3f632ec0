"""Prunable linears, convolutions and what adapters are on: the matrices that criteria are for, and how they lie in memory."""

import math
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper


Convolutions = Literal["mixing", "all", "none"]
"""Which convolutions are pruned: those of which an output reads `MIXING` channels or more, all, or none."""

Convolution = nn.Conv1d | nn.Conv2d

MIXING = 4
"""The fewest channels that an output of a mixing convolution reads: depthwise ones read one; patch embeddings and stems, which
read pixels or a waveform, three at most."""


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d]:
    """Tells whether a module is a plain `nn.Conv1d` or `nn.Conv2d`: with a weight of its own, and torch's own forward.

    One that standardises its weight or pads in its own way computes with other weights or patches than are seen here.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or module._parameters.get("weight") is None:
        return False
    plain = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    return type(module).forward is plain.forward and type(module)._conv_forward is plain._conv_forward


def is_among(convolution: nn.Conv1d | nn.Conv2d, which: Convolutions) -> bool:
    """Tells whether a convolution is among those that are pruned."""
    return which == "all" or (which == "mixing" and channels_of(convolution) >= MIXING)


def channels_of(convolution: nn.Conv1d | nn.Conv2d) -> int:
    """Returns how many channels an output of a convolution reads."""
    return convolution.in_channels // convolution.groups


def as_tensor(convolution: nn.Conv1d | nn.Conv2d, matrix: Tensor) -> Tensor:
    """Turns `[out, in]`, or `[out, *taps, channels]`, into what lies in memory: `[out, channels, *taps]`."""
    return matrix.reshape(len(matrix), *convolution.kernel_size, channels_of(convolution)).movedim(-1, 1).contiguous()


def batched(convolution: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """Returns the inputs of a convolution as `[batch, channels, *size]`, as it may also be given a single image."""
    return inputs if inputs.dim() == len(convolution.kernel_size) + 2 else inputs[None]


def output_positions(convolution: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> torch.Size:
    """Returns the batch size and how many outputs there are along each dimension, of inputs `[batch, channels, *size]`."""
    shape = _windows(convolution, inputs.new_empty(inputs.shape, device="meta")).shape
    return shape[:1] + shape[2 : inputs.dim()]


def patches(convolution: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """Returns what each output reads of inputs `[batch, channels, *size]`, its channels innermost, as in `weight_of`.

    Returns:
        `[batch, *places, in_features]`, and of a grouped convolution `[batch, *places, groups, in_features]`.
    """
    windows, places = _windows(convolution, inputs), inputs.dim() - 2
    apart = windows.reshape(len(windows), convolution.groups, channels_of(convolution), *windows.shape[2:])
    read = apart.movedim(1, 2 + places).movedim(1, -1).flatten(2 + places)
    return read if convolution.groups > 1 else read.squeeze(-2)


def _windows(convolution: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """Returns a view of the padded inputs, `[batch, channels, *places, *taps]`."""
    mode = convolution.padding_mode
    padding = convolution._reversed_padding_repeated_twice  # also where it is given as "same"
    windows = pad(inputs, padding, "constant" if mode == "zeros" else mode)
    every = zip(convolution.kernel_size, convolution.stride, convolution.dilation, strict=True)
    for dim, (taps, stride, dilation) in enumerate(every, 2):
        windows = windows.unfold(dim, dilation * (taps - 1) + 1, stride)[..., ::dilation]
    return windows


def is_adapter(module: object) -> TypeGuard["BaseTunerLayer"]:
    """Tells whether a module holds a layer of the model, and adapters to it; as long as nobody has imported peft, none does."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def is_trained_copy(module: object) -> TypeGuard["AuxiliaryTrainingWrapper"]:
    """Tells whether a module holds one of the model, and a copy that is trained instead (`modules_to_save`)."""
    if "peft" not in sys.modules:
        return False
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, AuxiliaryTrainingWrapper)


def base_of(module: "BaseTunerLayer") -> nn.Module:
    """Returns the model's own layer beneath all adapters; some layers of peft have a `get_base_layer` that returns another."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer.get_base_layer(module)


def active_in(layer: Any) -> list[str]:  # noqa: ANN401 - PEFT does not type its layers
    """Lists the adapters with which a layer of LoRA computes now."""
    return [] if layer.disable_adapters else [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


PACKED = ("qweight", "weight_packed", "W_q")
"""What quantised layers that are no `nn.Linear` call their weight (GPTQ and AWQ, compressed-tensors, HQQ)."""

NEW = "_billhook_new"
"""The attribute of modules whose values were in no checkpoint, as a task has added them."""

CLASSIFIERS = ("Classification", "QuestionAnswering", "MultipleChoice")
"""What the names of classes say whose output is of a few classes, or places, that training of one's own begins with."""

PRUNED = 0.01
"""The share of zeros from which on a weight counts as pruned: rounding leaves a few zeros in one that never was."""


def prunable(module: nn.Module, output_embeddings: bool = False, convolutions: Convolutions = "mixing") -> dict[str, nn.Module]:
    """Finds the linear layers of a module tree, by name: `nn.Linear`, transformers' `Conv1D`, and what PEFT has put adapters on.

    Convolutions, `nn.Conv1d` and `nn.Conv2d`, are found too: by default those of which an output reads four channels or more, so
    neither depthwise ones nor patch embeddings and stems, which read pixels; never one with a forward of its own.

    Left out, unless asked for, are the output embedding (what `get_output_embeddings` of a model in the tree returns, or a linear
    whose weight is an embedding's), the head of a classifier, and a pooler that no checkpoint had values for. Left out anyway are
    embeddings, PEFT's own matrices, and modules that PEFT trains as a whole copy (`modules_to_save`). A weight that several share
    comes once; under an adapter it is the base layer, by the name of the whole. A weight that is quantised, or that a linear
    computes from other tensors, is refused.

    >>> list(prunable(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))))
    ['1']
    """
    left_out = set() if output_embeddings else _output_embeddings(module) | _heads(module)
    linears: dict[str, nn.Module] = {}
    weights: set[int] = set()
    for name, part in _walk(module, "", left_out):
        if is_packed(part):
            raise ValueError(f"{name} is quantised ({type(part).__name__}): prune the model before it is quantised")
        if _is_among(part, convolutions) and id(part.weight) not in left_out | weights:
            _check_plain(name, part)
            weights.add(id(part.weight))
            linears[name] = part
    return linears


def is_pruned(zeros: int, weights: int) -> bool:
    """Tells whether a linear counts as pruned, so many of whose weights are zero."""
    return zeros >= max(1, PRUNED * weights)


def is_packed(module: nn.Module) -> bool:
    """Tells whether a module is a quantised layer that keeps its weight under another name, torch.ao's among them."""
    return any(key in module._parameters or key in module._buffers for key in PACKED) or hasattr(module, "_packed_params")


def is_quantized(tensor: Tensor) -> bool:
    """Tells whether a tensor holds anything but floating-point numbers of 16 bits or more: those of 8 bits need their scales."""
    plain = type(tensor.data) in (Tensor, DTensor) and tensor.is_floating_point()
    return not plain or tensor.itemsize < torch.bfloat16.itemsize


def is_linear(module: nn.Module) -> bool:
    """Tells whether a module is a plain linear or GPT-2's transposed one."""
    return isinstance(module, nn.Linear | Conv1D)


def read_dim(reader: nn.Module) -> int:
    """Returns the dimension of its input that a module reads: the last, of a convolution the channels, which precede places."""
    layer = reader.get_base_layer() if is_adapter(reader) else reader
    return -1 - len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else -1


def find_tied(model: nn.Module, linears: Mapping[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Finds the other linears of a model that have the weight of one of these, each by its name."""
    names, known = {id(linear.get_parameter("weight")): name for name, linear in linears.items()}, set(linears.values())
    others = [module for module in model.modules() if _is_among(module, "all") and module not in known]
    return [(names[weight], module) for module in others if (weight := id(module._parameters.get("weight"))) in names]


def to_layout(linear: nn.Module, matrix: Tensor) -> Tensor:
    """Turns a matrix `[out, in]` to how the weight of a linear lies in memory; of all but convolutions also back."""
    if is_convolution(linear):
        return as_tensor(linear, matrix)
    return matrix.t() if isinstance(linear, Conv1D) else matrix


def weight_view(linear: nn.Module) -> Tensor:
    """Returns the weight as `[out, in]`, of a convolution as `[out, *taps, channels]`: a view of its memory; may be sharded."""
    weight = linear.get_parameter("weight").detach()
    return weight.movedim(1, -1) if is_convolution(linear) else to_layout(linear, weight)


def weight_of(linear: nn.Module) -> Tensor:
    """Returns the weight as `[out_features, in_features]`, without gradient; may be sharded.

    A convolution has an input for each tap and channel that an output reads, channels innermost, so that patterns N:M are along
    channels. Its matrix may be a copy; that of all others is a view of the layer's own memory.
    """
    return weight_view(linear).flatten(1)


def adjacent_inputs(linear: nn.Module) -> int:
    """Returns how many inputs of a linear are next to each other, for patterns N:M: of a convolution the channels of one tap."""
    return channels_of(linear) if is_convolution(linear) else size_of(linear)[1]


def size_of(linear: nn.Module) -> tuple[int, int]:
    """Returns the size of what `weight_of` returns, also where the weight is not there."""
    rows, *columns = linear.get_parameter("weight").shape
    return (math.prod(columns), rows) if isinstance(linear, Conv1D) else (rows, math.prod(columns))


def matrix_of(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns the weight as `[out_features, in_features]`, and the bias."""
    bias = linear._parameters.get("bias")
    return weight_of(linear), None if bias is None else bias.detach()


def to_parameters(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Returns the parameters of a linear, by their name in it, of a matrix `[out_features, in_features]` and a bias."""
    parameters = {"weight": to_layout(linear, weight)} | ({} if bias is None else {"bias": bias})
    return {name: value.to(linear.get_parameter(name)).contiguous() for name, value in parameters.items()}


def _is_among(module: nn.Module, convolutions: Convolutions) -> bool:
    """Tells whether a module is a linear, or among the convolutions that are taken for one."""
    return is_among(module, convolutions) if is_convolution(module) else is_linear(module)


def _walk(module: nn.Module, name: str, left_out: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yields every module; of those that PEFT wraps only the base layer, under the name of the whole."""
    if id(module) in left_out or is_trained_copy(module):
        return
    if is_adapter(module):
        yield from _walk(base_of(module), name, left_out)
        return
    yield name, module
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, left_out)


def _output_embeddings(module: nn.Module) -> set[int]:
    """Returns the identities of output embeddings, of their weights, and of the weights of embeddings."""
    identities = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    for part in module.modules():
        get = getattr(part, "get_output_embeddings", None)
        output = get() if callable(get) else None
        if isinstance(output, nn.Module):
            identities |= {id(output), *(id(parameter) for parameter in output.parameters())}
    return identities


def _heads(module: nn.Module) -> set[int]:
    """Returns the identities of what classifiers have beside their base model, and of what is new in a model."""
    identities = {id(part) for part in module.modules() if hasattr(part, NEW)}
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and any(kind in type(part).__name__ for kind in CLASSIFIERS):
            body = [child for child in part.children() if child is part.base_model or isinstance(child, PreTrainedModel)]
            identities |= {id(child) for child in part.children() if body and child not in body}
    return identities


def _check_plain(name: str, linear: nn.Module) -> None:
    """Refuses a weight that is not simply a matrix of floating-point numbers."""
    weight = linear._parameters.get("weight")
    if weight is None:
        raise ValueError(f"the weight of {name} is no parameter but computed (a parametrization?): make it one first")
    kind = f"{type(linear).__name__}, {type(weight.data).__name__} of {weight.dtype}"
    if weight.layout is not torch.strided:
        raise ValueError(f"{name}.weight is sparse ({weight.layout}): make it dense first, as by to_dense()")
    if is_quantized(weight):
        raise ValueError(f"{name} is quantised ({kind}): prune the model before it is quantised")
