"""Records the heads of a model in a fit by their first numbers: scores, removals, and a metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor

from billhook.fit.loggers import log_picture
from billhook.fit.ranks import by_first
from billhook.plots.heads import heads


@dataclass
class HeadRecord:
    """Heads by their first numbers, their last scores, and a metric at each share of removed heads; by attention."""

    first: dict[str, int] = field(default_factory=dict)  # how many heads there were at first
    numbers: dict[str, list[int]] = field(default_factory=dict)  # the first numbers of the remaining heads
    scores: dict[str, Tensor] = field(default_factory=dict)  # `[heads at first]`, NaN for those that had none
    # shares of heads that are gone, each with the metric: before and after each round
    curve: list[tuple[float, float]] = field(default_factory=list)

    def begin(self, counts: Mapping[str, int]) -> None:
        """Sets how many heads there are, unless that is known."""
        self.first = self.first or dict(counts)
        self.numbers = self.numbers or {name: list(range(count)) for name, count in counts.items()}

    def scored(self, scores: Mapping[str, Tensor]) -> None:
        """Keeps scores of the remaining heads."""
        self.scores = {name: torch.full([count], torch.nan) for name, count in self.first.items()}
        for name, own in scores.items():
            self.scores[name][self.numbers[name]] = own

    def removed(self, heads: Mapping[str, Sequence[int]]) -> None:
        """Drops heads that have been removed."""
        for name, own in heads.items():
            self.numbers[name] = [number for i, number in enumerate(self.numbers[name]) if i not in own]

    def left(self, ratio: float) -> float:
        """Converts a fraction of the first heads into one of the remaining heads."""
        first, now = sum(self.first.values()), sum(map(len, self.numbers.values()))
        return max(0.0, (ratio * first - first + now) / now) if now else ratio

    def gone(self, masked: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Returns the first numbers of heads that are removed or masked."""
        stay = {name: {n for i, n in enumerate(own) if i not in masked.get(name, ())} for name, own in self.numbers.items()}
        return {name: sorted(set(range(count)) - stay[name]) for name, count in self.first.items()}

    def draw(
        self,
        trainer: pl.Trainer,
        masked: Mapping[str, Sequence[int]],
        metric: str,
        before: Mapping[str, float],
        after: Mapping[str, float],
        path: str | None,
    ) -> None:
        """Adds to the curve, and draws it next to the heads: to a file, and to loggers that take figures."""
        gone = self.gone(masked)
        share, last = sum(map(len, gone.values())) / sum(self.first.values()), self.curve[-1][0] if self.curve else 0.0
        self.curve += [(at, found[metric]) for at, found in ((last, before), (share, after)) if metric in found]
        if path or trainer.loggers:
            still = any(map(len, masked.values()))
            by_first(trainer, "HeadPruning", partial(self._draw, trainer, gone, metric, path, still))

    def _draw(self, trainer: pl.Trainer, gone: Mapping[str, Sequence[int]], metric: str, path: str | None, masked: bool) -> None:
        figure = heads(self.scores, gone, self.curve, metric, masked)
        log_picture(trainer, "heads", figure)
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
