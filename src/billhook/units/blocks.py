"""The blocks of a model: which module lists hold them, and what it computes without some of them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from billhook.model.find import find_transformer
from billhook.running.answers import small_inputs
from billhook.running.undisturbed import resting

Chosen = Mapping[str, Iterable[int]] | Iterable[int]
"""Blocks by stack, or those of the only one."""


@dataclass(frozen=True, eq=False)
class _Call:
    """A block was called with hidden states, and gave others of their shape, or None."""

    given: Tensor
    returned: Tensor | None


def find_blocks(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> dict[str, nn.ModuleList]:
    """The stacks of blocks of a model: by name, the outermost module lists whose modules hand hidden states on, one to the next.

    The model is run once. Every module of such a list gives hidden states of the shape that it takes, so that stages which make
    them wider or shorter are no blocks, and what is within them may be.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        example_inputs: What its forward takes; by default small random inputs.

    Raises:
        ValueError: If the inputs cannot be guessed, the model does not run with them, or there are no blocks.
    """
    subject = find_transformer(model)
    lists = {name: module for name, module in subject.named_modules() if isinstance(module, nn.ModuleList)}
    lists = {name: module for name, module in lists.items() if len(module) and None not in module._modules.values()}
    inputs = small_inputs(subject) if example_inputs is None else dict(example_inputs)
    try:
        with _watching(lists) as calls, resting(subject), torch.no_grad():
            subject(**inputs)
    except Exception as error:  # whatever a model's own code raises
        told = f"{type(subject).__name__} does not run with inputs {', '.join(inputs)}: {type(error).__name__}: {error}"
        raise ValueError(f"model: {told}") from error
    found: dict[str, nn.ModuleList] = {}
    for name, stack in lists.items():  # outer ones come first
        if not any(name.startswith(f"{outer}.") for outer in found) and _is_stack(calls[name], len(stack)):
            found[name] = stack
    if not found:
        raise ValueError(f"model: {type(subject).__name__} has no blocks that hand hidden states on, one to the next")
    return found


def block_of(name: str, stacks: Mapping[str, Sequence[nn.Module] | nn.ModuleList]) -> tuple[str, int] | None:
    """The stack in which a module or parameter is, and its block's place there, from 0; None if it is in none.

    Args:
        name: Its name.
        stacks: What `find_blocks` found.
    """
    for stack in stacks:
        if name.startswith(f"{stack}."):
            return stack, int(name.removeprefix(f"{stack}.").partition(".")[0])
    return None


def check_blocks(stacks: Mapping[str, nn.ModuleList], chosen: Chosen) -> dict[str, list[int]]:
    """Blocks by the names of their stacks, ascending; only stacks of which there are any.

    Raises:
        ValueError: If there is no such stack or block, or none would be left in a stack.
    """
    told = ", ".join(f"{name} ({len(stack)} blocks)" for name, stack in stacks.items())
    if not isinstance(chosen, Mapping):
        if len(stacks) > 1:
            raise ValueError(f"blocks: say of which stack, as {{name: [numbers]}}; there are {told}")
        chosen = {next(iter(stacks)): chosen}
    named: dict[str, list[int]] = {}
    for name, given in chosen.items():
        numbers = list(given)
        if name not in stacks:
            raise ValueError(f"blocks: there is no stack {name!r}; there are {told}")
        count = len(stacks[name])
        if wrong := [number for number in numbers if type(number) is not int or not 0 <= number < count]:
            raise ValueError(f"blocks: {name} has no block {wrong[0]!r}; it has 0 to {count - 1}")
        if len(set(numbers)) == count:
            raise ValueError(f"blocks: {name} would be left without blocks; at least one of its {count} must stay")
        if numbers:
            named[name] = sorted(set(numbers))
    return named


@contextmanager
def skipping(stacks: Mapping[str, nn.ModuleList], blocks: Mapping[str, Iterable[int]]) -> Iterator[dict[tuple[str, int], int]]:
    """Lets a model compute without some blocks: each gives the hidden states that it takes, in the place of its own.

    Args:
        stacks: What `find_blocks` found.
        blocks: The blocks, by stack.

    Yields:
        How often each of them has been called so far, by stack and number.
    """
    runs = {(name, number): 0 for name, numbers in blocks.items() for number in numbers}
    with ExitStack() as hooks:
        for name, number in runs:
            hook = partial(_skip, runs, (name, number))
            hooks.callback(stacks[name][number].register_forward_hook(hook, with_kwargs=True).remove)
        yield runs


def hidden_states(values: Iterable[Any], shape: torch.Size | None = None) -> Tensor | None:
    """The first of some values that can be hidden states: real numbers of two dimensions or more, of a shape if one is said."""
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and shape in (None, value.shape):
            return value
    return None


def returned_states(given: Tensor, output: Any) -> Tensor | None:  # noqa: ANN401 - whatever a block gives
    """The hidden states in what a block gives for hidden states; None if there are none of their shape."""
    return hidden_states([output] if isinstance(output, Tensor) else _several(output), given.shape)


def _skip(
    runs: dict[tuple[str, int], int],
    key: tuple[str, int],
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    runs[key] += 1
    given = hidden_states([*args, *kwargs.values()])
    if given is None or isinstance(output, Tensor):
        return given
    own = returned_states(given, output)
    return type(output)([given if value is own else value for value in output])


def _several(output: Any) -> Iterable[Any]:  # noqa: ANN401
    return output if isinstance(output, tuple | list) else ()


@contextmanager
def _watching(lists: Mapping[str, nn.ModuleList]) -> Iterator[dict[str, list[tuple[int, _Call]]]]:
    """Notes calls of the modules of lists, each with its place in the list."""
    calls: dict[str, list[tuple[int, _Call]]] = {name: [] for name in lists}

    def note(name: str, number: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
        if (given := hidden_states([*args, *kwargs.values()])) is not None:
            calls[name].append((number, _Call(given, returned_states(given, output))))

    with ExitStack() as hooks:
        for name, stack in lists.items():
            for number, module in enumerate(stack):
                hooks.callback(module.register_forward_hook(partial(note, name, number), with_kwargs=True).remove)
        yield calls


def _is_stack(calls: Sequence[tuple[int, _Call]], count: int) -> bool:
    if {number for number, _ in calls} != set(range(count)) or any(call.returned is None for _, call in calls):
        return False
    return count == 1 or any(after.given is before.returned for (_, before), (_, after) in pairwise(calls))
