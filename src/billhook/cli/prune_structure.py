"""`billhook prune-structure`, `prune-blocks`, and `prune-vocabulary`."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from transformers import PreTrainedModel

from billhook.arguments import check_int
from billhook.calibration.calibration import MIXED
from billhook.cli.command_plan import print_dry_run, print_plan, refit_passes, repair_step
from billhook.cli.effort import Effort
from billhook.cli.examples import Examples
from billhook.cli.one_shot import COUNTED, Before, OneShot
from billhook.cli.refit import meta_batches, remaining_inputs, repair_limits
from billhook.cli.streamed import (
    BLOCK_PASSES,
    REMOVE_PASSES,
    ZEROS_PASSES,
    Passes,
    batch_count,
    check_scored,
    refit_bytes,
    repair_passes,
    statistics_bytes,
)
from billhook.engine import Batch, store_of
from billhook.importance.blocks import BlockInfluence
from billhook.importance.score import Importance
from billhook.model import apply, stacks_of
from billhook.progress import progress_bar
from billhook.pruning.amount import RATIOS, TARGETS, Amount, RoundTo
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.plan import UnitPlan, check_kinds
from billhook.pruning.planning import count_blocks, default_importance, plan_amount, plan_from_search
from billhook.pruning.removal import try_removal
from billhook.pruning.repair import RepairOption, repair_if_requested
from billhook.pruning.target import Baseline, RatioSearch
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.divergence import split_examples
from billhook.units import Units
from billhook.vocabulary.scores import PREDICTED
from billhook.vocabulary.tokenizer import Vocabulary


@dataclass(frozen=True)
class RemoveOptions(Amount):
    """Units to remove: blocks first, then tokens, then other units by ratios or by a budget.

    Args:
        greedy: If true, removes one block at a time and rescores the rest. Costs one scoring pass per removed block.
    """

    greedy: bool = False

    def __post_init__(self) -> None:
        if self.greedy and not self.blocks:
            raise ValueError(f"greedy=True requires blocks to remove (blocks={self.blocks}). Pass --blocks, or remove --greedy.")
        _ = self.blocks_only, self.tokens_only, self.within_blocks  # which check their arguments

    @property
    def blocks_only(self) -> Amount | None:
        """The blocks to remove, if any."""
        return Amount(blocks=self.blocks, first=self.first, last=self.last) if self.blocks else None

    @property
    def tokens_only(self) -> Amount | None:
        """The tokens to remove, if any."""
        return Amount(tokens=self.tokens, round_to=self.round_to) if self.tokens else None

    @property
    def within_blocks(self) -> Amount | None:
        """The units to remove within blocks, if any."""
        others = [name for name in (*RATIOS, *TARGETS) if name not in ("blocks", "tokens")]
        if (self.blocks or self.tokens) and all(getattr(self, name) is None for name in others):
            return None
        return Amount(**{field.name: getattr(self, field.name) for field in fields(Amount)} | {"blocks": None, "tokens": None})

    def within_blocks_of(self, model: PreTrainedModel) -> Amount | None:
        """Returns the units to remove within blocks, with a budget as a number of this model."""
        within, target = self.within_blocks, self.target
        if within is None or target is None or not (self.blocks or self.tokens):
            return within
        budget: dict[str, Any] = {target: RatioSearch(model, within).limit(target)}
        return replace(within, **budget)


def prune_structure(
    model: str,
    out: str,
    amount: RemoveOptions,
    examples: Examples,
    effort: Effort,
    block_importance: Importance | None = None,
    importance: Importance | None = None,
    rounds: int = 1,
    repair: RepairOption = "auto",
    dry_run: bool = False,
) -> None:
    """Removes the least important heads, channels, experts, or other units, and saves it.

    Coupled groups are found automatically, on any architecture. The checkpoint is verified, and perplexity or accuracy is
    measured before and after. Reference: Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models (2023),
    https://arxiv.org/abs/2305.11627.

    Args:
        model: A folder, a Hub name, or "tiny".
        out: Output folder. It must be new, empty, or an earlier billhook checkpoint, which is replaced.
        amount: How much to remove.
        examples: Calibration and evaluation data, and the device.
        effort: How close the result stays to the dense model.
        block_importance: Scores the blocks: `BlockInfluence` (ShortGPT, https://arxiv.org/abs/2403.03853, the default), or
            `Ablation`, one forward pass per block.
        importance: Scores the units: `OutputNorm`, `Taylor` (LLM-Pruner), or any other `Importance`, including a custom class.
            Defaults to `OutputNorm`, to `REAP` for experts, or to `Taylor` for experts of a custom class or with other units.
            With `stream`, one without gradients.
        rounds: Number of score-and-prune rounds.
        repair: Least-squares repair of consumer layers, and of the output layers of blocks behind removed ones. "auto" does
            what `effort` says if linear layers read the units and there are enough examples. null keeps the old weights.
        dry_run: If true, prints the first plan and writes nothing.

    Raises:
        ValueError: If an argument is not legal, or the budget is out of reach, before anything is written.
    """
    check_int("rounds", rounds)
    check_scored(examples, block_importance, importance)
    repair, calibrates = effort.repair(repair), amount.blocks_only is not None or amount.within_blocks is not None
    if not calibrates:  # tokens that text needs least are removed, and nothing else
        repair, effort = None, replace(effort, polish=None)
    refits, required, as_text = repair is not None, repair != "auto", amount.tokens_only is not None
    work = OneShot(
        model, out, examples, refits=refits, calibrates=calibrates, streams=True, repair=repair, as_text=as_text, effort=effort
    )
    check_kinds(work.model, amount.kinds)
    if isinstance(repair, RepairConfig):
        store_of(work.model).check_writes_values()
    passes, batches_to_score = Passes(), batch_count(work.example_counts.values(), work.options.batch_size)
    steps, expected_limits, kept, needed, experts = list[str](), "", None, None, False
    without_tokens = work.model
    if amount.blocks_only is not None:
        stacks, removed = count_blocks(work.model, amount.blocks_only)
        block_importance = block_importance or BlockInfluence()
        block_rounds = sum(removed.values()) if amount.greedy else 1
        passes.add_scoring(block_rounds, block_importance, sum(map(Units.count, stacks.values())), batches_to_score)
        passes.known += BLOCK_PASSES + refits * ZEROS_PASSES + repair_passes(repair)
        one_by_one = " one at a time" * amount.greedy
        steps.append(f"remove blocks{one_by_one}: blocks={amount.blocks} (importance: {block_importance})")
        if refits:
            steps.append(repair_step(work, repair, "output layers of blocks behind them"))
    if amount.tokens_only is not None:
        without_tokens = try_removal(work.model, RatioSearch(work.model, amount.tokens_only).check())
        Vocabulary(work.tokenizer)  # raises for tokenizers that cannot lose tokens
        sources = " and ".join({MIXED: "packaged text"}.get(name, name) for name in work.counted_sources) or "the data"
        counted = f"counted in up to {COUNTED:,} of {sources}, predicted for up to {PREDICTED:,}"
        steps.append(f"remove tokens that text needs least: tokens={amount.tokens} ({counted})")
    within_blocks = amount.within_blocks_of(work.model)
    if within_blocks is not None:
        search = RatioSearch(without_tokens, within_blocks)
        cut = search.check()
        kept = remaining_inputs(search, cut, most=True) if rounds == 1 else None
        needed = remaining_inputs(search, cut, most=False) if refits else None
        removable = search.removable()
        importance = importance or default_importance(work.model, removable)
        check_scored(examples, importance)
        count = sum(units.count(amount.per) for units in removable.values())
        passes.add_scoring(rounds, importance, count, batches_to_score)
        passes.known += rounds * (REMOVE_PASSES + repair_passes(repair))
        limits = within_blocks.ratios | ({amount.target: getattr(amount, amount.target)} if amount.target else {})
        sizes = ", ".join(f"{name}={value}" for name, value in limits.items())
        steps.append(f"remove units: {sizes} (importance: {importance}{f', {rounds} rounds' if rounds > 1 else ''})")
        lose = any(layer.of_experts or layer.kind == "expert" for layer in removable.values())
        experts = lose and not examples.stream and any(map(stacks_of, work.model.modules()))
        if needed is not None:
            expected_limits = repair_limits(work, needed, meta_batches(work), required, experts)
            steps.append(expected_limits or repair_step(work, repair, "experts" if experts else "consumer layers"))
    print_plan(
        work,
        *steps,
        passes=passes.known,
        exact=required,
        unknown=passes.unknown,
        cost=2 * rounds,
        refits=refit_passes(work, repair),
    )
    needs_data = any(scorer.needs_data for scorer in (block_importance, importance) if scorer is not None)
    if dry_run and needs_data and work.must_generate:
        print_dry_run(work)
        return
    batches = work.batches(dry_run) if needs_data or not dry_run else []
    if examples.stream:  # after reading text, whose memory is free again
        solved, sums = refit_bytes(work.model, repair, kept if amount.blocks_only is None else None)
        work.spill(max(statistics_bytes(work.model, importance), solved), sums, 2 * refits)
    if needed is not None and not dry_run:
        actual_limits = repair_limits(work, needed, batches, required, experts)
        if actual_limits and actual_limits != expected_limits:
            print(actual_limits)  # a text is shorter than requested
    before = None if dry_run else work.measure()
    predicted = dry_run
    plans, words, refitted, not_refitted = list[dict[str, Any]](), list[str](), False, list[str]()
    for plan in _plans(work, before, batches, amount, within_blocks, block_importance, importance, rounds):
        if dry_run:
            print_dry_run(work, plan.text())
            return
        print(plan.text())
        if isinstance(plan, UnitPlan) and plan.tokens is not None:
            trimmed = plan.trim_tokenizer(work.tokenizer)
            apply(work.model, plan)
            work.use_tokenizer(trimmed)
            batches[:] = work.batches() if needs_data and within_blocks is not None else []  # in the tokens that are left
            words.append(f"{plan.words} ({work.removed_share(plan)})")
            continue
        if not predicted:  # by the dense model, or by what is left of it without tokens
            work.predict(batches)
            predicted = True
        rows = batches if len(batches) > 1 else split_examples(batches)
        with progress_bar("refitting", "layers") as progress:
            weights, why = repair_if_requested(work.model, plan, rows, repair, progress=progress)
        if why:
            print(why)
            not_refitted.append(why)
        refitted = refitted or bool(weights)
        apply(work.model, plan, weights=weights)
        plans.append(plan.to_json())
        words.append(plan.words)
    used_repair = str(RepairConfig() if repair == "auto" else repair) if refitted else None
    scorers = {"by": importance and str(importance), "blocks_by": block_importance and str(block_importance)}
    settings: dict[str, Any] = scorers | {"ranking": amount.ranking, "rounds": rounds, "repair": used_repair}
    settings |= {"greedy": True} if amount.greedy else {}
    settings |= {"tokens": amount.tokens} if amount.tokens else {}
    record = {"plans": plans, "importance": settings}
    work.save(before, f"without {', '.join(words)}", record, not_refitted="; ".join(dict.fromkeys(not_refitted)))


def _plans(
    work: OneShot,
    before: Before,
    batches: list[Batch],
    amount: RemoveOptions,
    within_blocks: Amount | None,
    block_importance: Importance | None,
    importance: Importance | None,
    rounds: int,
) -> Iterator[BlockPlan | UnitPlan]:
    """Yields plans; the caller applies each before the next is made."""
    model = work.model
    if amount.blocks_only is not None:
        with progress_bar("scoring blocks", "rounds" if amount.greedy else "batches") as progress:
            blocks = plan_amount(model, amount.blocks_only, block_importance, batches, greedy=amount.greedy, progress=progress)
        yield blocks
    if amount.tokens_only is not None:
        search, text = RatioSearch(model, amount.tokens_only), work.read_tokens(before)
        yield plan_from_search(search, batches=text, tokenizer=work.tokenizer)
    if within_blocks is None:
        return
    start = Baseline.of(RatioSearch(model, within_blocks))
    for number in range(1, rounds + 1):
        if (part := start.part(RatioSearch(model, within_blocks), number / rounds)) is not None:
            with progress_bar("scoring", "batches") as progress:
                units = plan_from_search(part, importance, batches, progress=progress)
            yield units


def prune_vocabulary(
    model: str, out: str, examples: Examples, tokens: float | None = None, round_to: RoundTo = "auto", dry_run: bool = False
) -> None:
    """Removes the tokens that text needs least from a model and its tokenizer, and saves it.

    They are the tokens that your text has, and that the model expects in such text, least.
    Any text can still be encoded, in more tokens: languages and domains that are not in the text are spelled out. Bytes, special
    tokens, and tokens of the chat template stay. The checkpoint is verified, and bits per byte of text are measured before and
    after. `billhook prune-structure --tokens` also removes other units.

    Args:
        model: A folder, a Hub name, or "tiny".
        out: Output folder. It must be new, empty, or an earlier billhook checkpoint, which is replaced.
        examples: Text to count tokens in, evaluation data, and the device. Packaged text is added to `data`, unless `supplement`
            is 0.
        tokens: Fraction of the vocabulary to remove, in (0, 1).
        round_to: The number of tokens that remain becomes a multiple of this: "auto" (the largest of 256, 128, 64, and 32 that is
            near), or a number; 1 turns rounding off.
        dry_run: If true, prints the plan and writes nothing.

    Raises:
        ValueError: If an argument is not legal, or more tokens would go than can be spelled, before anything is written.
    """
    if not tokens:
        raise ValueError(f"tokens={tokens}: pass the fraction of the vocabulary to remove, in (0, 1), with --tokens.")
    prune_structure(model, out, RemoveOptions(tokens=tokens, round_to=round_to), examples, Effort(polish=None), dry_run=dry_run)


def prune_blocks(
    model: str,
    out: str,
    examples: Examples,
    effort: Effort,
    blocks: int | float | None = None,
    importance: Importance | None = None,
    greedy: bool = False,
    first: int = 0,
    last: int = 0,
    repair: RepairOption = "auto",
    dry_run: bool = False,
) -> None:
    """Removes the least important blocks of a model, and saves it.

    The checkpoint is verified, and perplexity or accuracy is measured before and after. `billhook prune-structure` also removes
    units within the remaining blocks. Reference: Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than
    You Expect (2024), https://arxiv.org/abs/2403.03853.

    Args:
        model: A folder, a Hub name, or "tiny".
        out: Output folder. It must be new, empty, or an earlier billhook checkpoint, which is replaced.
        examples: Calibration and evaluation data, and the device.
        effort: How close the result stays to the dense model.
        blocks: Number of blocks to remove (int), or fraction (float, in [0, 1), rounded down). In an encoder-decoder, from each
            of the two stacks.
        importance: Scores the blocks: `BlockInfluence` (the paper's, the default), `Ablation`, one forward pass per block, or any
            other `Importance`, including a custom class.
        greedy: If true, removes one block at a time and rescores the rest. Costs one scoring pass per removed block.
        first: Number of blocks to protect at the start of each stack.
        last: Number of blocks to protect at the end of each stack.
        repair: Least-squares repair of the output layers of blocks behind removed ones (see `RepairConfig`). "auto" does
            what `effort` says if there are enough examples; null keeps the old weights, as in the paper.
        dry_run: If true, prints the plan and writes nothing.

    Raises:
        ValueError: If an argument is not legal, or there are too few blocks, before anything is written.
    """
    if not blocks:
        raise ValueError(f"blocks={blocks}: pass the number of blocks to remove, or a fraction in (0, 1), with --blocks.")
    amount = RemoveOptions(blocks=blocks, first=first, last=last, greedy=greedy)
    prune_structure(model, out, amount, examples, effort, block_importance=importance, repair=repair, dry_run=dry_run)
