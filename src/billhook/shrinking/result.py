"""The result of a budgeted search, as a table and as plain data."""

from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from billhook.display import Printable, text_table
from billhook.kv_heads.plan import KVHeadPlan
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.plan import UnitPlan

CURVE = "KL divergence from the dense model, by size, before the whole model is repaired:"
BITS_CURVE = "Increase in bits per byte over the dense model, by size, before the whole model is repaired:"
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


@dataclass(frozen=True)
class Times:
    """Times of the dense and the smaller model, measured side by side on the same machine.

    Attributes:
        dense: Seconds of the dense model, per generated token of each sequence or per prefill.
        smaller: Seconds of the smaller model.
        ratio: Median over rounds of the smaller model's time relative to the dense model's.
        workload: Description of the workload.
        unused: Note on the unused part of the budget; empty if it is small.
    """

    dense: float
    smaller: float
    ratio: float
    workload: str
    unused: str = ""

    def __str__(self) -> str:
        took = f"{1e3 * self.smaller:.4g} ms, {self.ratio:.3f} of the dense model's {1e3 * self.dense:.4g} ms ({self.workload})"
        return "; ".join(filter(None, [took, self.unused]))


@dataclass(frozen=True, repr=False)
class Shrunk(Printable):
    """The result of a budgeted search; `print` shows a summary.

    Losses are KL divergences from the dense model in nats per token. If tokens may be removed, they are increases in bits per
    byte: that of the text in the remaining tokens, and KL divergences that are counted per byte.

    Attributes:
        plan: The removed units. With uniform modules this includes units of blocks that are removed afterwards.
        target: Name of the budget: `"params"`, `"kv_cache_bytes"`, `"bytes"`, or `"latency"` (in nanoseconds).
        limit: Largest allowed cost.
        left: Remaining cost.
        kept: By module, the number of units before and after, KV heads for attention modules; 0 if the block is removed.
        predicted: Estimated loss, a sum over modules.
        measured: Measured loss of the repaired model, by source, on held-out batches.
        curve: Candidates of other sizes with the same vocabulary, the smallest first.
        tried: All candidates measured within the budget, the best first.
        alone: By kind of unit, the remaining cost and loss if only heads, channels, or blocks are removed, where they suffice.
            Modules are refitted separately, blocks are not.
        ratio: Perplexity relative to the dense model, for a quality budget.
        times: Measured times, for a latency budget. `left` is the same fraction of the dense model's nanoseconds; other sizes are
            sums over the latency table.
        blocks: The removed blocks, with their original numbers; None if there are none.
        blocks_stay: Reason why no block could be removed; empty if one could.
        merged: Conversions to fewer KV heads (pooled, all query heads kept), one for each number of heads.
        not_refitted: Layers that were pruned but not refitted, with the reason; empty if there are none.
        tokens: The removed tokens, if any. `tokens.trim_tokenizer` returns the tokenizer that is left.
        token_loss: The part of the losses that they cause.
        per_byte: If True, losses are in bits per byte, because tokens may be removed.
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
    alone: dict[str, tuple[int, float]]
    ratio: float | None = None
    times: Times | None = None
    blocks: BlockPlan | None = None
    blocks_stay: str = ""
    merged: tuple[KVHeadPlan, ...] = ()
    not_refitted: str = ""
    tokens: UnitPlan | None = None
    token_loss: float = 0.0
    per_byte: bool = False

    @property
    def budget(self) -> str:
        """The remaining cost and the limit."""
        return str(self.times or f"{self.left:,} {self.target} (budget: {self.limit:,})")

    @property
    def words(self) -> str:
        """A summary of the removed units."""
        return ", ".join(plan.words for plan in (self.plan, self.blocks, self.tokens) if plan is not None and plan.units)

    @property
    def what(self) -> str:
        """A summary of the change."""
        without = [f"without {self.words}"] if self.words else []
        return "; ".join([*(f"{plan.words} (pooled)" for plan in self.merged), *without])

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain data."""
        plain = {
            name: getattr(self, name) for name in ("target", "limit", "left", "kept", "predicted", "measured", "alone", "ratio")
        }
        plans = {"plan": self.plan.to_json(), "merged": [plan.to_json() for plan in self.merged]}
        blocks = {"blocks": self.blocks and self.blocks.to_json(), "blocks_stay": self.blocks_stay}
        choices = {"curve": list(map(vars, self.curve)), "tried": list(map(vars, self.tried))}
        left: dict[str, Any] = {"not_refitted": self.not_refitted} if self.not_refitted else {}
        left |= {"per_byte": True} if self.per_byte else {}
        if self.tokens is not None:  # the tokenizer of the checkpoint has them
            left |= {"tokens": {name: self.tokens.after[name] for name in self.tokens.units}, "token_loss": self.token_loss}
        return {**plans, **blocks, **plain, **choices, "times": self.times and vars(self.times), **left}

    def _renderables(self) -> list[RenderableType]:
        lines: list[RenderableType] = [self.budget] if self.merged else []
        lines += self.merged
        if self.plan.units or not self.merged:
            lines.append(self.plan)
        if self.blocks:
            lines.append(self.blocks)
        elif self.blocks_stay:
            lines.append(f"no block can be removed: {self.blocks_stay}")
        lines += [self.tokens] if self.tokens else []
        head = ["ms" if self.target == "latency" else self.target, "estimated", "measured"]
        sizes = [[format_amount(self.target, size.left), f"{size.predicted:.4f}", f"{size.measured:.4f}"] for size in self.curve]
        return [*lines, BITS_CURVE if self.per_byte else CURVE, text_table(sizes, head), *self._notes()]

    def _notes(self) -> list[str]:
        """Returns the losses of single kinds of unit and of the selected model."""
        notes = []
        loss, digits = ("bits per byte ", "+.4f") if self.per_byte else ("KL ", ".4f")
        for name, (left, lost) in self.alone.items():
            notes.append(f"{name} only, before the repair: {loss}{lost:{digits}} at {format_amount(self.target, left)}")
        losses = ", ".join(f"{lost:{digits}}{f' on {source}' if source else ''}" for source, lost in self.measured.items())
        ratio = "" if self.ratio is None else f"; perplexity {self.ratio:.4f}x the dense model's"
        notes.append(f"selected model, as saved: {loss}{losses}{ratio}")
        notes += [f"removed tokens: {loss}{self.token_loss:{digits}}, as a part of it"] if self.tokens else []
        notes.append(SELECTED_ON)
        notes += [self.not_refitted] if self.not_refitted else []
        return notes if self.times is None else [*notes, f"measured: {self.times}"]


def format_amount(target: str, number: int) -> str:
    """Formats an amount of a target; nanoseconds become milliseconds.

    >>> format_amount("latency", 1_500_000), format_amount("params", 1_500_000)
    ('1.5', '1,500,000')
    """
    return f"{number / 1e6:.4g}" if target == "latency" else f"{number:,}"
