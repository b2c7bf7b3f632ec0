"""Which blocks of a module list are there: some are taken out, and come back, empty, for a checkpoint that has them."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

_REMOVED = "_billhook_removed"  # on a module list: by their first numbers, the blocks that were removed, without weights


def numbers_of(stack: nn.ModuleList) -> list[int]:
    """Returns the numbers that the blocks of a stack had before any was taken out."""
    return [number for number in range(first_of(stack)) if number not in _removed_from(stack)]


def first_of(stack: nn.ModuleList) -> int:
    """Returns how many blocks a stack had before any was taken out."""
    return len(stack) + len(_removed_from(stack))


def taken_out(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Finds the stacks that have lost blocks: by name, how many blocks there were at first, and the numbers of those there."""
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: (first_of(stack), tuple(numbers_of(stack))) for name, stack in stacks.items() if _removed_from(stack)}


def keep(stack: nn.ModuleList, numbers: Sequence[int]) -> None:
    """Leaves these blocks in a stack, by the numbers that they had at first; removed ones come back, without weights."""
    there, removed = dict(zip(numbers_of(stack), stack, strict=True)), dict(_removed_from(stack))
    tensor = next(stack.parameters(), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    back = {number: _filled(removed.pop(number), number, device) for number in numbers if number not in there}
    removed |= {number: _emptied(block) for number, block in there.items() if number not in numbers}
    for block in back.values():
        block.train(stack.training)
    stack._modules.clear()
    stack._modules.update({str(place): (there | back)[number] for place, number in enumerate(numbers)})
    vars(stack)[_REMOVED] = removed
    if not removed:
        del vars(stack)[_REMOVED]


def _removed_from(stack: nn.ModuleList) -> dict[int, nn.Module | None]:
    found: dict[int, nn.Module | None] = vars(stack).get(_REMOVED, {})
    return found


def _emptied(block: nn.Module) -> nn.Module | None:
    """Copies a block without memory for its parameters; None if something in it cannot be copied."""
    memo: dict[int, Any] = {}
    for module in block.modules():
        memo |= {id(config): config for config in vars(module).values() if isinstance(config, PretrainedConfig)}
    for parameter in block.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    try:
        return copy.deepcopy(block, memo)
    except Exception:  # whatever a class of somebody's own raises
        return None


def _filled(block: nn.Module | None, number: int, device: torch.device) -> nn.Module:
    """Copies a block with memory for its parameters, which hold nothing meaningful."""
    if block is None:
        raise ValueError(f"block {number}, which was removed, cannot come back: load the checkpoint into a new model")
    new = copy.deepcopy(block, {id(c): c for m in block.modules() for c in vars(m).values() if isinstance(c, PretrainedConfig)})
    made = {p: nn.Parameter(torch.empty_like(p, device=device), p.requires_grad) for p in new.parameters()}
    for module in new.modules():
        module._parameters.update({name: made[p] for name, p in module._parameters.items() if p is not None})
    return new
