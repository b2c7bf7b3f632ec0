"""`billhook prune-heads`: a checkpoint in, one with fewer attention heads out, with its metric before and after."""

from functools import partial

import torch

from billhook.arguments import check_int
from billhook.cli.examples import NONE, Examples
from billhook.cli.one_shot import OneShot
from billhook.cli.streamed import REMOVED, Passes, batch_count, bytes_of_moments, check_scored
from billhook.importance.gate_gradient import GateGradient
from billhook.importance.score import Importance, make_run, score_units
from billhook.model.plan import apply
from billhook.progress import progress_bar
from billhook.pruning.amount import Ranking
from billhook.pruning.choice import check_choice, choose, choose_including
from billhook.pruning.planning import plan_units
from billhook.units.find import find_units
from billhook.units.gates import mask
from billhook.units.units import Per


def prune_heads(
    model: str,
    out: str,
    examples: Examples,
    ratio: float | None = None,
    importance: Importance | None = None,
    ranking: Ranking = "layer",
    per: Per = "head",
    min_heads: int = 1,
    rounds: int = 1,
    normalize: bool = True,
    dry_run: bool = False,
) -> None:
    """Removes the least important attention heads of a language model or a text classifier and saves it, verified.

    The method is Michel et al., Are Sixteen Heads Really Better than One? (2019), https://arxiv.org/abs/1905.10650.

    Args:
        model: A folder, a hub name, or "tiny".
        out: The folder to write; new, empty, or an earlier checkpoint of billhook's.
        examples: Examples to score and to measure on, and the place to compute.
        ratio: Fraction of the heads to remove, in [0, 1), rounded down.
        importance: How heads are scored: `GateGradient` (the paper's; the default), or any other `Importance`, also a class of
            your own; with `stream` one without gradients, such as `OutputNorm`.
        ranking: "layer": as many in each layer; "global": the lowest of all layers, as in the paper; then the layers differ.
        per: Whether heads are query heads ("head"), or KV heads with the query heads that they serve ("kv_head").
        min_heads: Heads that are kept in each layer, at least.
        rounds: In how many rounds, each with new scores.
        normalize: Whether the scores of each layer are divided by their L2 norm, as in the paper.
        dry_run: Score the heads, print the plan and write nothing.

    Raises:
        ValueError: If an argument is not legal, or the heads cannot be removed; before anything is written.
    """
    if ratio is None:
        raise ValueError("ratio: say which fraction of the heads to remove, in [0, 1)")
    check_choice(ratio, ranking, min_heads, per, "heads")
    check_int("min_heads", min_heads)
    check_int("rounds", rounds)
    importance = importance or GateGradient()
    check_scored(examples, importance)
    work = OneShot(model, out, examples, calibrates=importance.needs_data, streams=True)
    heads = find_units(work.model, "head")
    # refuses a ratio that no scores could lead to, and heads that cannot be removed
    scores = {name: torch.zeros(units.count(per)) for name, units in heads.items()}
    removed = choose(heads, scores, ratio, ranking, min_heads, per)
    if not removed:
        raise ValueError(f"ratio={ratio} is not a single head of a layer, so that nothing would be removed")
    plan_units(work.model, removed, per=per)
    every, fewer = sum(map(len, scores.values())), sum(map(len, removed.values()))
    what = "heads" if per == "head" else "KV heads, with their query heads"
    passes = Passes(REMOVED)
    if examples.stream:
        passes.to_score(rounds, importance, every, batch_count(work.rows, examples.batch_size))
    words = f"remove {fewer:,} of {every:,} {what}, by {importance}", f"shown {work.shown if work.calibrates else NONE}"
    work.tell(*words, passes=passes.known, beside=passes.beside)
    if dry_run and work.calibrates and work.unread:
        work.tell_dry()
        return
    if examples.stream:
        work.rest(bytes_of_moments(work.model, importance))
    batches, before = work.batches() if work.calibrates else [], None if dry_run else work.measure()
    runs = [make_run(work.model, heads, batch) for batch in batches]
    removed = {}
    for number in range(1, rounds + 1):
        take = partial(choose, heads, ratio=ratio * number / rounds, ranking=ranking, min_units=min_heads, per=per)
        with mask(work.model, removed, per=per), progress_bar("scoring", "batches") as progress:
            scores = score_units(work.model, heads, importance, runs, None, normalize, per, progress=progress)
        removed = choose_including(take, removed, scores)
    plan = plan_units(work.model, removed, per=per)
    if dry_run:
        work.tell_dry(plan.text())
        return
    apply(work.model, plan)
    how = {"by": str(importance), "ranking": ranking, "per": per, "rounds": rounds}
    record = {"heads": plan.to_json()["units"], "importance": how}
    work.save(before, f"without {plan.words}", record, plan.text())
