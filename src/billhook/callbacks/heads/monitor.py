"""Decides from a validation figure whether a round of head pruning is undone."""

from collections.abc import Mapping
from typing import Literal, get_args

Mode = Literal["max", "min"]


class Monitor:
    """A validation figure that must stay within a share of what it was at first (Michel et al., 2019, section 4.1).

    >>> monitor = Monitor("val_accuracy", keep=0.9)
    >>> monitor.begin({"val_accuracy": 0.8})
    >>> monitor.is_worse({"val_accuracy": 0.75}), monitor.is_worse({"val_accuracy": 0.7})
    (False, True)
    """

    def __init__(self, name: str | None, keep: float = 0.9, mode: Mode = "max", measure_batches: int | None = None) -> None:
        if name is not None and (not 0 < keep <= 1 or mode not in get_args(Mode) or measure_batches == 0):
            raise ValueError(f"monitor={name!r} needs keep={keep} in (0, 1], mode={mode!r} 'max' or 'min', and measure_batches")
        self.name, self.keep, self.mode = name, keep, mode
        self.start: float | None = None

    def begin(self, values: Mapping[str, float]) -> None:
        """Takes the first figure, unless there is one already."""
        self.start = self.of(values) if self.start is None else self.start

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
        if value is None or self.start is None:
            return False
        share = 1 - self.keep if self.mode == "max" else 1 / self.keep - 1
        worse = self.start - value if self.mode == "max" else value - self.start
        return not worse <= share * abs(self.start)  # NaN is worse, too
