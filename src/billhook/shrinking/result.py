"""Limits and the result of a budgeted search, as a table and as plain data."""

from dataclasses import dataclass, fields
from typing import Any

from rich.console import RenderableType

from billhook.arguments import check_int, check_number, check_types
from billhook.display import Printable, text_table
from billhook.importance.score import Importance
from billhook.pruning.amount import Amount, RoundTo
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.plan import UnitPlan
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


CURVE = "KL divergence from the dense model, by size, before the whole model is repaired:"
SELECTED_ON = "These losses are of held-out calibration examples, which also selected the model. Judge it by other text."


@dataclass(frozen=True)
class Candidate:
    """One level per module, evaluated as a whole model.

    Attributes:
        kept: Number of kept units by module, KV heads for attention modules; 0 for removed blocks and the modules inside.
        left: Remaining cost in units of the target.
        predicted: Estimated loss, a sum over modules: KL divergence from the dense model, in nats.
        measured: Measured KL divergence of the model assembled from separately refitted modules.
    """

    kept: dict[str, int]
    left: int
    predicted: float
    measured: float


@dataclass(frozen=True, repr=False)
class Shrunk(Printable):
    """The result of a budgeted search; `print` shows a summary.

    Losses are KL divergences from the dense model in nats per token.

    Attributes:
        plan: The removed units. With uniform modules this includes units of blocks that are removed afterwards.
        target: Unit of the budget: `"params"` or `"bytes"`.
        limit: Largest allowed cost.
        left: Remaining cost.
        kept: By module, the number of units before and after, KV heads for attention modules; 0 if the block is removed.
        predicted: Estimated loss, a sum over modules.
        measured: Measured loss of the repaired model, by source, on held-out batches.
        curve: Candidates of other sizes, the smallest first.
        tried: All candidates measured within the budget, the best first.
        ratio: Perplexity relative to the dense model, for a quality budget.
        blocks: The removed blocks, with their original numbers; None if there are none.
        blocks_stay: Reason why no block could be removed; empty if one could.
        not_refitted: Layers that were pruned but not refitted, with the reason; empty if there are none.
    """

    plan: UnitPlan
    target: str
    limit: int
    left: int
    kept: dict[str, tuple[int, int]]
    predicted: float
    measured: dict[str, float]
    curve: tuple[Candidate, ...]
    tried: tuple[Candidate, ...]
    ratio: float | None = None
    blocks: BlockPlan | None = None
    blocks_stay: str = ""
    not_refitted: str = ""

    @property
    def budget(self) -> str:
        """The remaining cost and the limit."""
        return f"{self.left:,} {self.target} (budget: {self.limit:,})"

    @property
    def words(self) -> str:
        """A summary of the removed units."""
        return ", ".join(plan.words for plan in (self.plan, self.blocks) if plan is not None and plan.units)

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain data."""
        plain = {name: getattr(self, name) for name in ("target", "limit", "left", "kept", "predicted", "measured", "ratio")}
        blocks = {"blocks": self.blocks and self.blocks.to_json(), "blocks_stay": self.blocks_stay}
        choices = {"curve": list(map(vars, self.curve)), "tried": list(map(vars, self.tried))}
        not_refitted = {"not_refitted": self.not_refitted} if self.not_refitted else {}
        return {"plan": self.plan.to_json(), **blocks, **plain, **choices, **not_refitted}

    def _renderables(self) -> list[RenderableType]:
        lines: list[RenderableType] = [self.plan]
        if self.blocks:
            lines.append(self.blocks)
        elif self.blocks_stay:
            lines.append(f"no block can be removed: {self.blocks_stay}")
        sizes = [[f"{size.left:,}", f"{size.predicted:.4f}", f"{size.measured:.4f}"] for size in self.curve]
        losses = ", ".join(f"{lost:.4f}{f' on {source}' if source else ''}" for source, lost in self.measured.items())
        ratio = "" if self.ratio is None else f"; perplexity {self.ratio:.4f}x the dense model's"
        lines += [CURVE, text_table(sizes, [self.target, "estimated", "measured"])]
        lines += [f"selected model, as saved: KL {losses}{ratio}", SELECTED_ON]
        return [*lines, self.not_refitted] if self.not_refitted else lines
