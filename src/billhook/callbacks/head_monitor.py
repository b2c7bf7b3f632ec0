"""Decides from a validation figure whether a round of head pruning is undone."""

import re
from collections.abc import Mapping
from typing import Literal

from billhook.arguments import fraction, one_of

Mode = Literal["max", "min"]
KEEP = 0.9
HIGHER = {
    "acc",
    "accuracy",
    "auc",
    "auroc",
    "bleu",
    "f",
    "mcc",
    "precision",
    "recall",
    "rouge",
    "rougel",
    "corr",
    "spearman",
    "pearson",
}
LOWER = {"loss", "nll", "ce", "kl", "perplexity", "ppl", "error", "err", "mse", "rmse", "mae", "wer", "cer"}
"""Words in the names of figures that are better when higher, or lower."""


class Monitor:
    """A validation figure that must stay within a share of the best that it has been (Michel et al., 2019, section 4.1).

    >>> monitor = Monitor("val_accuracy", keep=0.9)
    >>> monitor.begin({"val_accuracy": 0.8})
    >>> monitor.is_worse({"val_accuracy": 0.75}), monitor.is_worse({"val_accuracy": 0.7})
    (False, True)
    """

    def __init__(
        self, name: str | None, keep: float | None = None, mode: Mode | None = None, measure_batches: int | None = None
    ) -> None:
        if name is None and (given := [f"{key}={own!r}" for key, own in {"keep": keep, "mode": mode}.items() if own is not None]):
            raise ValueError(f"{given[0]} is of a figure that is monitored: give monitor, the name of one that validation logs")
        if name is not None and measure_batches == 0:
            raise ValueError(f"measure_batches=0: monitor={name!r} needs validation after each round")
        self.name, self.keep = name, KEEP if keep is None else keep
        fraction("keep", self.keep, "(0, 1]")
        self.mode = _mode(name) if mode is None and name is not None else mode
        one_of("mode", self.mode or "max", Mode)
        self.best: float | None = None

    def begin(self, values: Mapping[str, float]) -> None:
        """Takes a figure of the model as it is, of which the best counts."""
        value = self.of(values)
        if value is not None and (self.best is None or self._gain(value) > 0 or self.best != self.best):
            self.best = value

    def of(self, values: Mapping[str, float]) -> float | None:
        """Returns the figure, and refuses a validation that does not log it; None if none is monitored."""
        if self.name is None:
            return None
        if self.name not in values:
            logged = ", ".join(values) or "nothing"
            raise ValueError(f"monitor={self.name!r} is not logged by validation, which logs {logged}")
        return values[self.name]

    def is_worse(self, values: Mapping[str, float]) -> bool:
        """Returns whether the figure has become worse than allowed."""
        value = self.of(values)
        if value is None or self.best is None:
            return False
        share = 1 - self.keep if self.mode == "max" else 1 / self.keep - 1
        return not -self._gain(value) <= share * abs(self.best)  # NaN is worse, too

    def _gain(self, value: float) -> float:
        assert self.best is not None
        return value - self.best if self.mode == "max" else self.best - value


def _mode(name: str) -> Mode:
    """Reads off a figure's name whether higher or lower is better; refuses one that does not say it.

    >>> _mode("val/f1"), _mode("val_loss/dataloader_idx_0")
    ('max', 'min')
    """
    words = set(re.findall("[a-z]+", name.partition("/dataloader_idx")[0].lower()))
    if bool(words & HIGHER) == bool(words & LOWER):
        raise ValueError(f"mode: whether a higher or a lower {name!r} is better is not to be seen: give mode='max' or 'min'")
    return "max" if words & HIGHER else "min"
