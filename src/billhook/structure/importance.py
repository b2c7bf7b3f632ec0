"""How much each head matters: scores of heads, of any model that `trace` knows."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from billhook.structure.gates import place_gates
from billhook.structure.probes import Trial, by_head, counted, counting, independent, products_of, scalar
from billhook.structure.units import Per, Units

Each = Literal["token", "example", "batch"]


@dataclass(eq=False)
class Sums:
    """Sums over batches, of which the ratio is the importance; those of several ranks add up.

    Attributes:
        totals: By attention, float64, `[heads]`.
        counts: By attention, of how many tokens, examples or batches: float64, no dimensions.
    """

    totals: dict[str, Tensor]
    counts: dict[str, Tensor]

    @classmethod
    def zero(cls, heads: Mapping[str, Units], per: Per) -> "Sums":
        """Nothing yet."""
        totals = {name: torch.zeros(one.count(per), dtype=torch.float64) for name, one in heads.items()}
        return cls(totals, {name: torch.zeros((), dtype=torch.float64) for name in heads})

    def add(self, name: str, total: Tensor, count: float) -> None:
        """Adds what one batch gives for one attention."""
        self.totals[name] += total.detach().double().cpu()
        self.counts[name] += count


@dataclass(frozen=True)
class Importance(ABC):
    """How much a head matters; the higher, the longer it stays."""

    needs_data: ClassVar[bool] = True

    @abstractmethod
    def sums(self, model: nn.Module, heads: Mapping[str, Units], per: Per, trials: Sequence[Trial]) -> Sums:
        """The sums over batches.

        Args:
            model: The model, in eval mode.
            heads: Its heads.
            per: Whether heads are query heads or KV heads.
            trials: The batches.

        Raises:
            ValueError: If a batch gives none, or the loss does not depend on the heads of a layer.
        """


@dataclass(frozen=True)
class GateGradient(Importance):
    """I_h = E_x |dL(x) / d gate_h| = E_x |Att_h(x)^T dL(x) / d Att_h(x)| (Michel et al., 1905.10650, section 4.1, equation 2).

    One backward pass a batch gives it for all heads. The loss is taken as it is: where it is a mean over a batch, batches
    should be of one size.

    Args:
        each: Of what the absolute value is taken, and the mean over: `"token"`, as the authors' code does, `"example"` (a
            sequence or image), or `"batch"`. Signs within what is summed first cancel, so they rank differently.

    Raises:
        ValueError: If `each` is not one of these.
    """

    each: Each = "token"

    def __post_init__(self) -> None:
        if self.each not in get_args(Each):
            raise ValueError(f"each={self.each!r} must be one of {', '.join(get_args(Each))}")

    def sums(self, model: nn.Module, heads: Mapping[str, Units], per: Per, trials: Sequence[Trial]) -> Sums:
        """See `Importance.sums`."""
        sums = Sums.zero(heads, per)
        for trial in trials:
            for name, products in products_of(model, heads, per, trial).items():
                flat = products.flatten(1, -2) if products.dim() > 2 else products.unsqueeze(1)
                if self.each == "token":
                    sums.add(name, flat.abs().sum((0, 1)), counted(products, trial.tokens.get(name)))
                elif self.each == "example":
                    sums.add(name, flat.sum(1).abs().sum(0), len(flat))
                else:
                    sums.add(name, flat.sum((0, 1)).abs(), 1)
        return sums


@dataclass(frozen=True)
class Taylor(Importance):
    """How much the loss changes, to first order, when a head's parameters become zero: |sum of W dL/dW|, mean over batches.

    The parameters of a head are the rows that make its queries (and keys and values where it has its own) and the columns that
    read it (LLM-Pruner, 2305.11627, section 3.2, equations 3 and 5).

    Args:
        elementwise: Whether the absolute value is taken of each parameter (equation 5), not of a head's sum (equation 3).
    """

    elementwise: bool = False

    def sums(self, model: nn.Module, heads: Mapping[str, Units], per: Per, trials: Sequence[Trial]) -> Sums:
        """See `Importance.sums`."""
        sums, names = Sums.zero(heads, per), _names(heads, per)
        with _trained(model, names) as parameters:
            for trial in trials:
                with torch.enable_grad():
                    gradients = torch.autograd.grad(scalar(trial.loss()), list(parameters.values()), allow_unused=True)
                found = dict(zip(parameters, gradients, strict=True))
                for name, one in heads.items():
                    if all(found[member.name] is None for member in one.held_by(per)):
                        raise ValueError(independent(name))
                    products = {m.name: _product(parameters[m.name], found[m.name], self.elementwise) for m in one.held_by(per)}
                    total = _over_members(one, per, products)
                    sums.add(name, total if self.elementwise else total.abs(), 1)
        return sums


@dataclass(frozen=True)
class WeightNorm(Importance):
    """The L2 norm of a head's own parameters: the rows that make it and the columns that read it; needs no data."""

    needs_data: ClassVar[bool] = False

    def sums(self, model: nn.Module, heads: Mapping[str, Units], per: Per, trials: Sequence[Trial]) -> Sums:
        """See `Importance.sums`."""
        sums = Sums.zero(heads, per)
        for name, one in heads.items():
            squares = {m.name: model.get_parameter(m.name).detach().double().square() for m in one.held_by(per)}
            sums.add(name, _over_members(one, per, squares).sqrt(), 1)
        return sums


@dataclass(frozen=True)
class ActivationNorm(Importance):
    """The mean over tokens of the L2 norm of what a head gives (2407.14679, section 2.2, summed over tokens); needs no loss."""

    def sums(self, model: nn.Module, heads: Mapping[str, Units], per: Per, trials: Sequence[Trial]) -> Sums:
        """See `Importance.sums`."""
        sums = Sums.zero(heads, per)
        for trial in trials:
            handles = []
            for name, one in heads.items():
                note = partial(self._note, sums, name, one, per, trial.tokens.get(name))
                handles.append(model.get_submodule(one.readers[0]).register_forward_pre_hook(note))
            try:
                with torch.no_grad():
                    trial.loss()
            finally:
                for handle in handles:
                    handle.remove()
        return sums

    @staticmethod
    def _note(sums: Sums, name: str, heads: Units, per: Per, tokens: Tensor | None, _: nn.Module, args: tuple[Any, ...]) -> None:
        norms = counting(by_head(args[0].detach().float().square(), heads, per).sqrt(), tokens)
        sums.add(name, norms.flatten(0, -2).sum(0), counted(norms, tokens))


@dataclass(frozen=True)
class RandomUnits(Importance):
    """Random scores, the baseline: uniform in [0, 1), the same ones for the same seed; needs no data.

    Args:
        seed: Of the random numbers.
    """

    needs_data: ClassVar[bool] = False
    seed: int = 0

    def sums(self, model: nn.Module, heads: Mapping[str, Units], per: Per, trials: Sequence[Trial]) -> Sums:
        """See `Importance.sums`."""
        sums, generator = Sums.zero(heads, per), torch.Generator().manual_seed(self.seed)
        for name, one in heads.items():
            sums.add(name, torch.rand(one.count(per), generator=generator), 1)
        return sums


@dataclass(frozen=True)
class Ablation(Importance):
    """How much higher the loss is without the head, all others being there (1905.10650, section 3.2): one forward a head."""

    def sums(self, model: nn.Module, heads: Mapping[str, Units], per: Per, trials: Sequence[Trial]) -> Sums:
        """See `Importance.sums`."""
        sums = Sums.zero(heads, per)
        with ablating(model, heads, per) as gates, torch.no_grad():
            for trial in trials:
                whole = float(trial.loss())
                for name, gate in gates.items():
                    losses = [_without(trial, gate, head) for head in range(len(gate))]
                    sums.add(name, torch.tensor(losses, dtype=torch.float64) - whole, 1)
        return sums


@contextmanager
def ablating(model: nn.Module, heads: Mapping[str, Units], per: Per) -> Iterator[dict[str, Tensor]]:
    """Gates that are to be set by hand, all 1."""
    gates = {name: torch.ones(one.count(per)) for name, one in heads.items()}
    handles = place_gates(model, heads, gates, per)
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _without(trial: Trial, gate: Tensor, head: int) -> float:
    gate[head] = 0
    try:
        return float(trial.loss())
    finally:
        gate[head] = 1


def _names(heads: Mapping[str, Units], per: Per) -> list[str]:
    return list(dict.fromkeys(member.name for one in heads.values() for member in one.held_by(per)))


@contextmanager
def _trained(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Parameters by name, which need gradients for now."""
    parameters = {name: model.get_parameter(name) for name in names}
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield dict(parameters)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])


def _product(weight: Tensor, gradient: Tensor | None, elementwise: bool) -> Tensor:
    product = weight.detach().double() * (0 if gradient is None else gradient.double())
    return product.abs() if elementwise else product


def _over_members(heads: Units, per: Per, values: Mapping[str, Tensor]) -> Tensor:
    """Sums something over the parameters of each head: float64, `[heads]`."""
    total = torch.zeros(heads.count(per), dtype=torch.float64)
    for member in heads.held_by(per):
        of = torch.from_numpy(heads.of_member(member, per))
        along = values[member.name].movedim(member.dim, 0)
        along = along.reshape(len(along), -1).sum(1)
        total.index_add_(0, of[of >= 0], along.cpu()[of >= 0])
    return total
