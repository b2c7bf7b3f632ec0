"""Widths of experts that the kernel takes by which transformers computes them, unless it is told otherwise."""

from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

from billhook.units.units import Units


def width_step(model: nn.Module, units: Units) -> int:
    """Returns the number that the units must be a multiple of; 1 where no such kernel reads them, or it takes none now."""
    if units.kind not in ("channel", "residual") or not isinstance(model, PreTrainedModel):
        return 1
    for member in units.members:
        module, weight = model.get_submodule(member.name.rpartition(".")[0]), model.get_parameter(member.name)
        if weight.dim() == 3 and {"has_gate", "is_transposed"} <= vars(module).keys():
            step = max(_bytes() // weight.element_size(), 1)
            grouped = model.get_correct_experts_implementation(None) == "grouped_mm"
            return step if grouped and not units.count() % step else 1
    return 1


@cache
def _bytes() -> int:
    """Asks torch's kernel, on meta tensors, of which number of bytes rows must be a multiple."""
    for width in range(1, 65):
        rows, weights = (torch.empty(*size, width, dtype=torch.bfloat16, device="meta") for size in ((2,), (2, 64)))
        try:
            ends = torch.empty(2, dtype=torch.int32, device="meta")
            torch.nn.functional.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
        except RuntimeError:
            continue
        return 2 * width
    return 1
