"""Gates on heads: each head's output is multiplied by a number before anything reads it (1905.10650, section 2.2, equation 1).

MHAtt(x, q) = sum over h of gate_h Att_h(x, q): a gate of 1 leaves the model as it is, a gate of 0 takes the head out. A gate
stands before the module that reads the heads, so that it does not matter how the attention is computed. Code that torch.compile
has made knows nothing of gates that come or go later, so it is made anew then.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from billhook.model.find import find_transformer
from billhook.tracing.trace import Inputs
from billhook.units.heads import Chosen, check_layers, find_heads
from billhook.units.units import Per, Units


class Gate:
    """A forward pre-hook that multiplies each head by its gate.

    Args:
        values: One number a head, float32.
        index: For each position of the input, the head that it belongs to, -1 if to none.

    Attributes:
        keeps_shapes: What it returns has the shape that it was given, so a trace may leave it out.
    """

    keeps_shapes = True

    def __init__(self, values: Tensor, index: Tensor) -> None:
        self.values, self.index = values, index

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs, gated."""
        inputs, *rest = args
        values = torch.cat([self.values, self.values.new_ones(1)]).to(inputs.device)
        gates = values[self.index.to(inputs.device)]
        return (inputs * gates.to(inputs.dtype), *rest)


class HeadMask:
    """Heads that are masked until `remove` is called, or until the end of a `with` block.

    Attributes:
        heads: The masked heads by the name of their attention.
    """

    def __init__(self, heads: dict[str, list[int]], handles: list[RemovableHandle]) -> None:
        self.heads, self._handles = heads, handles

    def remove(self) -> None:
        """Lets the heads act again; nothing of the mask is left on the model."""
        _take_away(self._handles)
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


@contextmanager
def head_gates(model: nn.Module, per: Per = "head", example_inputs: Inputs | None = None) -> Iterator[dict[str, Tensor]]:
    """Puts a differentiable gate on every head, for as long as the `with` block lasts.

    Args:
        model: A Hugging Face model, also with LoRA attached or inside another module; or any module, with `example_inputs`.
        per: One gate for each `"head"` (query head), or for each `"kv_head"` with the query heads that it serves.
        example_inputs: As in `trace`.

    Returns:
        By the name of each attention, in the order in which they run, its gates: float32, `[heads]`, all 1, leaves that require
        gradients. They are no parameters of the model.

    Raises:
        ValueError: If the model has no attention, or one whose heads no module of its own reads; or if `per` is
            not legal.
    """
    heads = find_heads(model, example_inputs=example_inputs)
    check_layers(heads, {}, per)
    subject = model if example_inputs is not None else find_transformer(model)
    gates = {name: torch.ones(one.count(per), device=_device(subject, one), requires_grad=True) for name, one in heads.items()}
    handles = place_gates(subject, heads, gates, per)
    torch.compiler.reset()
    try:
        yield gates
    finally:
        _take_away(handles)


def mask_heads(model: nn.Module, heads: Chosen, per: Per = "head", example_inputs: Inputs | None = None) -> HeadMask:
    """Takes heads out of a model without changing its weights: their gates are 0.

    Args:
        model: As in `head_gates`.
        heads: The heads to mask, by layer: its number (in the order in which the attentions run) or the attention's name.
        per: Whether heads are query heads (`"head"`), or KV heads with the query heads that they serve (`"kv_head"`).
        example_inputs: As in `trace`.

    Returns:
        What undoes it: `mask.remove()`, or a `with` block.

    Raises:
        ValueError: As `head_gates`, or if there is no such layer or head.
    """
    found = find_heads(model, example_inputs=example_inputs)
    subject = model if example_inputs is not None else find_transformer(model)
    return place_mask(subject, found, check_layers(found, heads, per), per)


def place_mask(model: nn.Module, heads: Mapping[str, Units], chosen: Mapping[str, list[int]], per: Per = "head") -> HeadMask:
    """What `mask_heads` does, of heads that have been found and checked."""
    gates = {}
    for name, numbers in chosen.items():
        gates[name] = torch.ones(heads[name].count(per), device=_device(model, heads[name]))
        gates[name][numbers] = 0
    mask = HeadMask({name: list(numbers) for name, numbers in chosen.items()}, place_gates(model, heads, gates, per))
    torch.compiler.reset()
    return mask


def place_gates(
    model: nn.Module, heads: Mapping[str, Units], gates: Mapping[str, Tensor], per: Per = "head"
) -> list[RemovableHandle]:
    """Puts gates before whatever reads the heads.

    Args:
        model: The model.
        heads: Its heads.
        gates: By attention, `[heads]`.
        per: What there is one gate for.

    Returns:
        What takes them away.
    """
    handles = []
    for name, values in gates.items():
        index = torch.from_numpy(heads[name].positions(per)).to(values.device)
        for reader in heads[name].readers:
            handles.append(model.get_submodule(reader).register_forward_pre_hook(Gate(values, index)))
    return handles


def _take_away(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    torch.compiler.reset()


def _device(model: nn.Module, heads: Units) -> torch.device:
    device = next(model.get_submodule(heads.readers[0]).parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
