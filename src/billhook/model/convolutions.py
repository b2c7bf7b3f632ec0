"""Convolutions as linears (im2col): a row of the weight for each output, over the patch of taps and channels that it reads."""

from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

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


def places_of(convolution: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> torch.Size:
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
