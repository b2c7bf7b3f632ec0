"""`billhook prune-structure`: a checkpoint in, a smaller one out, without its least important coupled structures."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from transformers import PreTrainedModel

from billhook.arguments import check_int
from billhook.cli.examples import Examples
from billhook.cli.one_shot import OneShot
from billhook.cli.refit import REFIT, inputs_left, meta_batches, refits
from billhook.cli.streamed import (
    REFITTED,
    REMOVED,
    WITHOUT_BLOCKS,
    Passes,
    batch_count,
    bytes_of_moments,
    bytes_of_refit,
    check_scored,
)
from billhook.engine.batches import Batch
from billhook.importance.blocks import BlockInfluence
from billhook.importance.score import Importance
from billhook.model.plan import apply
from billhook.progress import progress_bar
from billhook.pruning.amount import RATIOS, TARGETS, Amount
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.plan import UnitPlan, check_kinds
from billhook.pruning.planning import count_blocks, default_importance, plan_amount, plan_from_search
from billhook.pruning.repair import RepairOption, repair_if_requested
from billhook.pruning.target import Baseline, RatioSearch
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
        if self.blocks and all(getattr(self, name) is None for name in (*RATIOS, *TARGETS) if name != "blocks"):
            return None
        return Amount(**{field.name: getattr(self, field.name) for field in fields(Amount)} | {"blocks": None})


def prune_structure(
    model: str,
    out: str,
    amount: Removed,
    examples: Examples,
    block_importance: Importance | None = None,
    importance: Importance | None = None,
    rounds: int = 1,
    repair: RepairOption = "auto",
    dry_run: bool = False,
) -> None:
    """Removes the least important coupled structures of a language model or a text classifier and saves it, verified.

    Coupled structures are found automatically, on any architecture. Each plan is printed before it is carried out. The method is
    Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models (2023), https://arxiv.org/abs/2305.11627.

    Args:
        model: A folder, a hub name, or "tiny".
        out: The folder to write; new, empty, or an earlier checkpoint of billhook's.
        amount: How much to remove.
        examples: Examples to score and to measure on, and the place to compute.
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
    check_int("rounds", rounds)
    check_scored(examples, block_importance, importance)
    work = OneShot(model, out, examples, refits=repair is not None, streams=True)
    passes, count = Passes(), batch_count(work.rows, examples.batch_size) if examples.stream else 0
    steps, refit, kept, needed = list[str](), "", None, None
    if amount.within is not None:
        check_kinds(work.model, amount.within.kinds)
        search = RatioSearch(work.model, amount.within)
        cut = search.check()
        kept = inputs_left(search, cut, most=True) if rounds == 1 else None
        needed = inputs_left(search, cut, most=False) if repair is not None else None
        importance = importance or default_importance(search.removable())
        check_scored(examples, importance)
        every = sum(units.count(amount.per) for units in search.removable().values())
        passes.to_score(rounds, importance, every, count)
        passes.known += rounds * (REMOVED + REFITTED * (repair is not None))
        amounts = amount.within.ratios | ({amount.target: getattr(amount, amount.target)} if amount.target else {})
        sizes = ", ".join(f"{name}={value}" for name, value in amounts.items())
        steps.append(f"remove units for {sizes}, by {importance}" + (f", in {rounds} rounds" if rounds > 1 else ""))
        if needed is not None:
            refit = refits(work, needed, meta_batches(work), repair != "auto") or REFIT
            steps.append(refit)
    if amount.blocks_alone is not None:
        stacks, fewer = count_blocks(work.model, amount.blocks_alone)
        block_importance = block_importance or BlockInfluence()
        every, times = sum(blocks.count() for blocks in stacks.values()), sum(fewer.values()) if amount.greedy else 1
        passes.to_score(times, block_importance, every, count)
        passes.known += WITHOUT_BLOCKS
        steps.insert(0, f"remove blocks={amount.blocks}{', one at a time' if amount.greedy else ''}, by {block_importance}")
    work.tell(*steps, f"shown {work.shown}", passes=passes.known, exactly=repair != "auto", beside=passes.beside)
    needs = any(scored_by.needs_data for scored_by in (block_importance, importance) if scored_by is not None)
    if dry_run and needs and work.unread:
        work.tell_dry()
        return
    batches = work.batches() if needs or not dry_run else []
    if examples.stream:  # what reading text took is there
        solved, sums = (0, 0) if repair is None else bytes_of_refit(work.model, work.parts, kept)
        work.rest(max(bytes_of_moments(work.model, importance), solved), sums, 0 if repair is None else 2)
    if needed is not None and not dry_run and (now := refits(work, needed, batches, repair != "auto")) not in ("", refit):
        print(now)  # a text is shorter than what was asked for
    before = None if dry_run else work.measure()
    plans, refitted, whys = list[BlockPlan | UnitPlan](), False, list[str]()
    rows = batches if len(batches) > 1 else in_rows(batches)
    for plan in _plans(work.model, batches, amount, block_importance, importance, rounds):
        if dry_run:
            work.tell_dry(plan.text())
            return
        print(plan.text())
        with progress_bar("refitting", "linears") as progress:
            how_repaired = repair if plan.kind == "units" else None
            repaired, why = repair_if_requested(work.model, plan, rows, how_repaired, progress=progress)
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
        with progress_bar("scoring blocks", "rounds" if amount.greedy else "batches") as progress:
            greedy = amount.greedy
            blocks = plan_amount(model, amount.blocks_alone, block_importance, batches, greedy=greedy, progress=progress)
        yield blocks
    if amount.within is None:
        return
    start = Baseline.of(RatioSearch(model, amount.within))
    for number in range(1, rounds + 1):
        if (part := start.part(RatioSearch(model, amount.within), number / rounds)) is not None:
            with progress_bar("scoring", "batches") as progress:
                units = plan_from_search(part, importance, batches, progress=progress)
            yield units


def prune_blocks(
    model: str,
    out: str,
    examples: Examples,
    blocks: int | float | None = None,
    importance: Importance | None = None,
    greedy: bool = False,
    first: int = 0,
    last: int = 0,
    dry_run: bool = False,
) -> None:
    """Removes the least important blocks of a language model or a text classifier and saves it, verified.

    The method is Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (2024),
    https://arxiv.org/abs/2403.03853. `billhook prune-structure` removes units within the blocks that stay, too.

    Args:
        model: A folder, a hub name, or "tiny".
        out: The folder to write; new, empty, or an earlier checkpoint of billhook's.
        examples: Examples to score and to measure on, and the place to compute.
        blocks: How many blocks to remove (int), or the fraction (float, in [0, 1), rounded down); of a model with an encoder and
            a decoder, from each.
        importance: How much a block matters: `BlockInfluence` (the paper's; the default), `Ablation`, one forward a block, or any
            other `Importance`, also a class of your own.
        greedy: Whether blocks are removed one at a time, and the others scored again without it; as many times the work.
        first: So many first blocks are kept.
        last: So many last blocks are kept.
        dry_run: Print the plan and write nothing.

    Raises:
        ValueError: If an argument is not legal, or so many blocks cannot be removed; before anything is written.
    """
    if not blocks:
        raise ValueError(f"blocks={blocks}: say how many blocks to remove, or which fraction of them, in (0, 1)")
    amount = Removed(blocks=blocks, first=first, last=last, greedy=greedy)
    prune_structure(model, out, amount, examples, block_importance=importance, repair=None, dry_run=dry_run)
