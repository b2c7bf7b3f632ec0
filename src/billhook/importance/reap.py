"""Importance of experts, from the tokens that a router sends to them."""

import inspect
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from billhook.engine import Comm, Run, SideBySide
from billhook.importance.routing import Routing, RoutingChange
from billhook.importance.score import Importance, Sums
from billhook.linalg import in_float64
from billhook.model import ExpertLinear, after_norm, expert_layers, stacks_of
from billhook.tracing.groups import Member
from billhook.units import PLURAL, Per, Units


@dataclass(frozen=True)
class RoutingImportance(Importance):
    """Scores experts by a ratio of two sums over the tokens that they receive.

    It costs a forward pass for each batch, and needs experts whose class uses transformers' interface.
    """

    blockwise: ClassVar[bool] = True

    @property
    @abstractmethod
    def ratio(self) -> tuple[str, str]:
        """The attributes of `Routing` that are divided."""

    def of_routing(self, routing: Routing, *cell: int) -> tuple[Tensor, Tensor]:
        """Returns numerators and denominators, `[units]`, of all tokens or of a source and half."""
        sums = [getattr(routing, name) for name in self.ratio]
        total, count = (part[cell] if cell else part.sum((0, 1)) for part in sums)
        return routing.by_unit(total), routing.by_unit(count.expand_as(total))

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches. See `Importance.sums`."""
        routing = self.observe(model, units, runs)
        ratios = {name: self.of_routing(observed) for name, observed in routing.items()}
        totals, counts = ({name: ratio[part] for name, ratio in ratios.items()} for part in (0, 1))
        return Sums(totals, counts, routing)

    @torch.no_grad()
    def observe(self, model: nn.Module, units: Mapping[str, Units], runs: Sequence[Run]) -> dict[str, Routing]:
        """Runs batches, and returns the routing of each module.

        Every second batch of a source is in its second half.

        Raises:
            ValueError: If the units are not experts, or their class has a forward pass of its own.
        """
        sources, device = sorted({run.source for run in runs}), next(model.parameters()).device
        earlier, cells = Counter[str](), list[tuple[int, int]]()  # source and half of each run
        for run in runs:
            cells.append((sources.index(run.source), earlier[run.source] % 2))
            earlier[run.source] += 1
        watched, routings = dict[nn.Module, str](), dict[str, Routing]()
        for name, module_units in units.items():
            if module_units.kind != "expert":
                raise ValueError(f"importance={self} scores experts, not {PLURAL[module_units.kind]}. Use OutputNorm or Taylor.")
            if (member := stacked_experts(model, module_units)) is None:
                raise ValueError(f"importance={self}: the experts of {name} have a forward pass of their own. Use Taylor.")
            watched[model.get_submodule(member.name.rpartition(".")[0])] = name
            routings[name] = Routing.zero(sources, torch.from_numpy(module_units.of_member(member)), device)
        together, gates_of = SideBySide(model), dict[nn.Module, Tensor]()  # of the current call, `[tokens, experts]`

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, index, weights = inspect.signature(type(module).forward).bind(module, *args, **kwargs).args[1:4]
            name, cell = watched[module], cells[together.run]
            routing = routings[name]
            gates = weights.new_zeros(len(hidden), len(routing.unit_of), dtype=torch.float32).scatter_(1, index, weights.float())
            mask = runs[together.run].tokens.get(units[name].name)
            if mask is not None and mask.numel() == len(hidden):
                gates, index = gates * mask.flatten()[:, None], index[mask.flatten()]
            gates_of[module] = gates
            routing.tokens[cell] += len(index)
            received = index.flatten().to(routing.counts.device)
            routing.counts[cell].index_add_(0, received, torch.ones_like(received, dtype=torch.float64))
            routing.gates[cell] += in_float64(gates.sum(0)).to(routing.gates.device)
            routing.chosen.append((cell[0], index.to(torch.int16)))

        def leave(layer: ExpertLinear, _: Any, output: Tensor) -> None:  # noqa: ANN401
            module = layer.experts
            norms = after_norm(module, output).float().norm(dim=-1) * gates_of[module][layer.tokens, layer.number]
            total = routings[watched[module]].norms[cells[together.run]][layer.number]
            total += in_float64(norms.sum()).to(total.device)

        with expert_layers(model), ExitStack() as hooks:
            for module in watched:
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                for layer in module.modules():
                    if isinstance(layer, ExpertLinear) and layer.stack == "down_proj":
                        hooks.callback(layer.register_forward_hook(leave).remove)
            together([run.visit for run in runs])
        return routings

    def changes(self, routing: Mapping[str, Routing], removed: Mapping[str, Sequence[int]], comm: Comm) -> list[RoutingChange]:
        """Returns the change of routing by a removal, for each source.

        Args:
            routing: The routing of each module, over all ranks.
            removed: Units to remove, by module.
            comm: The ranks, for the experts of each token.
        """
        first = next(iter(routing.values()))
        gates, tokens, agreement = (torch.zeros(len(first.sources), 2, dtype=torch.float64) for _ in range(3))
        unreached = torch.zeros(len(first.sources), dtype=torch.int64)
        for name, part in routing.items():
            numbers = torch.tensor(list(removed.get(name, ())), dtype=torch.int64)
            goes = torch.isin(part.unit_of, numbers).to(part.gates.device)
            by_source = part.gates.sum(1)
            gates += torch.stack([by_source[:, ~goes].sum(1), by_source.sum(1)], 1).cpu()
            unreached += (part.counts.sum(1) == 0).sum(1).cpu()
            for source, experts in part.chosen:
                lost = goes.to(experts.device)[experts.long()].all(1)
                tokens[source] += torch.stack([lost.sum(), torch.tensor(len(experts), device=lost.device)]).cpu()
            for source in range(len(first.sources)) if len(numbers) else ():
                halves = [self.of_routing(part, source, half) for half in (0, 1)]
                kept = [
                    set((total / count.clamp(min=1)).argsort(stable=True)[len(numbers) :].tolist()) for total, count in halves
                ]
                if all(part.tokens[source, half].item() for half in (0, 1)):
                    agreement[source] += torch.tensor([len(kept[0] & kept[1]), len(kept[0])])
        comm.sum_(tokens)
        return [
            RoutingChange(
                source,
                float(gates[number, 0] / gates[number, 1]),
                float(tokens[number, 0] / tokens[number, 1]),
                int(unreached[number]),
                float(agreement[number, 0] / agreement[number, 1]) if agreement[number, 1] else None,
            )
            for number, source in enumerate(first.sources)
            if tokens[number, 1]
        ]


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
