"""The history of head pruning in a training run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from billhook.plots.heads import heads
from billhook.plots.style import Plot


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
