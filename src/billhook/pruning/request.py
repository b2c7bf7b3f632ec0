"""From ratios or a target to a plan: what each unit is worth, how many go, and what the model then costs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.importance.base import Importance
from billhook.importance.score import Reduce, score, trial_of
from billhook.importance.taylor import Taylor
from billhook.model.figures import Figures, figures_of
from billhook.model.find import find_transformer
from billhook.model.meta import to_meta
from billhook.pruning.amount import RATIOS, Amount, Ranking
from billhook.pruning.choice import choose_units, free, most, protected_places
from billhook.pruning.plan import Plan, plan_found
from billhook.pruning.removal import carry_out
from billhook.running.batches import Loss
from billhook.running.undisturbed import resting
from billhook.tracing.coupling import Structure
from billhook.tracing.trace import trace
from billhook.units.channels import find_units, of_kind
from billhook.units.fields import FieldFinder
from billhook.units.units import Per, Units


def plan(
    model: nn.Module,
    importance: Importance | None = None,
    batches: Iterable[Any] | None = None,
    *,
    heads: float | None = None,
    kv_heads: float | None = None,
    channels: float | None = None,
    residual: float | None = None,
    experts: float | None = None,
    params: int | float | None = None,
    flops: int | float | None = None,
    kv_cache_bytes: int | float | None = None,
    bytes: int | float | None = None,
    ranking: Ranking = "layer",
    first: int = 0,
    last: int = 0,
    round_to: int = 1,
    min_units: int = 1,
    normalize: bool = False,
    loss: Loss | None = None,
) -> Plan:
    """Chooses the least important units of a model, for `apply`; the model stays as it is (LLM-Pruner, 2305.11627, section 3).

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        importance: What a unit is worth: `Taylor()` (the paper's; the default), `OBS`, `OutputNorm`, `GateGradient`,
            `WeightNorm`, `ActivationNorm` or `RandomUnits`.
        batches: What the model's forward takes, as dictionaries, labels included; a causal language model's own inputs are its
            labels where there are none. Padding (by `attention_mask`) does not count.
        heads: See `Amount`, as for all up to `min_units`.
        kv_heads: As there.
        channels: As there.
        residual: As there.
        experts: As there.
        params: As there.
        flops: As there.
        kv_cache_bytes: As there.
        bytes: As there.
        ranking: As there.
        first: As there.
        last: As there.
        round_to: As there.
        min_units: As there.
        normalize: Whether the scores of each place are divided by their L2 norm, which matters for `ranking="global"` alone.
        loss: What of a batch is to be small; by default the loss that the model gives.

    Returns:
        The plan; `print` shows it, with what the model then costs.

    Raises:
        ValueError: If an argument is not legal, a target cannot be reached (then with what can), the units may not be removed,
            or the importance cannot be told, as without batches, labels or a finite gradient.
    """
    amount = Amount(
        heads, kv_heads, channels, residual, experts, params, flops, kv_cache_bytes, bytes,
        ranking, first, last, round_to, min_units,
    )  # fmt: skip
    request = Request(find_transformer(model), amount)
    pairs = None if batches is None else [(batch, loss) for batch in batches]
    return request.plan(request.scores(importance or Taylor(), pairs, normalize))


class Request:
    """An amount, asked of a model as it is; refused at once if it cannot be had.

    Args:
        model: The model.
        amount: How much goes.

    Raises:
        ValueError: If it cannot, or the units may not be removed.

    Attributes:
        units: The model's units of the kinds that are asked for, by place.
        structure: What `trace` has found.
    """

    def __init__(self, model: PreTrainedModel, amount: Amount) -> None:
        self.model, self.amount = model, amount
        self.structure: Structure = trace(model)
        kinds = dict.fromkeys(kind for kind, _ in amount.asked.values())
        self.units: dict[str, Units] = find_units(model, kinds, self.structure)
        self.per: Per = "head" if "heads" in amount.asked else "kv_head"
        self._protected = protected_places(model, self.units, amount)
        self._ratios: dict[str, float] | None = None
        self._finder = FieldFinder(model)
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], Figures] = {}
        self._chosen(self._flat())

    def scores(
        self,
        importance: Importance,
        batches: Iterable[tuple[Any, Loss | None]] | None,
        normalize: bool = False,
        reduce: Reduce | None = None,
    ) -> dict[str, Tensor]:
        """What the units that may go are worth, by place.

        Args:
            importance: How that is told.
            batches: Batches, each with its loss, None for the model's own.
            normalize: Whether the scores of each place are divided by their L2 norm.
            reduce: Sums over ranks.

        Raises:
            ValueError: If that cannot be told.
        """
        own = self.free()
        if importance.needs_data and batches is None:
            raise ValueError(f"batches=None: {type(importance).__name__} needs batches")
        needed = batches if importance.needs_data and batches is not None else ()
        with resting(self.model):
            trials = [trial_of(self.model, own, *pair) for pair in needed]
            return score(self.model, own, importance, trials, normalize, self.per, reduce)

    def free(self) -> dict[str, Units]:
        """The places that may lose units."""
        asked = dict.fromkeys(kind for kind, _ in self.amount.asked.values())  # in one order on every rank
        return {name: one for kind in asked for name, one in free(of_kind(self.units, kind), self._protected).items()}

    def plan(self, scores: Mapping[str, Tensor]) -> Plan:
        """The plan that these scores lead to, with what the model costs before and then.

        Raises:
            ValueError: As at first, as which units go may matter.
        """
        found = self._chosen(scores)
        return replace(found, costs=(self._now, self._costs(found)))

    def _flat(self) -> dict[str, Tensor]:
        """Scores that prefer nobody."""
        return {name: torch.zeros(one.count(self.per)) for name, one in self.units.items()}

    def _planned(self, scores: Mapping[str, Tensor], ratios: Mapping[str, float]) -> Plan:
        gone = choose_units(self.units, scores, self.amount, ratios, self._protected)
        return plan_found(self.model, self.structure, self.units, gone)

    def _chosen(self, scores: Mapping[str, Tensor]) -> Plan:
        if self._ratios is None or self.amount.ranking == "global":
            self._ratios = self._found_ratios(scores)
        found = self._planned(scores, self._ratios)
        if not found.units:
            rounded = f" (round_to={self.amount.round_to})" if self.amount.round_to > 1 else ""
            raise ValueError(f"{_said(self._ratios)}{rounded} is not a single unit of a place, so that nothing would be removed")
        return found

    def _found_ratios(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        """The ratios that are given, and those that lead to the target."""
        ratios, target, names = self.amount.ratios, self.amount.target, self.amount.open
        if target is None:
            return ratios
        limit = self._limit(target)
        common = self._found(scores, names, ratios, target, limit)
        ratios |= {name: min(common, self._most(name)) for name in names}
        if len(names) > 1:  # heads are few and large: channels alone then come as close as they can
            ratios[names[-1]] = self._found(scores, names[-1:], ratios, target, limit)
        return ratios

    def _found(
        self, scores: Mapping[str, Tensor], names: Sequence[str], ratios: dict[str, float], target: str, limit: int
    ) -> float:
        """The lowest ratio, of several kinds alike, beside other ratios, at which a target is met.

        Raises:
            ValueError: If there is none: with what can be reached.
        """
        tried = self._tries(names)

        def cost(number: int) -> int:
            own = {name: min(tried[number], self._most(name)) for name in names}
            return self._cost(self._planned(scores, ratios | own), target)

        place = lowest(len(tried), cost, limit)
        if place is None:
            asked, reached = getattr(self.amount, target), f"{cost(len(tried) - 1):,} to {cost(0):,}"
            raise ValueError(f"{target}={asked}: {limit:,} cannot be reached; with what may go, {reached} can")
        return tried[place]

    def _limit(self, target: str) -> int:
        """A target in numbers.

        Raises:
            ValueError: If the model has none of it, or no more than that already.
        """
        asked, now = getattr(self.amount, target), getattr(self._now, target)
        if now is None:
            raise ValueError(f"{target}={asked}: it cannot be told of a {type(self.model).__name__}")
        limit = int(asked * now) if isinstance(asked, float) else int(asked)
        if limit >= now:
            raise ValueError(f"{target}={asked}: the model has no more than that, {now:,}")
        return limit

    @cached_property
    def _now(self) -> Figures:
        return figures_of(self.model)

    def _tries(self, names: Sequence[str]) -> list[float]:
        """The ratios at which a unit more goes."""
        tries = {0.0}
        for name in names:
            kind, per = RATIOS[name]
            counts = [one.count(per) for one in free(of_kind(self.units, kind), self._protected).values()]
            steps = dict.fromkeys(counts if self.amount.ranking == "layer" else [sum(counts)])
            tries |= {number / count for count in steps for number in range(count)}
        return sorted(tries)

    def _most(self, name: str) -> float:
        return most(self.units, name, self.amount, self._protected)

    def _cost(self, found: Plan, target: str) -> int:
        if target == "params":
            return found.parameters[1]
        if target == "bytes":
            sizes = {name: (p.element_size(), p.shape) for name, p in self.model.named_parameters()}
            return sum(size * math.prod(_left(found, name, shape)) for name, (size, shape) in sizes.items())
        value: int = getattr(self._costs(found), target)
        return value

    def _costs(self, found: Plan) -> Figures:
        """What the model costs when a plan has been carried out, on meta tensors; how many units go decides it, not which."""
        left = tuple(found.after.items())
        if left not in self._known:
            shadow = to_meta(self.model)
            carry_out(found, shadow, self.structure, self.units, finder=self._finder)
            self._known[left] = figures_of(shadow)
        return self._known[left]


def lowest(count: int, cost: Callable[[int], int], limit: int) -> int | None:
    """The first of some numbers from 0 at which a cost, which falls, is within a limit; None if it never is.

    It is looked for where it would be if the cost fell evenly, and every other time in the middle.

    >>> lowest(100, lambda number: 1000 - 7 * number, 500)
    72
    """
    low, high = -1, count - 1
    above, below = cost(0), cost(high)
    if below > limit:
        return None
    halve = False
    while high - low > 1:
        even = low + (above - limit) / max(above - below, 1) * (high - low)
        middle = (low + high) // 2 if halve else min(max(math.ceil(even), low + 1), high - 1)
        if (now := cost(middle)) <= limit:
            high, below = middle, now
        else:
            low, above = middle, now
        halve = not halve and high - low > 8
    return high


def _left(found: Plan, name: str, shape: Sequence[int]) -> list[int]:
    return [len(found.cuts.get((name, d), range(n))) for d, n in enumerate(shape)]


def _said(ratios: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={ratio:g}" for name, ratio in ratios.items())
