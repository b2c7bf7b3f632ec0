"""Settings of a budgeted search: the budget, and how to search."""

from dataclasses import dataclass, fields

from billhook.arguments import check_int, check_number, check_types
from billhook.importance.score import Importance
from billhook.pruning.amount import Amount, RoundTo
from billhook.pruning.repair import RepairOption

ANY = 1 - 1e-9
"""Fraction that every smaller model meets."""


@dataclass(frozen=True)
class Budget:
    """The limit on a smaller model: its size or its quality loss.

    Exactly one field is set.

    Args:
        params: Maximum number (int) or fraction (float) of parameters.
        bytes: Maximum bytes of all parameters, as a number (int) or fraction (float).
        max_loss: Quality budget: finds the fewest parameters at which perplexity on held-out batches (geometric mean over
            sources) is at most this many times the dense model's, such as 1.1.

    Raises:
        ValueError: If not exactly one budget is set, or its value is out of range.

    >>> import billhook as bh
    >>> bh.Budget(params=0.8).words
    'params=0.8'
    """

    params: int | float | None = None
    bytes: int | float | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        check_types(Budget, vars(self))
        names = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(names) != 1:
            raise ValueError(f"Budget requires exactly one of {', '.join(vars(self))}; got {' and '.join(names) or 'none'}.")
        if self.max_loss is not None:
            check_number("max_loss", self.max_loss, above=1)
        self.amount(Search())

    def amount(self, search: "Search") -> Amount:
        """Returns the budget as an `Amount`; `max_loss` allows any smaller model."""
        params = self.params if self.max_loss is None else ANY
        return Amount(params=params, bytes=self.bytes, first=search.first, last=search.last, round_to=search.round_to)

    @property
    def words(self) -> str:
        """The budget as `name=value`."""
        return next(f"{name}={value}" for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True)
class Search:
    """Settings of a budgeted search.

    Args:
        importance: Scores the units; the lowest scores are removed first. Defaults to `OBS()`.
        repair: Least-squares repair of the consumer layers. `"auto"` uses `RepairConfig()` if there are enough tokens, and
            otherwise warns and skips the repair. None keeps the old weights.
        first: Number of blocks to protect at the start of each stack.
        last: Number of blocks to protect at the end of each stack.
        round_to: Width rounding: numbers of channels are rounded down to multiples of this. `"auto"` uses the largest of 256,
            128, 64, and 32 that removes at most 3% more channels. With uniform modules it also keeps 1, 2, 4, a multiple of 8, or
            all KV heads. 1 allows any number.
        generations: Rounds of evolutionary search. 0 uses the best knapsack solution.
        candidates: Number of candidates per round.

    Raises:
        ValueError: If a number is out of range.

    >>> import billhook as bh
    >>> quick = bh.Search(generations=0)
    """

    importance: Importance | None = None
    repair: RepairOption = "auto"
    first: int = 0
    last: int = 0
    round_to: RoundTo = "auto"
    generations: int = 8
    candidates: int = 8

    def __post_init__(self) -> None:
        check_types(Search, vars(self))
        for name, least in {"first": 0, "last": 0, "generations": 0, "candidates": 1}.items():
            check_int(name, getattr(self, name), least)
        if self.round_to != "auto":
            check_int("round_to", self.round_to)
