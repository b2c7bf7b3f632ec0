"""Linear layers that write the outputs of blocks to the residual stream.

If these are zero, a block adds nothing, so a model with zeros computes what it computes without the block.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.store import store_of
from billhook.model.inputs import outputs_match, run_outputs, tolerance
from billhook.model.layers import is_linear
from billhook.units.blocks import block_of, skipping
from billhook.units.units import Units


def block_writers(model: nn.Module, stack: str, units: Mapping[str, Units]) -> dict[int, list[str]]:
    """Returns by block number the linear layers that write to the residual stream.

    Args:
        model: The model.
        stack: Name of the block stack.
        units: The heads and channels of the model, whose consumer layers these are.
    """
    writers: dict[int, list[str]] = {number: [] for number, _ in enumerate(model.get_submodule(stack).children())}
    for consumer in dict.fromkeys(consumer for of_module in units.values() for consumer in of_module.readers):
        where = block_of(consumer, [stack])
        if where is not None and is_linear(model.get_submodule(consumer)):
            writers[where[1]].append(consumer)
    return writers


def writers_behind(writers: Mapping[int, Sequence[str]], removed: Sequence[int]) -> list[str]:
    """Returns the writers of the kept blocks after the first removed block."""
    behind = [number for number in writers if removed and number > min(removed) and number not in removed]
    return [name for number in behind for name in writers[number]]


def zero_weights(model: nn.Module, linears: Iterable[str]) -> LazyTensors:
    """Returns zero parameters for linear layers, created when they are read."""
    names = list(linears)
    values = by_parameter({name: dict(model.get_submodule(name).named_parameters(recurse=False)) for name in names})
    return LazyTensors({name: partial(_zeros, value) for name, value in values.items()}, f"zeros of {names}")


def _zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter.data, device="cpu" if parameter.is_meta else None)  # meta: its block is not loaded


def why_not_zeros(model: PreTrainedModel, blocks: Mapping[str, Sequence[int]], writers: Iterable[str]) -> str:
    """Returns why zeroed writers do not equal the removal of blocks; empty if they do."""
    with skipping(model, blocks):
        expected = run_outputs(model)
    with store_of(model).computing_with(zero_weights(model, writers)):
        zeros_alone = run_outputs(model)
    if outputs_match(expected, zeros_alone, tolerance(model)):
        return ""
    names = " and ".join(f"{stack}.{number}" for stack, numbers in blocks.items() for number in numbers)
    return f"{names} changes the output even if the layers after its heads and channels are zero"
