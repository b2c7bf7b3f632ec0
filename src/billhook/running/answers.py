"""What a model answers to small random inputs, to tell whether two ways to compute it are the same."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.running.inputs import make_inputs
from billhook.running.undisturbed import resting


def small_inputs(model: nn.Module) -> dict[str, Any]:
    """What `make_inputs` makes, on the model's device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in make_inputs(model).items()}


@torch.no_grad()
def answer(model: PreTrainedModel) -> list[Tensor]:
    """The tensors of real numbers that a model gives, but for what it gives of each block: float64, on the CPU."""
    with resting(model):
        given = model(**small_inputs(model), return_dict=True)
    values = [value for value in given.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return [value.double().cpu() for value in values]


def alike(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> bool:
    """Whether answers are the same but for rounding."""
    if [value.shape for value in expected] != [value.shape for value in found]:
        return False
    return all(_near(a, b, tolerance) for a, b in zip(expected, found, strict=True))


def tolerance(model: PreTrainedModel) -> float:
    """How far answers may be from each other, relative to their norm; parts of most models are in float32 at best."""
    return min(1000 * max(torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32)), 0.05)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    same = torch.isclose(a, b, rtol=0, atol=0, equal_nan=True)  # also what is not finite
    return bool(torch.where(same, 0, a - b).norm() <= tolerance * a[a.isfinite()].norm())
