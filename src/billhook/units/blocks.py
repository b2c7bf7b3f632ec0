"""Finds the block stacks of a model, and skips blocks in the forward pass.

Blocks are found by a forward pass, because stages that change the shape of hidden states are module lists too.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from billhook.engine import evaluating
from billhook.model import cached, find_transformer, small_inputs

_Call = tuple[int, Tensor, Tensor | None]
"""Number of a block, its input hidden states, and its output hidden states of the same shape, if any."""


def find_blocks(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> dict[str, nn.ModuleList]:
    """Finds block stacks: module lists whose modules keep the shape of hidden states.

    Args:
        model: A Hugging Face model, also with LoRA, or a module that contains one. Models with the same signature run once.
        example_inputs: Inputs of the forward. Defaults to small random inputs.

    Raises:
        ValueError: If the inputs cannot be guessed, the model does not run with them, or there are no blocks.
    """
    subject = find_transformer(model)
    find = partial(_find_names, subject, example_inputs)
    names = cached(find, subject, "blocks") if example_inputs is None else find()
    if not names:
        raise ValueError(f"model: {type(subject).__name__} has no blocks that pass hidden states to each other.")
    return {name: stack for name, stack in subject.named_modules() if name in names and isinstance(stack, nn.ModuleList)}


def _find_names(subject: nn.Module, example_inputs: Mapping[str, Any] | None) -> list[str]:
    """Runs a model and returns the names of its block stacks."""
    lists = {
        name: module
        for name, module in subject.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and None not in module._modules.values()
    }
    calls = defaultdict(list)

    def record_call(name: str, number: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
        if (states := hidden_states([*args, *kwargs.values()])) is not None:
            calls[name].append((number, states, returned_states(states, output)))

    inputs = small_inputs(subject) if example_inputs is None else dict(example_inputs)
    with ExitStack() as hooks:
        for name, stack in lists.items():
            for number, module in enumerate(stack):
                hooks.callback(module.register_forward_hook(partial(record_call, name, number), with_kwargs=True).remove)
        try:
            with evaluating(subject), torch.no_grad():
                subject(**inputs)
        except Exception as error:  # whatever a model's own code raises
            what = f"{type(subject).__name__} does not run with inputs {', '.join(inputs)}"
            raise ValueError(f"model: {what}: {type(error).__name__}: {error}") from error
    stacks: list[str] = []
    for name, stack in lists.items():  # outer ones come first
        called, returns = {number for number, _, _ in calls[name]}, all(returned is not None for _, _, returned in calls[name])
        # a block receives the same tensor that another returned; equal values could be a coincidence
        passes_on = any(states is returned for (_, _, returned), (_, states, _) in pairwise(calls[name]))
        is_stack = returns and len(called) == len(stack) and (passes_on or len(stack) == 1)
        if is_stack and not any(name.startswith(f"{outer}.") for outer in stacks):
            stacks.append(name)
    return stacks


def block_of(name: str, stacks: Iterable[str]) -> tuple[str, int] | None:
    """Returns the stack and the block number of a module or parameter. None outside of blocks."""
    for stack in stacks:
        if name.startswith(f"{stack}."):
            return stack, int(name.removeprefix(f"{stack}.").partition(".")[0])
    return None


class Skip:
    """A forward hook that returns the input hidden states of a block, and counts calls."""

    keeps_shapes = True

    def __init__(self, runs: dict[tuple[str, int], int], key: tuple[str, int]) -> None:
        self.runs, self.key = runs, key

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ANN401
        """Returns the output with the input hidden states."""
        self.runs[self.key] += 1
        states = hidden_states([*args, *kwargs.values()])
        if states is None or isinstance(output, Tensor):
            return states
        returned = returned_states(states, output)
        return type(output)([states if value is returned else value for value in output])


def skip(model: nn.Module, blocks: Mapping[str, Iterable[int]]) -> tuple[list[RemovableHandle], dict[tuple[str, int], int]]:
    """Skips blocks; returns handles that undo it, and the number of calls of each block."""
    runs = {(name, number): 0 for name, numbers in blocks.items() for number in numbers}
    handles = []
    for name, number in runs:
        block = model.get_submodule(f"{name}.{number}")
        handles.append(block.register_forward_hook(Skip(runs, (name, number)), with_kwargs=True))
    return handles, runs


@contextmanager
def skipping(model: nn.Module, blocks: Mapping[str, Iterable[int]]) -> Iterator[dict[tuple[str, int], int]]:
    """Skips blocks within the context, and yields the number of calls of each block."""
    handles, runs = skip(model, blocks)
    with ExitStack() as hooks:
        for handle in handles:
            hooks.callback(handle.remove)
        yield runs


def hidden_states(values: Iterable[Any], shape: torch.Size | None = None) -> Tensor | None:
    """Returns the first floating-point tensor with at least two dimensions (and a shape)."""
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and shape in (None, value.shape):
            return value
    return None


def returned_states(states: Tensor, output: Any) -> Tensor | None:  # noqa: ANN401 - whatever a block returns
    """Returns the output hidden states with the shape of the input. None if there are none."""
    return hidden_states(output if isinstance(output, tuple | list) else [output], states.shape)
