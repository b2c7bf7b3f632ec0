"""The settings of a search for a smaller model: its budget, and how it searches."""

from dataclasses import dataclass, fields

from billhook.arguments import check_fraction, check_int, check_number, check_types
from billhook.importance.score import Importance
from billhook.pruning.amount import TARGETS, Amount, RoundTo
from billhook.pruning.repair import RepairOption

ANY = 1 - 1e-9
"""A budget that any smaller model meets."""


@dataclass(frozen=True)
class Budget:
    """Limits a smaller model by one of five: its size, its key/value cache, what it loses, or the time that it takes.

    Args:
        params: Parameters that are left at most, a number (int) or a fraction of those that are there (float).
        kv_cache_bytes: Bytes of the key/value cache per token, a number or a fraction. For it KV heads are removed, with the
            query heads that they serve, or merged by SVD, so that all query heads stay (`convert_kv_heads`): whichever loses
            less, decided for each attention, or where layers are uniform for all together. Heads merge where fewer divide their
            number, and the model can be converted; elsewhere they are removed. Whole blocks may go, no channels.
        bytes: Bytes of all parameters, a number or a fraction.
        max_loss: The fewest parameters at which perplexity on batches that nothing is fitted to, the geometric mean over their
            sources, is at most so many times the dense model's, such as 1.1.
        latency: The fraction of the dense model's time that is left at most, by this machine's clock, on the model's own device.
            A table of what each config of each layer takes leads the search; what it finds is timed beside the dense model
            before anything is cut, and searched for again where it takes too long.

    Raises:
        ValueError: If not exactly one is given, or it is out of range.

    >>> import billhook as bh
    >>> bh.Budget(params=0.8).words
    'params=0.8'
    """

    params: int | float | None = None
    kv_cache_bytes: int | float | None = None
    bytes: int | float | None = None
    max_loss: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        check_types(Budget, vars(self))
        names = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(names) != 1:
            raise ValueError(f"{' and '.join(names) or 'params=None'}: give one budget of {', '.join(vars(self))}")
        if self.max_loss is not None:
            check_number("max_loss", self.max_loss, above=1)
        if self.latency is not None:
            check_fraction("latency", self.latency, "(0, 1)", of="the dense model's time")
        self.amount(0, 0, "auto")

    def amount(self, first: int, last: int, round_to: RoundTo) -> Amount:
        """Returns the budget as an amount; for a loss or a time, any smaller model."""
        targets = {name: getattr(self, name) for name in TARGETS if getattr(self, name, None) is not None}
        return Amount(**targets or {"params": ANY}, first=first, last=last, round_to=round_to)

    @property
    def words(self) -> str:
        """The budget as it was given."""
        return next(f"{name}={value}" for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True)
class Search:
    """Says how the smaller model within a budget is searched for.

    Args:
        importance: Which units go, in each config those of the lowest scores; by default `OBS()`.
        repair: How the linears that read removed units are refitted; `"auto"`: by `RepairConfig()` if there are enough tokens for
            any refit, and otherwise, with a warning before the search, not at all; None: not at all.
        first: Blocks at the beginning of each stack that stay whole.
        last: Blocks at the end of each stack that stay whole.
        round_to: To multiples of what the number of channels that remain is rounded down. `"auto"`: of the largest of 256,
            128, 64 and 32 that takes at most 3 % of them more; layers that stay alike keep all KV heads, 1, 2, 4 or a multiple
            of 8, except for `kv_cache_bytes`. A number (int): multiples of it; 1: any number.
        generations: Rounds of evolution; 0 takes the best of what the knapsack finds.
        candidates: Models that each round measures.

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

    def amount(self, budget: Budget) -> Amount:
        """Returns a budget as an amount of which the blocks that stay whole give nothing."""
        return budget.amount(self.first, self.last, self.round_to)
