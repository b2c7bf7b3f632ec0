"""Finds the blocks of a model, by the module lists that hold them, and lets it compute without some of them.

A run shows them, not the structure: stages that change the shape of hidden states are module lists too.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from billhook.engine.state import evaluating
from billhook.model.cache import cached
from billhook.model.find import find_transformer
from billhook.model.inputs import small_inputs

_Call = tuple[int, Tensor, Tensor | None]
"""A block's number in its list, the hidden states that went in, and those of the same shape that came out, if any."""


def find_blocks(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> dict[str, nn.ModuleList]:
    """Finds the stacks of blocks: the outermost module lists whose modules return hidden states of the shape that they get.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one; models alike are run once.
        example_inputs: What its forward takes; by default small random inputs.

    Raises:
        ValueError: If the inputs cannot be guessed, the model does not run with them, or there are no blocks.
    """
    subject = find_transformer(model)
    find = partial(_find_names, subject, example_inputs)
    names = cached(find, subject, "blocks") if example_inputs is None else find()
    if not names:
        raise ValueError(f"model: {type(subject).__name__} has no blocks that hand hidden states on, one to the next")
    return {name: stack for name, stack in subject.named_modules() if name in names and isinstance(stack, nn.ModuleList)}


def _find_names(subject: nn.Module, example_inputs: Mapping[str, Any] | None) -> list[str]:
    """Runs a model and returns the names of its stacks of blocks."""
    lists = {
        name: module
        for name, module in subject.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and None not in module._modules.values()
    }
    calls: dict[str, list[_Call]] = {name: [] for name in lists}

    def note(name: str, number: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
        if (states := hidden_states([*args, *kwargs.values()])) is not None:
            calls[name].append((number, states, returned_states(states, output)))

    inputs = small_inputs(subject) if example_inputs is None else dict(example_inputs)
    with ExitStack() as hooks:
        for name, stack in lists.items():
            for number, module in enumerate(stack):
                hooks.callback(module.register_forward_hook(partial(note, name, number), with_kwargs=True).remove)
        try:
            with evaluating(subject), torch.no_grad():
                subject(**inputs)
        except Exception as error:  # whatever a model's own code raises
            what = f"{type(subject).__name__} does not run with inputs {', '.join(inputs)}"
            raise ValueError(f"model: {what}: {type(error).__name__}: {error}") from error
    stacks: list[str] = []
    for name, stack in lists.items():  # outer ones come first
        if not any(name.startswith(f"{outer}.") for outer in stacks) and _is_stack(calls[name], len(stack)):
            stacks.append(name)
    return stacks


def _is_stack(calls: Sequence[_Call], count: int) -> bool:
    if {number for number, _, _ in calls} != set(range(count)) or any(returned is None for _, _, returned in calls):
        return False
    # one gets the very tensor that another returned: values could be equal by chance
    return count == 1 or any(states is returned for (_, _, returned), (_, states, _) in pairwise(calls))


def block_of(name: str, stacks: Iterable[str]) -> tuple[str, int] | None:
    """Returns the stack in which a module or parameter of this name is, and its block's place there; None if it is in none."""
    for stack in stacks:
        if name.startswith(f"{stack}."):
            return stack, int(name.removeprefix(f"{stack}.").partition(".")[0])
    return None


class Skip:
    """A forward hook by which a block returns the hidden states that it gets; `runs` counts the calls."""

    keeps_shapes = True

    def __init__(self, runs: dict[tuple[str, int], int], key: tuple[str, int]) -> None:
        self.runs, self.key = runs, key

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:  # noqa: ANN401
        """Returns the output with the hidden states that went in instead of the block's own."""
        self.runs[self.key] += 1
        states = hidden_states([*args, *kwargs.values()])
        if states is None or isinstance(output, Tensor):
            return states
        returned = returned_states(states, output)
        return type(output)([states if value is returned else value for value in output])


def skip(model: nn.Module, blocks: Mapping[str, Iterable[int]]) -> tuple[list[RemovableHandle], dict[tuple[str, int], int]]:
    """Lets blocks return what they get; returns handles that undo it, and how often each has been called so far."""
    runs = {(name, number): 0 for name, numbers in blocks.items() for number in numbers}
    handles = []
    for name, number in runs:
        block = model.get_submodule(f"{name}.{number}")
        handles.append(block.register_forward_hook(Skip(runs, (name, number)), with_kwargs=True))
    return handles, runs


@contextmanager
def skipping(model: nn.Module, blocks: Mapping[str, Iterable[int]]) -> Iterator[dict[tuple[str, int], int]]:
    """Skips blocks as `skip` does, for as long as the `with` block lasts, and yields how often each has been called."""
    handles, runs = skip(model, blocks)
    with ExitStack() as hooks:
        for handle in handles:
            hooks.callback(handle.remove)
        yield runs


def hidden_states(values: Iterable[Any], shape: torch.Size | None = None) -> Tensor | None:
    """Returns the first value that can be hidden states: real numbers of two dimensions or more, of a shape if one is given."""
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and shape in (None, value.shape):
            return value
    return None


def returned_states(states: Tensor, output: Any) -> Tensor | None:  # noqa: ANN401 - whatever a block returns
    """Returns the hidden states in the output of a block; None if none have the shape of those that went in."""
    return hidden_states(output if isinstance(output, tuple | list) else [output], states.shape)
