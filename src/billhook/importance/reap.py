"""Importance of experts, from the tokens that a router sends to them."""

import inspect
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from billhook.engine import Comm, Run, SideBySide
from billhook.importance.routing import Routing, RoutingChange
from billhook.importance.score import Importance, Sums
from billhook.linalg import in_float64
from billhook.model import ExpertLinear, after_norm, expert_layers, stacks_of
from billhook.tracing.groups import Member
from billhook.units import PLURAL, Per, UnitNumbers, Units, UnitsByModule


@dataclass(frozen=True)
class RoutingImportance(Importance):
    """Scores experts by a ratio of two sums over the tokens that they receive.

    It costs a forward pass for each batch, and needs experts whose class uses transformers' interface.
    """

    blockwise = True

    @property
    @abstractmethod
    def ratio(self) -> tuple[str, str]:
        """The attributes of `Routing` that are divided."""

    def of_routing(self, routing: Routing, *cell: int) -> tuple[Tensor, Tensor]:
        """Returns numerators and denominators, `[units]`, of all tokens or of a source and half."""
        sums = [getattr(routing, name) for name in self.ratio]
        total, count = (part[cell] if cell else part.sum((0, 1)) for part in sums)
        return routing.by_unit(total), routing.by_unit(count.expand_as(total))

    def sums(self, model: nn.Module, units: UnitsByModule, per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches. See `Importance.sums`."""
        routing = self.observe(model, units, runs)
        ratios = {name: self.of_routing(observed) for name, observed in routing.items()}
        totals, counts = ({name: ratio[part] for name, ratio in ratios.items()} for part in (0, 1))
        return Sums(totals, counts, routing)

    @torch.no_grad()
    def observe(self, model: nn.Module, units: UnitsByModule, runs: Sequence[Run]) -> dict[str, Routing]:
        """Runs batches, and returns the routing of each module.

        Every second batch of a source is in its second half.

        Raises:
            ValueError: If the units are not experts, or their class has a forward pass of its own.
        """
        sources, device = sorted({run.source for run in runs}), next(model.parameters()).device
        earlier, cells = Counter[str](), []  # source and half of each run
        for run in runs:
            cells.append((sources.index(run.source), earlier[run.source] % 2))
            earlier[run.source] += 1
        watched, routings = {}, {}
        for name, module_units in units.items():
            if module_units.kind != "expert":
                raise ValueError(f"importance={self} scores experts, not {PLURAL[module_units.kind]}. Use OutputNorm or Taylor.")
            if (member := stacked_experts(model, module_units)) is None:
                raise ValueError(f"importance={self}: the experts of {name} have a forward pass of their own. Use Taylor.")
            watched[model.get_submodule(member.name.rpartition(".")[0])] = name
            routings[name] = Routing.zero(sources, torch.from_numpy(module_units.of_member(member)), device)
        together, counts = SideBySide(model), {}  # non-padding tokens of the current call, bool

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index, name = inspect.signature(type(module).forward).bind(module, *args, **kwargs).args[2], watched[module]
            cell, mask = cells[together.run], runs[together.run].tokens.get(units[name].name)
            every = torch.ones(len(index), dtype=torch.bool, device=index.device)
            counts[module] = every if mask is None or mask.numel() != len(index) else mask.flatten()
            chosen = index[counts[module]]
            routings[name].tokens[cell] += len(chosen)
            routings[name].chosen.append((cell[0], chosen.to(torch.int16)))

        def leave(layer: ExpertLinear, _: Any, output: Tensor) -> None:  # noqa: ANN401
            routing, counted = routings[watched[layer.experts]], counts[layer.experts][layer.tokens].float()
            gates = layer.gates.float() * counted
            norms = after_norm(layer.experts, output).float().norm(dim=-1) * gates
            for sums, values in ((routing.counts, counted), (routing.gates, gates), (routing.norms, norms)):
                sums[cells[together.run]][layer.number] += in_float64(values.sum()).to(sums.device)

        with expert_layers(model), ExitStack() as hooks:
            for module in watched:
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                for layer in module.modules():
                    if isinstance(layer, ExpertLinear) and layer.stack == "down_proj":
                        hooks.callback(layer.register_forward_hook(leave).remove)
            together([run.visit for run in runs])
        return routings

    def changes(self, routing: Mapping[str, Routing], removed: UnitNumbers, comm: Comm) -> list[RoutingChange]:
        """Returns the change of routing by a removal, for each source.

        Args:
            routing: The routing of each module, over all ranks.
            removed: Units to remove, by module.
            comm: The ranks, for the experts of each token.
        """
        sources = next(iter(routing.values())).sources
        kept, gates, orphans, tokens, unreached, same, halves = torch.zeros(7, len(sources), dtype=torch.float64)
        for name, part in routing.items():
            numbers = torch.tensor(list(removed.get(name, ())), dtype=torch.int64)
            goes, by_source = torch.isin(part.unit_of, numbers), part.gates.sum(1).cpu()
            kept += by_source[:, ~goes].sum(1)
            gates += by_source.sum(1)
            tokens += part.tokens.sum((1, 2)).cpu()
            unreached += (part.counts.sum(1) == 0).sum(1).cpu()
            for source, experts in part.chosen:
                orphans[source] += goes.to(experts.device)[experts.long()].all(1).sum().cpu()
            for source in range(len(sources)) if len(numbers) else ():
                if part.tokens[source].all():
                    first, second = (self._kept(part, len(numbers), source, half) for half in (0, 1))
                    same[source] += len(first & second)
                    halves[source] += len(first)
        comm.sum_(orphans)
        return [
            RoutingChange(
                source,
                float(kept[number] / gates[number]),
                float(orphans[number] / tokens[number]),
                int(unreached[number]),
                float(same[number] / halves[number]) if halves[number] else None,
            )
            for number, source in enumerate(sources)
            if tokens[number]
        ]

    def _kept(self, routing: Routing, removed: int, *cell: int) -> set[int]:
        """Returns the units that remain by the scores of a source and half."""
        total, count = self.of_routing(routing, *cell)
        return set((total / count.clamp(min=1)).argsort(stable=True)[removed:].tolist())


def stacked_experts(model: nn.Module, units: Units) -> Member | None:
    """Returns the stack of output matrices, if experts run through transformers' interface."""
    for member in units.members if units.kind == "expert" else ():
        module, _, name = member.name.rpartition(".")
        if name == "down_proj" and member.dim == 0 and stacks_of(model.get_submodule(module)):
            return member
    return None


@dataclass(frozen=True)
class REAP(RoutingImportance):
    """Scores an expert by the mean of its gate times the norm of its output.

    S_j is the mean of g_j(x) |f_j(x)|_2 over the tokens x that expert j receives, and 0 without any.

    Reference: "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression" (Lasby et al., 2025),
    https://arxiv.org/abs/2510.13999.

    Raises:
        ValueError: On scoring, if the units are not experts, or their class has a forward pass of its own.

    Example:
        >>> import billhook as bh
        >>> importance = bh.importance.REAP()
        >>> importance.needs_gradients
        False
    """

    ratio = ("norms", "counts")


@dataclass(frozen=True)
class RoutingFrequency(RoutingImportance):
    """Scores an expert by the share of tokens that it receives.

    Raises:
        ValueError: On scoring, if the units are not experts, or their class has a forward pass of its own.

    Example:
        >>> import billhook as bh
        >>> importance = bh.importance.RoutingFrequency()
        >>> importance.needs_gradients
        False
    """

    ratio = ("counts", "tokens")


@dataclass(frozen=True)
class GateMass(RoutingImportance):
    """Scores an expert by the mean of its gate over all tokens.

    Raises:
        ValueError: On scoring, if the units are not experts, or their class has a forward pass of its own.

    Example:
        >>> import billhook as bh
        >>> importance = bh.importance.GateMass()
        >>> importance.needs_gradients
        False
    """

    ratio = ("gates", "tokens")
