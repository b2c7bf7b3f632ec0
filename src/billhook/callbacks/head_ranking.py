"""Scores attention heads during training and selects the heads to mask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.engine.passes import blockwise
from billhook.engine.sharding import sizes_only
from billhook.fit.calibration import FitCalibration
from billhook.fit.fit import Fit
from billhook.fit.ranks import comm_of
from billhook.importance.score import Importance, make_run, score_units
from billhook.plots.heads import heads
from billhook.plots.style import Plot
from billhook.pruning.choice import HeadOptions, choose, choose_including
from billhook.pruning.planning import plan_units
from billhook.units.find import find_units
from billhook.units.units import Units


@dataclass
class HeadRecord:
    """History of head pruning by attention module: original indices, scores, and the metric."""

    first: dict[str, int] = field(default_factory=dict)  # original number of heads
    numbers: dict[str, list[int]] = field(default_factory=dict)  # original indices of the remaining heads
    scores: dict[str, Tensor] = field(default_factory=dict)  # `[original heads]`, NaN for heads without a score
    # fraction of removed heads and metric, before and after each round
    curve: list[tuple[float, float]] = field(default_factory=list)
    metric: str = ""  # its name

    def begin(self, counts: Mapping[str, int]) -> None:
        """Sets the original number of heads, once."""
        self.first = self.first or dict(counts)
        self.numbers = self.numbers or {name: list(range(count)) for name, count in counts.items()}

    def scored(self, scores: Mapping[str, Tensor]) -> None:
        """Stores scores of the remaining heads."""
        self.scores = {name: torch.full([count], torch.nan) for name, count in self.first.items()}
        for name, values in scores.items():
            self.scores[name][self.numbers[name]] = values

    def removed(self, heads: Mapping[str, Sequence[int]]) -> None:
        """Drops removed heads."""
        for name, numbers in heads.items():
            self.numbers[name] = [number for i, number in enumerate(self.numbers[name]) if i not in numbers]

    def left(self, ratio: float) -> float:
        """Converts a fraction of the original heads to a fraction of the remaining heads."""
        first, now = sum(self.first.values()), sum(map(len, self.numbers.values()))
        return max(0.0, (ratio * first - first + now) / now) if now else ratio

    def inactive(self, masked: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Returns the original indices of removed and masked heads."""
        inactive = {}
        for name, count in self.first.items():
            masked_here = masked.get(name, ())
            active = {number for i, number in enumerate(self.numbers[name]) if i not in masked_here}
            inactive[name] = sorted(set(range(count)) - active)
        return inactive

    def note(
        self, masked: Mapping[str, Sequence[int]], metric: str, before: Mapping[str, float], after: Mapping[str, float]
    ) -> None:
        """Adds a round to the curve."""
        removed = self.inactive(masked)
        share, last = sum(map(len, removed.values())) / sum(self.first.values()), self.curve[-1][0] if self.curve else 0.0
        self.metric = metric
        self.curve += [(at, values[metric]) for at, values in ((last, before), (share, after)) if metric in values]

    def draw(self, masked: Mapping[str, Sequence[int]]) -> Plot:
        """Plots head scores, removed and masked heads, and the metric."""
        return heads(self.scores, self.inactive(masked), self.curve, self.metric, any(map(len, masked.values())))


@dataclass(frozen=True, eq=False)
class HeadRanking:
    """Settings for scoring and selecting heads during training."""

    importance: Importance
    options: HeadOptions
    removes: bool  # from the tensors, not only by masks

    def check(self, model: PreTrainedModel, record: HeadRecord, ratio: float) -> None:
        """Raises `ValueError` if the ratio removes no head, or heads cannot be removed."""
        heads = find_units(model, "head")
        equal_scores = {name: torch.zeros(units.count(self.options.per)) for name, units in heads.items()}
        chosen = self._lowest(heads, record.left(ratio), equal_scores)
        if ratio > 0 and not chosen and not record.first:
            total = sum(map(len, equal_scores.values()))
            least = next(
                (number / total for number in range(1, total) if self._lowest(heads, number / total, equal_scores)), None
            )
            fix = f"The smallest ratio that removes a head is {least:.4g}." if least else "No ratio removes a head of this model."
            raise ValueError(f"ratio={ratio} removes no head. {fix}")
        if self.removes:
            with sizes_only(model):
                plan_units(model, chosen, per=self.options.per)

    def choose(
        self,
        fit: Fit,
        calibration: FitCalibration,
        record: HeadRecord,
        masked: Mapping[str, Sequence[int]],
        ratio: float,
    ) -> dict[str, list[int]]:
        """Returns the heads to mask, including heads that are masked already; records the scores."""
        model = fit.model
        heads = find_units(model, "head")
        record.begin({name: units.count(self.options.per) for name, units in heads.items()})
        with calibration.undisturbed(fit), fit.gradient_context(), blockwise(fit.module):
            pairs = calibration.pairs(fit) if self.importance.needs_data else ()
            trials = [make_run(model, heads, *pair) for pair in pairs]
            scores = score_units(
                model, heads, self.importance, trials, None, self.options.normalize, self.options.per, comm_of(fit)
            )
        lowest = partial(self._lowest, heads, record.left(ratio))
        record.scored(scores)
        return choose_including(lowest, masked, scores)

    def _lowest(self, heads: Mapping[str, Units], ratio: float, scores: Mapping[str, Tensor]) -> dict[str, list[int]]:
        return choose(heads, scores, ratio, self.options.ranking, self.options.min_heads, self.options.per, self.removes)
