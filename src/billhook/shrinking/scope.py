"""First stage of a search: which modules and blocks may be pruned within a budget."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from billhook.arguments import percentage_hint
from billhook.pruning.amount import Amount
from billhook.pruning.target import RatioSearch
from billhook.shrinking.blocks import Blocks, find_blocks
from billhook.shrinking.modules import PrunableModule, find_modules, units_by_name
from billhook.shrinking.space import SEVERAL, budget_sizes, round_channels

CURVE = 9
"""Number of model sizes on the curve of sizes and losses."""


@dataclass(eq=False)
class Progress:
    """Progress of a search.

    Attributes:
        report: Callback with the number of finished steps and the total.
        report_phase: Callback with the name of the phase that starts.
        report_cached: Callback with the number of variants that the variant cache already holds.
        steps: Total number of steps, an upper bound.
        done: Number of finished steps.
    """

    report: Callable[[int, int], None] | None = None
    report_phase: Callable[[str], None] | None = None
    report_cached: Callable[[int], None] | None = None
    steps: int = 0
    done: int = 0

    def enter(self, phase: str) -> None:
        """Starts a phase."""
        if self.report_phase is not None:
            self.report_phase(phase)
        self.advance(0)

    def advance(self, steps: int = 1) -> None:
        """Counts steps as finished."""
        self.done += steps
        if self.report is not None:
            self.report(min(self.done, self.steps), self.steps)


@dataclass(frozen=True, eq=False)
class SearchScope:
    """The modules and blocks of a model that a search may prune, and the budget's limit.

    Attributes:
        search: The model, its units, and their costs.
        target: Unit of the budget: `"params"` or `"bytes"`.
        now: Current cost of the model in units of the target.
        limit: Largest allowed cost.
        uniform: If True, all modules of one kind and size keep the same number of units.
        modules: The modules that may keep fewer units, each with its levels.
        blocks: The blocks that may be removed.
    """

    search: RatioSearch
    target: str
    now: int
    limit: int
    uniform: bool
    modules: list[PrunableModule]
    blocks: Blocks

    @classmethod
    def find(cls, model: PreTrainedModel, amount: Amount, uniform: bool) -> "SearchScope":
        """Finds the prunable modules and blocks for a budget.

        Raises a ValueError if the budget is out of reach.
        """
        search, target = RatioSearch(model, amount), amount.target or ""
        limit, now = search.limit(target), int(getattr(search.now, target))
        modules = find_modules(search, target, uniform)
        scope = cls(search, target, now, limit, uniform, modules, find_blocks(search, target, modules))
        if scope.least > limit:
            budget = getattr(amount, target)
            raise ValueError(
                f"{target}={budget} ({limit:,}) is out of reach. Reachable: {scope.least:,} to {now:,}. "
                f"Raise the budget, or protect fewer blocks{percentage_hint(budget)}"
            )
        met = budget_sizes(modules, scope.blocks.removable, now, limit) if uniform else {}
        with_levels = []
        for module in modules:
            levels = {*module.levels, *(scope.rounded({module.name: number})[module.name] for number in met.get(module.name, ()))}
            with_levels.append(replace(module, levels=tuple(sorted(levels, reverse=True))))
        return replace(scope, modules=with_levels)

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.search.model

    @property
    def least(self) -> int:
        """Smallest reachable cost: all removable blocks removed, all else at its lowest level."""
        saved = {module.name: module.saves(module.levels[-1]) for module in self.modules}
        least = self.now - sum(saved.values())
        for block in self.blocks.removable:
            least -= max(block.cost - sum(saved[name] for name in block.modules), 0)
        return least

    @property
    def widest(self) -> int:
        """Number of inputs of the widest consumer layer."""
        units = units_by_name(self.modules, self.search.units).values()
        return max(len(layer.index) for layer in units)

    def most_steps(self, generations: int, children: int) -> int:
        """Returns an upper bound on the number of search steps."""
        measured = 2 * len(self.modules) + len(self.blocks.removable)
        return measured + len(SEVERAL) + 2 + generations * children + CURVE

    def rounded(self, kept: Mapping[str, int], spare: int = 0) -> dict[str, int]:
        """Returns numbers of channels rounded down, if modules are uniform and `round_to="auto"`."""
        left_to_us = self.uniform and self.search.amount.round_to == "auto"
        return round_channels(self.modules, kept, spare) if left_to_us else dict(kept)
