"""`billhook prune-heads`: removes attention heads from a checkpoint."""

from functools import partial

import torch

from billhook.arguments import check_int
from billhook.cli.command_plan import print_dry_run, print_plan, refit_passes, repair_step
from billhook.cli.effort import Effort
from billhook.cli.examples import Examples
from billhook.cli.one_shot import OneShot
from billhook.cli.streamed import (
    REMOVE_PASSES,
    Passes,
    batch_count,
    check_scored,
    refit_bytes,
    repair_passes,
    statistics_bytes,
)
from billhook.importance.gate_gradient import GateGradient
from billhook.importance.score import Importance, make_run, score_units
from billhook.model import apply
from billhook.progress import progress_bar
from billhook.pruning.amount import Ranking
from billhook.pruning.choice import check_choice, choose, choose_including
from billhook.pruning.planning import plan_units
from billhook.pruning.repair import RepairOption, repair_if_requested
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.divergence import split_examples
from billhook.units import Per, find_units, mask


def prune_heads(
    model: str,
    out: str,
    examples: Examples,
    effort: Effort,
    ratio: float | None = None,
    importance: Importance | None = None,
    ranking: Ranking = "layer",
    per: Per = "head",
    min_heads: int = 1,
    rounds: int = 1,
    normalize: bool = True,
    repair: RepairOption = "auto",
    dry_run: bool = False,
) -> None:
    """Removes the least important attention heads of a model, and saves it.

    The checkpoint is verified, and perplexity or accuracy is measured before and after. Reference: Michel et al., Are Sixteen
    Heads Really Better than One? (2019), https://arxiv.org/abs/1905.10650.

    Args:
        model: A folder, a Hub name, or "tiny".
        out: Output folder. It must be new, empty, or an earlier billhook checkpoint, which is replaced.
        examples: Calibration and evaluation data, and the device.
        effort: How close the result stays to the dense model.
        ratio: Fraction of heads to remove, in [0, 1), rounded down.
        importance: Scores the heads: `GateGradient` (the paper's, the default), or any other `Importance`, including a custom
            class. With `stream`, one without gradients, such as `OutputNorm`.
        ranking: "layer" removes the same number from each layer; "global" removes the lowest scores of all layers, as in the
            paper, so that layers differ.
        per: Unit to remove: query heads ("head"), or KV heads together with their query heads ("kv_head").
        min_heads: Minimum number of heads to keep in each layer.
        rounds: Number of score-and-prune rounds.
        normalize: If true, divides the scores of each layer by their L2 norm, as in the paper.
        repair: Least-squares repair of the output projections (see `RepairConfig`). "auto" does what `effort` says if there are
            enough examples; null keeps the old weights, as in the paper.
        dry_run: If true, scores the heads, prints the plan, and writes nothing.

    Raises:
        ValueError: If an argument is not legal, or the heads cannot be removed, before anything is written.
    """
    if ratio is None:
        raise ValueError("ratio=None: pass the fraction of heads to remove, in [0, 1), with --ratio.")
    check_choice(ratio, ranking, min_heads, per, "heads")
    check_int("min_heads", min_heads)
    check_int("rounds", rounds)
    importance = importance or GateGradient()
    check_scored(examples, importance)
    repair = effort.repair(repair) if importance.needs_data or isinstance(repair, RepairConfig) else None
    calibrates = importance.needs_data or repair is not None
    work = OneShot(
        model, out, examples, refits=repair is not None, calibrates=calibrates, streams=True, repair=repair, effort=effort
    )
    heads = find_units(work.model, "head")
    # reports an impossible ratio, and heads that cannot be removed, before any scoring
    scores = {name: torch.zeros(units.count(per)) for name, units in heads.items()}
    removed = choose(heads, scores, ratio, ranking, min_heads, per)
    if not removed:
        raise ValueError(f"ratio={ratio} is less than one head of a layer, so that nothing would be removed. Use a larger ratio.")
    plan_units(work.model, removed, per=per)
    total, count = sum(map(len, scores.values())), sum(map(len, removed.values()))
    kind = "heads" if per == "head" else "KV heads and their query heads"
    passes = Passes(REMOVE_PASSES + repair_passes(repair))
    passes.add_scoring(rounds, importance, total, batch_count(work.example_counts.values(), examples.batch_size))
    steps = [f"remove {count:,} of {total:,} {kind} (importance: {importance})"]
    steps += [] if repair is None else [repair_step(work, repair, "the layers that read them")]
    exact = repair != "auto"
    print_plan(
        work, *steps, exact=exact, passes=passes.known, unknown=passes.unknown, cost=3 * rounds, refits=refit_passes(work, repair)
    )
    if dry_run and work.must_generate:
        print_dry_run(work)
        return
    if examples.stream:
        solved, sums = refit_bytes(work.model, repair)
        work.spill(max(statistics_bytes(work.model, importance), solved), sums, 2 * (repair is not None))
    batches, before = work.batches(dry_run) if work.calibrates else [], None if dry_run else work.measure()
    runs = [make_run(work.model, heads, batch) for batch in batches]
    removed = {}
    for number in range(1, rounds + 1):
        select = partial(choose, heads, ratio=ratio * number / rounds, ranking=ranking, min_units=min_heads, per=per)
        with mask(work.model, removed, per=per), progress_bar("scoring", "batches") as progress:
            scores = score_units(work.model, heads, importance, runs, None, normalize, per, progress=progress)
        removed = choose_including(select, removed, scores)
    plan = plan_units(work.model, removed, per=per)
    if dry_run:
        print_dry_run(work, plan.text())
        return
    rows = batches if len(batches) > 1 else split_examples(batches)
    with progress_bar("refitting", "layers") as progress:
        weights, why = repair_if_requested(work.model, plan, rows, repair, progress=progress)
    if why:
        print(why)
    work.predict(batches)
    apply(work.model, plan, weights=weights)
    settings = {"by": str(importance), "ranking": ranking, "per": per, "rounds": rounds}
    repaired = None if weights is None else str(RepairConfig() if repair == "auto" else repair)
    work.save(
        before,
        f"without {plan.words}",
        {"heads": plan.to_json()["units"], "importance": settings, "repair": repaired},
        plan.text(),
        not_refitted=why,
    )
