"""Shows and records what a search for a smaller model has found."""

from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from billhook.display import Printable, text_table
from billhook.kv_heads.plan import KVHeadPlan
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.plan import UnitPlan

CURVE = "KL to the dense model by size:"


@dataclass(frozen=True)
class Choice:
    """One way to make a model smaller.

    Attributes:
        kept: By layer, how many units it keeps; of an attention, KV heads; 0 of a block that is gone, and
            of all in it.
        left: What is left of what the budget limits.
        predicted: Sum of what the layers lose alone: KL divergence from the dense model, in nats.
        measured: KL divergence of the model that is put together of layers refitted alone.
    """

    kept: dict[str, int]
    left: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class Times:
    """How long the dense and the smaller model take, measured side by side on one machine.

    Attributes:
        dense: Seconds of the dense model: of a token that each sequence is given, or of reading the prompts.
        smaller: Seconds of the smaller model.
        ratio: The median over rounds of the smaller model's seconds over the dense one's.
        workload: What they did.
        unused: Which share of the budget is unused, and why, in words; empty if it is small.
    """

    dense: float
    smaller: float
    ratio: float
    workload: str
    unused: str = ""

    def __str__(self) -> str:
        took = f"{1e3 * self.smaller:.4g} ms, {self.ratio:.3f} of the dense model's {1e3 * self.dense:.4g} ms: {self.workload}"
        return "; ".join([took, *filter(None, [self.unused])])


@dataclass(frozen=True, repr=False)
class Shrunk(Printable):
    """A model that was made smaller within a budget; `print` shows what it took.

    Attributes:
        plan: The units that were removed, also of blocks that went after that where layers stay alike; KV heads that merge have
            before that.
        target: What the budget limits: `"params"`, `"kv_cache_bytes"`, `"bytes"`, or `"latency"`, in nanoseconds.
        limit: The most that may be left of it.
        left: What is left of it.
        kept: By layer, how many units there were and how many it keeps, 0 where its block is gone; of an attention,
            KV heads.
        predicted: Sum of what the layers lose alone: KL divergence from the dense model, in nats.
        measured: KL divergence of the smaller model, repaired as a whole, by source, on batches that it was not fitted to.
        curve: Choices of other sizes, from the smallest, for comparison.
        tried: All choices that were measured within the budget, the best first.
        alone: For comparison, what is left of the target, and lost, without heads, channels or whole blocks alone, where they
            are enough: refitted layer by layer, blocks not at all.
        ratio: Perplexity of the smaller model to the dense one's, on the same batches, where a budget of it was given.
        times: How long both take, where a budget of time was given: `left` is as large a part as was measured of the dense
            model's nanoseconds, while all other sizes are sums of what layers take.
        blocks: The blocks that were removed after that, numbered as before; None where none was.
        blocks_stay: Why no block could go; empty where some could.
        merged: The KV heads that were merged, where all query heads stay: a plan for each number of them that there is then.
        not_refitted: What was cut and not refitted though that was asked for, and why; empty if all was refitted.
    """

    plan: UnitPlan
    target: str
    limit: int
    left: int
    kept: dict[str, tuple[int, int]]
    predicted: float
    measured: dict[str, float]
    curve: tuple[Choice, ...]
    tried: tuple[Choice, ...]
    alone: dict[str, tuple[int, float]]
    ratio: float | None = None
    times: Times | None = None
    blocks: BlockPlan | None = None
    blocks_stay: str = ""
    merged: tuple[KVHeadPlan, ...] = ()
    not_refitted: str = ""

    @property
    def budget(self) -> str:
        """The words for what is left."""
        return str(self.times or f"{self.left:,} {self.target} left of at most {self.limit:,}")

    @property
    def words(self) -> str:
        """The words for what was removed."""
        return ", ".join(plan.words for plan in (self.plan, self.blocks) if plan is not None and plan.units)

    @property
    def what(self) -> str:
        """The words for what was done."""
        without = [f"without {self.words}"] if self.words else []
        return "; ".join([*(f"{plan.words}, merged" for plan in self.merged), *without])

    def to_json(self) -> dict[str, Any]:
        """Returns what was found as plain data."""
        plain = {
            name: getattr(self, name) for name in ("target", "limit", "left", "kept", "predicted", "measured", "alone", "ratio")
        }
        plans = {"plan": self.plan.to_json(), "merged": [plan.to_json() for plan in self.merged]}
        blocks = {"blocks": self.blocks and self.blocks.to_json(), "blocks_stay": self.blocks_stay}
        choices = {"curve": list(map(vars, self.curve)), "tried": list(map(vars, self.tried))}
        left = {"not_refitted": self.not_refitted} if self.not_refitted else {}
        return {**plans, **blocks, **plain, **choices, "times": self.times and vars(self.times), **left}

    def _renderables(self) -> list[RenderableType]:
        lines: list[RenderableType] = [self.budget] if self.merged else []
        lines += self.merged
        if self.plan.units or not self.merged:
            lines.append(self.plan)
        if self.blocks:
            lines.append(self.blocks)
        elif self.blocks_stay:
            lines.append(f"all blocks stay: {self.blocks_stay}")
        head = ["ms" if self.target == "latency" else self.target, "predicted", "put together"]
        sizes = [[in_words(self.target, size.left), f"{size.predicted:.4f}", f"{size.measured:.4f}"] for size in self.curve]
        return [*lines, CURVE, text_table(sizes, head), *self._notes()]

    def _notes(self) -> list[str]:
        """Says what is lost without units of one kind alone, and with the chosen size."""
        notes = list[str]()
        for name, (left, lost) in self.alone.items():
            notes.append(f"only {name} removed, {in_words(self.target, left)} left: {lost:.4f}")
        losses = ", ".join(f"{lost:.4f}{f' on {source}' if source else ''}" for source, lost in self.measured.items())
        ratio = "" if self.ratio is None else f"; perplexity {self.ratio:.4f} times the dense model's"
        notes.append(f"of the chosen, repaired as a whole: {losses}{ratio}")
        notes += [self.not_refitted] if self.not_refitted else []
        return notes if self.times is None else [*notes, f"measured: {self.times}"]


def in_words(target: str, number: int) -> str:
    """Writes what is left of a target: nanoseconds as milliseconds.

    >>> in_words("latency", 1_500_000), in_words("params", 1_500_000)
    ('1.5', '1,500,000')
    """
    return f"{number / 1e6:.4g}" if target == "latency" else f"{number:,}"
