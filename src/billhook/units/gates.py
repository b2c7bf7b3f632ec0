"""Gates on units: factors that multiply the output of each unit before its consumers.

Gates are placed by hooks, so torch.compile recompiles after a change.

Reference: Are Sixteen Heads Really Better than One? (Michel, Levy & Neubig, 2019), https://arxiv.org/abs/1905.10650, section
2.2, equation 1: MHAtt(x, q) = sum over h of gate_h Att_h(x, q). Channels are gated in the same way.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from billhook.arguments import check_types
from billhook.engine import fresh_autocast_cache, local, reshard, sharded_as
from billhook.linalg import IndicesByModule, over_dims
from billhook.model import find_transformer, read_dim
from billhook.tracing.trace import Inputs
from billhook.units.blocks import skip
from billhook.units.find import Chosen, check_belongs, find_units, unit_ids
from billhook.units.units import PLURAL, Per, UnitKind, UnitNumbers, Units, UnitsByModule


class Gate:
    """A forward pre-hook that multiplies units by gates.

    `index` maps positions to units, -1 for none. Fixed gates are expanded to positions once, not in every forward.
    """

    keeps_shapes = True

    def __init__(self, values: Tensor, index: Tensor, fixed: bool = False) -> None:
        self.values = values
        self.index = index.to(values.device)
        self._ungated = bool((index < 0).any())
        self._spread = self._over_positions(values.device) if fixed else None

    def _over_positions(self, device: torch.device) -> Tensor:
        values = torch.cat([self.values, self.values.new_ones(1)]) if self._ungated else self.values
        return values.to(device)[self.index.to(device)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns the gated inputs."""
        inputs, *rest = args
        spread = self._over_positions(inputs.device) if self._spread is None else self._spread
        gates = spread.to(inputs.device)
        dim = read_dim(module)
        if inputs.shape[dim] != len(gates):
            where = f"{list(inputs.shape)}, which has not the {len(gates)} positions that its weight reads in dimension {dim}"
            raise ValueError(f"model: {type(module).__name__} is given {where}, so no gate can stand before it")
        return (inputs * gates.to(inputs.dtype).view(-1, *[1] * (-1 - dim)), *rest)


class Mask:
    """Masked units, until `remove` is called or the `with` block ends.

    Attributes:
        units: The masked units by module. For attention modules, query heads.
    """

    def __init__(self, units: UnitNumbers, handles: list[RemovableHandle]) -> None:
        self.units = units
        self._handles = handles

    def remove(self) -> None:
        """Removes the mask from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        torch.compiler.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


@runtime_checkable
class Planned(Protocol):
    """A plan of units, as returned by `plan` and `plan_units`."""

    @property
    def units(self) -> UnitNumbers:
        """The chosen units by module."""

    @property
    def kinds(self) -> Mapping[str, UnitKind]:
        """The kind of units of each module."""


@contextmanager
def gates(model: nn.Module, units: UnitsByModule, per: Per = "head") -> Iterator[dict[str, Tensor]]:
    """Places a differentiable gate on every unit within the context.

    Args:
        model: The model, or a module that contains it.
        units: Units with a consumer module, such as heads and channels: `find_units(model, "head")`.
        per: For heads, a gate for each query head (`"head"`), or for each KV head with its query heads (`"kv_head"`).

    Yields:
        Gates by module: float32, `[units]`, all 1, with `requires_grad`. They are not parameters of the model.

    Raises:
        ValueError: If no single module consumes the units, such as for experts and blocks, or if `per` is invalid.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> with bh.gates(model, bh.find_units(model, "head")) as gates:
        ...     model(**model.dummy_inputs).logits.mean().backward()
        >>> all(gate.grad is not None for gate in gates.values())
        True
    """
    check_types(gates, locals())
    unit_ids(units, {}, per)  # refuses an illegal `per`
    modules = dict(model.named_modules(remove_duplicate=False))
    subject = model if all(modules.keys() >= set(layer.readers) for layer in units.values()) else find_transformer(model)
    check_belongs(subject, units)
    values = {name: _open_gates(subject, layer, per).requires_grad_() for name, layer in units.items()}
    with Mask({}, place_gates(subject, units, values, per)):
        torch.compiler.reset()
        yield values


def mask(
    model: nn.Module,
    units: Chosen | Planned,
    kind: UnitKind | Iterable[UnitKind] = "head",
    per: Per = "head",
    example_inputs: Inputs | None = None,
) -> Mask:
    """Masks units without changing weights: their gates are set to 0, and blocks are skipped.

    Args:
        model: A Hugging Face model, also with LoRA, or a module that contains one. Any module with `example_inputs`.
        units: A plan, or unit numbers by module: its name, or its position in `find_units`.
        kind: Kind of the units, or a list of kinds. Ignored for a plan.
        per: For heads, whether numbers are query heads (`"head"`) or KV heads with their query heads (`"kv_head"`).
        example_inputs: Inputs of the forward, as for `trace`. Defaults to inputs guessed from the config.

    Returns:
        A mask. Remove it with `mask.remove()`, or use it in a `with` block.

    Raises:
        ValueError: If a module or unit does not exist, or no single module consumes the units, such as for experts.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> with bh.mask(model, {0: [1]}) as mask:
        ...     mask.units
        {'model.layers.0.self_attn': [1]}
    """
    check_types(mask, locals())
    if isinstance(units, Iterable):
        chosen = units
    else:
        chosen = units.units
        kind = dict.fromkeys(units.kinds.values())
    layers = find_units(model, kind, example_inputs)
    subject = model if example_inputs is not None else find_transformer(model)
    masked = unit_ids(layers, chosen, per)
    values = {}
    blocks = {}
    for name, numbers in masked.items():
        if layers[name].kind == "block":
            blocks[layers[name].name] = numbers
        else:
            values[name] = _open_gates(subject, layers[name])
            values[name][numbers] = 0
    handles = [*place_gates(subject, layers, values, fixed=True), *skip(subject, blocks)[0]]
    torch.compiler.reset()
    return Mask(masked, handles)


def place_gates(
    model: nn.Module, units: UnitsByModule, gates: Mapping[str, Tensor], per: Per = "head", fixed: bool = False
) -> list[RemovableHandle]:
    """Places gates, `[units]`, before consumers; gates that are not `fixed` have gradients."""
    handles = []
    for name, values in gates.items():
        index = torch.from_numpy(units[name].positions(per))
        for reader in units[name].readers:
            handles.append(model.get_submodule(reader).register_forward_pre_hook(Gate(values, index, fixed)))
    return handles


def _open_gates(model: nn.Module, units: Units, per: Per = "head") -> Tensor:
    """Returns gates of 1. Raises for units without a consumer module."""
    if not units.own_readers:
        what = PLURAL[units.kind]
        raise ValueError(
            f"{what}: no single module consumes the {what} of {units.name or 'the model'}, so they cannot be masked."
        )
    reader = model.get_submodule(units.readers[0])
    device = next(chain(reader.parameters(), reader.buffers())).device
    # gates have values also where the model has none
    return torch.ones(units.count(per), device="cpu" if device.type == "meta" else device)


@fresh_autocast_cache()
def zero_units(model: nn.Module, units: Chosen, kind: UnitKind = "head", per: Per = "head") -> None:
    """Zeroes the consumer columns of units in place, which is equivalent to masking them."""
    subject = find_transformer(model)
    layers = find_units(subject, kind)
    removed = unit_ids(layers, units, per)
    reshard(subject)
    with torch.no_grad():
        for weight, dim, index in consumer_columns(subject, layers, removed):
            read = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device).scatter_(dim, index, True)
            local(weight).masked_fill_(local(sharded_as(read, weight)), 0)


def consumer_columns(
    model: nn.Module,
    layers: UnitsByModule,
    units: UnitNumbers | IndicesByModule,
    by_expert: IndicesByModule | None = None,
) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """Yields the parameters that consume units, with dimension and index of `gather`."""
    for name, numbers in units.items():
        for member in layers[name].members_by_unit():
            if member.reads:
                weight = model.get_parameter(member.name)
                unit_of = layers[name].of_member(member)
                if by_expert and name in by_expert:
                    positions = np.stack([np.flatnonzero(np.isin(unit_of, lost)) for lost in by_expert[name]])
                else:
                    positions = np.flatnonzero(np.isin(unit_of, numbers))
                index = torch.from_numpy(positions).to(weight.device)
                yield weight, member.dim, over_dims(index, weight, member.dim)
