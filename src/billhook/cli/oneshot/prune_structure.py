"""`billhook prune-structure`: a checkpoint in, a smaller one out, without its least important coupled structures."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from transformers import PreTrainedModel

from billhook.arguments import whole
from billhook.cli.oneshot.enough import REFIT, coming, kept_by_readers, refits
from billhook.cli.oneshot.frame import OneShot, bar
from billhook.cli.oneshot.streamed import (
    REFITTED,
    REMOVED,
    WITHOUT_BLOCKS,
    Passes,
    batch_count,
    bytes_of_moments,
    bytes_of_refit,
    check_scored,
    left,
)
from billhook.cli.oneshot.text import Examples
from billhook.engine.batches import Batch
from billhook.importance.blocks import BlockInfluence
from billhook.importance.score import Importance
from billhook.model.plan import apply
from billhook.pruning.amount import RATIOS, TARGETS, Amount
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.plan import UnitPlan, check_kinds
from billhook.pruning.planning import count_blocks, default_importance, plan_amount, plan_searched
from billhook.pruning.repair import Repairing, repair_as_asked
from billhook.pruning.target import First, RatioSearch
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.divergence import in_rows


@dataclass(frozen=True)
class Removed(Amount):
    """Units to remove: whole blocks first, then others by a ratio for each kind of unit or by one target.

    Args:
        greedy: Whether blocks are removed one at a time, and the others scored again without it; as many times the work.
    """

    greedy: bool = False

    def __post_init__(self) -> None:
        if self.greedy and not self.blocks:
            raise ValueError(f"greedy=True removes blocks one at a time, and blocks={self.blocks}")
        _ = self.blocks_alone, self.within

    @property
    def blocks_alone(self) -> Amount | None:
        """The blocks to remove, if any."""
        return Amount(blocks=self.blocks, first=self.first, last=self.last) if self.blocks else None

    @property
    def within(self) -> Amount | None:
        """The units to remove within blocks, if any."""
        asked = any(getattr(self, name) is not None for name in (*RATIOS, *TARGETS) if name != "blocks")
        every = {one.name: getattr(self, one.name) for one in fields(Amount)}
        return Amount(**every | {"blocks": None}) if asked or not self.blocks else None


def prune_structure(
    model: str,
    out: str,
    amount: Removed,
    given: Examples,
    block_importance: Importance | None = None,
    importance: Importance | None = None,
    rounds: int = 1,
    repair: Repairing = "auto",
    dry_run: bool = False,
) -> None:
    """Removes the least important coupled structures of a language model or a text classifier and saves it, verified.

    Coupled structures are found automatically, on any architecture. Each plan is printed before it is carried out. The method is
    Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models (2023), https://arxiv.org/abs/2305.11627.

    Args:
        model: A folder, a hub name, or "tiny".
        out: The folder to write; new, empty, or an earlier checkpoint of billhook's.
        amount: How much to remove.
        given: Examples to score and to measure on, and the place to compute.
        block_importance: How blocks are scored: `BlockInfluence` (ShortGPT, https://arxiv.org/abs/2403.03853; the default), or
            `Ablation`, one forward a block.
        importance: How units are scored: `OutputNorm`, `Taylor` (LLM-Pruner), or any other `Importance`, also a class of your
            own; by default `OutputNorm`, or `Taylor` where no module reads some units alone, as experts. With `stream` one
            without gradients.
        rounds: In how many rounds, each with new scores.
        repair: How the linears that read removed units make up for them, by least squares on the examples; "auto": by
            `RepairConfig()` where linears read them, and the examples are enough; null: they do not.
        dry_run: Print the first plan and write nothing.

    Raises:
        ValueError: If an argument is not legal, or the model cannot give what is asked; before anything is written.
    """
    whole("rounds", rounds)
    check_scored(given, block_importance, importance)
    work = OneShot(model, out, given, refits=repair is not None, streams=True)
    passes, kept, needed, count = Passes(), None, None, batch_count(work.rows, given.batch_size) if given.stream else 0
    if amount.within is not None:
        check_kinds(work.model, amount.within.kinds)
        search = RatioSearch(work.model, amount.within)
        cut = search.check()
        kept = left(search, cut) if rounds == 1 else None
        needed = kept_by_readers(search, cut) if repair is not None else None
        importance = importance or default_importance(search.free())
        check_scored(given, importance)
        every = sum(one.count(amount.per) for one in search.free().values())
        passes.to_score(rounds, importance, every, count)
        passes.known += rounds * (REMOVED + REFITTED * (repair is not None))
    if amount.blocks_alone is not None:
        stacks, gone = count_blocks(work.model, amount.blocks_alone)
        block_importance = block_importance or BlockInfluence()
        every, times = sum(one.count() for one in stacks.values()), sum(gone.values()) if amount.greedy else 1
        passes.to_score(times, block_importance, every, count)
        passes.known += WITHOUT_BLOCKS
    refit = [] if needed is None else [refits(work, needed, coming(work), repair != "auto") or REFIT]
    steps = _steps(amount, block_importance, importance, rounds, refit, work.shown)
    work.tell(*steps, passes=passes.known, exactly=repair != "auto", beside=passes.beside)
    needs = any(one.needs_data for one in (block_importance, importance) if one is not None)
    if dry_run and needs and work.unread:
        work.tell_dry()
        return
    batches = work.batches() if needs or not dry_run else []
    if given.stream:  # what reading text took is there
        solved, sums = (0, 0) if repair is None else bytes_of_refit(work.model, work.parts, kept)
        work.rest(max(bytes_of_moments(work.model, importance), solved), sums, 0 if repair is None else 2)
    if needed is not None and not dry_run and (now := refits(work, needed, batches, repair != "auto")) not in ("", *refit):
        print(now)  # a text is shorter than what was asked for
    before = None if dry_run else work.measure()
    plans, refitted, whys = list[BlockPlan | UnitPlan](), False, list[str]()
    rows = batches if len(batches) > 1 else in_rows(batches)
    for plan in _plans(work.model, batches, amount, block_importance, importance, rounds):
        if dry_run:
            work.tell_dry(plan.text())
            return
        print(plan.text())
        with bar("refitting", "linears") as progress:
            how_repaired = repair if plan.kind == "units" else None
            repaired, why = repair_as_asked(work.model, plan, rows, how_repaired, progress=progress)
        if why:
            print(why)
            whys.append(why)
        refitted = refitted or bool(repaired)
        apply(work.model, plan, weights=repaired)
        plans.append(plan)
    done = str(RepairConfig() if repair == "auto" else repair) if refitted else None
    by = {"by": importance and str(importance), "blocks_by": block_importance and str(block_importance)}
    how = by | {"ranking": amount.ranking, "rounds": rounds, "repair": done} | ({"greedy": True} if amount.greedy else {})
    what = f"without {', '.join(plan.words for plan in plans)}"
    record = {"plans": [plan.to_json() for plan in plans], "importance": how}
    work.save(before, what, record, not_refitted="; ".join(dict.fromkeys(whys)))


def _steps(
    amount: Removed, by: Importance | None, importance: Importance | None, rounds: int, refit: list[str], shown: str
) -> list[str]:
    """Returns the words for what will be done."""
    order = ", one at a time" if amount.greedy else ""
    steps = [] if amount.blocks is None else [f"remove blocks={amount.blocks}{order}, by {by}"]
    if amount.within is not None:
        asked = amount.within.ratios | ({amount.target: getattr(amount, amount.target)} if amount.target else {})
        sizes = ", ".join(f"{name}={value}" for name, value in asked.items())
        times = f", in {rounds} rounds" if rounds > 1 else ""
        steps.append(f"remove units for {sizes}, by {importance}{times}")
        steps += refit
    return [*steps, f"shown {shown}"]


def _plans(
    model: PreTrainedModel,
    batches: list[Batch],
    amount: Removed,
    block_importance: Importance | None,
    importance: Importance | None,
    rounds: int,
) -> Iterator[BlockPlan | UnitPlan]:
    """Plans what to remove, each time from the model as it is when the plan before has been carried out."""
    if amount.blocks_alone is not None:
        with bar("scoring blocks", "rounds" if amount.greedy else "batches") as progress:
            greedy = amount.greedy
            blocks = plan_amount(model, amount.blocks_alone, block_importance, batches, greedy=greedy, progress=progress)
        yield blocks
    if amount.within is None:
        return
    start = First.of(RatioSearch(model, amount.within))
    for number in range(1, rounds + 1):
        if (part := start.part(RatioSearch(model, amount.within), number / rounds)) is not None:
            with bar("scoring", "batches") as progress:
                units = plan_searched(part, importance, batches, progress=progress)
            yield units
