"""Scores the heads of the model in a fit, and chooses those that are masked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.engine.passes import blockwise
from billhook.engine.sharding import sizes_only
from billhook.fit.calibration import FitCalibration, gradient_precision
from billhook.fit.measure import log_plot
from billhook.fit.ranks import comm_of, on_first_rank
from billhook.importance.score import Importance, make_run, score_units
from billhook.model.find import find_transformer
from billhook.plots.heads import heads
from billhook.plots.style import Plot
from billhook.pruning.choice import HeadOptions, choose, choose_including
from billhook.pruning.planning import plan_units
from billhook.units.find import find_units
from billhook.units.units import Units


@dataclass
class HeadRecord:
    """Heads by their first numbers, their last scores, and a metric at each share of removed heads; by attention."""

    first: dict[str, int] = field(default_factory=dict)  # how many heads there were at first
    numbers: dict[str, list[int]] = field(default_factory=dict)  # the first numbers of the remaining heads
    scores: dict[str, Tensor] = field(default_factory=dict)  # `[heads at first]`, NaN for those that had none
    # shares of heads that are gone, each with the metric: before and after each round
    curve: list[tuple[float, float]] = field(default_factory=list)
    metric: str = ""  # its name

    def begin(self, counts: Mapping[str, int]) -> None:
        """Sets how many heads there are, unless that is known."""
        self.first = self.first or dict(counts)
        self.numbers = self.numbers or {name: list(range(count)) for name, count in counts.items()}

    def scored(self, scores: Mapping[str, Tensor]) -> None:
        """Keeps scores of the remaining heads."""
        self.scores = {name: torch.full([count], torch.nan) for name, count in self.first.items()}
        for name, values in scores.items():
            self.scores[name][self.numbers[name]] = values

    def removed(self, heads: Mapping[str, Sequence[int]]) -> None:
        """Drops heads that have been removed."""
        for name, numbers in heads.items():
            self.numbers[name] = [number for i, number in enumerate(self.numbers[name]) if i not in numbers]

    def left(self, ratio: float) -> float:
        """Converts a fraction of the first heads into one of the remaining heads."""
        first, now = sum(self.first.values()), sum(map(len, self.numbers.values()))
        return max(0.0, (ratio * first - first + now) / now) if now else ratio

    def gone(self, masked: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Returns the first numbers of heads that are removed or masked."""
        stay = {
            name: {n for i, n in enumerate(numbers) if i not in masked.get(name, ())} for name, numbers in self.numbers.items()
        }
        return {name: sorted(set(range(count)) - stay[name]) for name, count in self.first.items()}

    def note(
        self,
        trainer: pl.Trainer,
        masked: Mapping[str, Sequence[int]],
        metric: str,
        before: Mapping[str, float],
        after: Mapping[str, float],
    ) -> None:
        """Adds a round to the curve, and gives the picture to loggers that take figures."""
        removed = self.gone(masked)
        share, last = sum(map(len, removed.values())) / sum(self.first.values()), self.curve[-1][0] if self.curve else 0.0
        self.metric = metric
        self.curve += [(at, values[metric]) for at, values in ((last, before), (share, after)) if metric in values]
        if trainer.loggers:
            on_first_rank(trainer, "HeadPruning", lambda: log_plot(trainer, "heads", self.draw(masked)))

    def draw(self, masked: Mapping[str, Sequence[int]]) -> Plot:
        """Draws the scores of the heads, which are removed or masked, and the curve of the metric."""
        return heads(self.scores, self.gone(masked), self.curve, self.metric, any(map(len, masked.values())))


@dataclass(frozen=True, eq=False)
class HeadRanking:
    """How heads are scored and chosen in a fit."""

    importance: Importance
    options: HeadOptions
    removes: bool  # and does not only mask

    def check(self, model: PreTrainedModel, record: HeadRecord, ratio: float) -> None:
        """Refuses a ratio that cannot be reached, with the least that removes a head, and heads that cannot be removed."""
        heads = find_units(model, "head")
        flat = {name: torch.zeros(units.count(self.options.per)) for name, units in heads.items()}
        chosen = self._lowest(heads, record.left(ratio), flat)
        if ratio > 0 and not chosen and not record.first:
            total = sum(map(len, flat.values()))
            least = next((number / total for number in range(1, total) if self._lowest(heads, number / total, flat)), None)
            which = f"the smallest ratio that does is {least:.4g}" if least else "no ratio does"
            raise ValueError(f"ratio={ratio} removes no head; {which}")
        if self.removes:
            with sizes_only(model):
                plan_units(model, chosen, per=self.options.per)

    def choose(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        calibration: FitCalibration,
        record: HeadRecord,
        masked: Mapping[str, Sequence[int]],
        ratio: float,
    ) -> dict[str, list[int]]:
        """Returns the heads to mask of the model as it is, among them all that are masked already; the record gets the scores."""
        model = find_transformer(pl_module)
        heads = find_units(model, "head")
        record.begin({name: units.count(self.options.per) for name, units in heads.items()})
        with calibration.undisturbed(pl_module), gradient_precision(trainer), blockwise(pl_module):
            pairs = calibration.pairs(trainer, pl_module) if self.importance.needs_data else ()
            trials = [make_run(model, heads, *pair) for pair in pairs]
            scores = score_units(
                model, heads, self.importance, trials, None, self.options.normalize, self.options.per, comm_of(trainer)
            )
        lowest = partial(self._lowest, heads, record.left(ratio))
        record.scored(scores)
        return choose_including(lowest, masked, scores)

    def _lowest(self, heads: Mapping[str, Units], ratio: float, scores: Mapping[str, Tensor]) -> dict[str, list[int]]:
        return choose(heads, scores, ratio, self.options.ranking, self.options.min_heads, self.options.per, self.removes)
