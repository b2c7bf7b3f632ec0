"""Makes a model smaller within one budget, where that loses least."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from billhook.arguments import check_int, check_path, check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.importance.obs import OBS
from billhook.model.costs import cost_of
from billhook.model.find import check_stored, check_values, find_transformer
from billhook.model.surgery import restored_on_error, values_restored_on_error
from billhook.pruning.repair import RepairOption
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import NoRepair, strip_argument
from billhook.shrinking.cache import check_enough
from billhook.shrinking.candidates import Candidates, Progress
from billhook.shrinking.choice import Chosen, choose_within, smallest
from billhook.shrinking.divergence import divided, to_search
from billhook.shrinking.knapsack import between
from billhook.shrinking.latency import Clock, Workload, clock_of, fast_enough, timed
from billhook.shrinking.layers import counts
from billhook.shrinking.measurement import Measured, compare, measure
from billhook.shrinking.planned import apply_in_turn
from billhook.shrinking.search import Budget, Search
from billhook.shrinking.shrunk import Shrunk
from billhook.shrinking.space import make_slots

Layers = Literal["uniform", "free"]


def shrink(
    model: nn.Module,
    budget: Budget,
    batches: Batches | None = None,
    *,
    layers: Layers = "uniform",
    search: Search | None = None,
    library: str | Path | None = None,
    workload: Workload | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Shrunk:
    """Removes channels, heads and blocks within one budget, as much of each as loses least, and repairs.

    Each layer (a feed-forward, an attention) is pruned to several configs and refitted, on its own. What a config costs the
    whole model is measured at two of them, as KL divergence from the dense model on batches that nothing is fitted to, and is in
    proportion to the error of the refitted linears in between. So is the model without each whole block, where a block whose
    last linears are zero computes nothing, as in most decoders; what is printed says why all must stay. A knapsack then finds
    what loses least, and evolution on the divergence itself refines it, from several numbers of blocks on. What is chosen is cut
    as a whole, in place, and repaired from front to back; the blocks behind one that goes make up for it, too. Where layers stay
    alike, the best choice that cuts other kinds of units is repaired as well if it loses at most a quarter more before, and what
    then loses less is taken. The parts are from ZipLM (Kurtic et al., 2023, https://arxiv.org/abs/2302.04089), MoDeGPT (Lin et
    al., 2024, https://arxiv.org/abs/2408.09632: how much each layer gives decides) and Týr-the-Pruner (Li et al., 2025,
    https://arxiv.org/abs/2503.09657).

    Args:
        model: A Hugging Face model with `logits`, or a module that holds one.
        budget: What is left at most, such as `Budget(params=0.8)`.
        batches: Inputs of the model's forward, as dictionaries; two rows of each source at least, three in all. A `Calibration`
            reads them; by default they are what the model itself writes.
        layers: `"uniform"`: all feed-forwards keep as many channels and all attentions as many heads, which plain checkpoints
            can say; `"free"`: each layer keeps its own number. Whole blocks may go in both.
        search: How it is searched for, as by `Search(generations=0)`.
        library: A folder for the candidates of all layers; by default they stay in memory. A search of the same model, batches,
            importance, rounding and repair goes on from what it holds, also for another budget of `params` or `bytes`.
        workload: What is timed for `latency`, a `billhook.shrinking.latency.Workload`; by default the writing of a token
            after a prompt of 512.
        seed: Decides what evolution tries.
        progress: Called with how many steps of the search are done, and of how many at most.

    Returns:
        What was removed, what was expected and measured, and what other sizes would lose; `print` shows it.

    Raises:
        ValueError: If an argument is not legal, the budget cannot be reached (then with what can), there are too few batches, or
            the model predicts nothing; then nothing has changed.

    Example:
        >>> import torch, billhook as bh
        >>> model = bh.load("tiny")
        >>> batches = [{"input_ids": torch.randint(2048, (8, 64))} for _ in range(3)]
        >>> shrunk = bh.shrink(model, bh.Budget(kv_cache_bytes=0.5), batches, layers="free", search=bh.Search(generations=0))
        >>> shrunk.limit, shrunk.left, sum(now for _, now in shrunk.kept.values())
        (2048, 2048, 16)
    """
    check_types(shrink, locals())
    check_int("seed", seed, 0)
    check_library(library)
    if workload is not None and budget.latency is None:
        raise ValueError(f"workload={workload!r} is what latency is measured of, and latency=None")
    search = search or Search()
    subject = find_transformer(model)
    check_values(subject)
    check_stored(subject)
    clock = None if budget.latency is None else (budget.latency, clock_of(subject, workload))
    candidates = Candidates.find(subject, search.amount(budget), layers == "uniform")
    fitted, held_out = divided(list(read_batches(batches, subject)))
    repair, not_repaired = repair_for(candidates, fitted, search.repair)
    if not_repaired:
        warnings.warn(f"shrink: {not_repaired}", stacklevel=2)
    shrunk = shrink_to(candidates, budget, clock, fitted, held_out, repair, search, seed, library, Progress(progress))
    return replace(shrunk, not_refitted=shrunk.not_refitted or not_repaired)


def repair_for(candidates: Candidates, fitted: Sequence[Any], repair: RepairOption) -> tuple[RepairConfig | None, str]:
    """Returns how linears are refitted; with `"auto"` not at all, and why, where tokens are too few.

    Raises:
        NoRepair: If there are too few tokens for any refit, and a `RepairConfig` was asked for.
    """
    if repair is None:
        return None, ""
    try:
        check_enough(candidates.search, candidates.layers, fitted)
    except NoRepair as error:
        if repair != "auto":
            raise
        return None, f"not repaired: {strip_argument(error)}"
    return RepairConfig() if repair == "auto" else repair, ""


def shrink_to(
    candidates: Candidates,
    budget: Budget,
    clock: tuple[float, Clock] | None,
    fitted: Sequence[Any],
    held_out: Sequence[Any],
    repair: RepairConfig | None,
    search: Search,
    seed: int,
    library: str | Path | None,
    progress: Progress,
) -> Shrunk:
    """Makes a model smaller as `shrink` does, which says what is given, once candidates are found; see `repair_for`.

    A budget of time comes with the clock that it is measured by.
    """
    progress.steps = candidates.most_steps(search.generations, search.candidates)
    if clock is not None:
        candidates = timed(candidates, *clock, progress)
    model, searched = candidates.model, to_search(fitted, candidates.widest)
    folder = None if library is None else Path(library)
    measured = measure(candidates, searched, held_out, search.importance or OBS(), repair, folder, progress)
    chosen = choose_for(measured, budget, searched, fitted, held_out, repair, search, seed, clock)
    changed = [model.get_parameter(name) for name in chosen.planned.weights or {}]
    with restored_on_error(model), values_restored_on_error(changed):  # also if what has been cut cannot be measured
        apply_in_turn(model, chosen.planned.plans, weights=chosen.planned.weights)
        return shrunk_of(measured, chosen)


def choose_for(
    measured: Measured,
    budget: Budget,
    searched: Sequence[Any],
    fitted: Sequence[Any],
    held_out: Sequence[Any],
    repair: RepairConfig | None,
    search: Search,
    seed: int,
    clock: tuple[float, Clock] | None = None,
) -> Chosen:
    """Searches for what loses least within a budget, repaired on `fitted`, and compares it with one kind of unit alone."""
    within = partial(choose_within, measured, fitted, repair, search, seed)
    if clock is not None:
        chosen = fast_enough(measured, *clock, within)
    elif budget.max_loss is not None:
        chosen = smallest(measured, budget.max_loss, held_out, within)
    else:
        chosen = within(measured.candidates.limit)
    return replace(chosen, alone=compare(measured, chosen.limit, searched))


def shrunk_of(measured: Measured, chosen: Chosen) -> Shrunk:
    """Measures the model once the plans of what was chosen have been carried out."""
    candidates, kept, planned = measured.candidates, chosen.kept, chosen.planned
    present = [layer for layer in candidates.layers if kept[layer.name]]
    slots = make_slots(present, measured.losses, candidates.uniform)
    predicted = sum(between(slot, kept[slot.names[0]]) for slot in slots)
    predicted += sum(measured.losses[block.name][-1] for block in candidates.blocks.removed(kept))
    if chosen.times is not None:
        left = round(chosen.times.ratio * candidates.now)
    else:
        left = int(cost_of(candidates.model, candidates.target) or 0)
    return Shrunk(
        plan=planned.units,
        target=candidates.target,
        limit=chosen.limit,
        left=left,
        kept=counts(candidates.layers, kept),
        predicted=predicted,
        measured=measured.divergence.by_source(),
        curve=tuple(chosen.curve),
        tried=tuple(chosen.tried),
        alone=chosen.alone,
        ratio=chosen.ratio,
        times=chosen.times,
        blocks=planned.blocks,
        blocks_stay=candidates.blocks.why,
        merged=planned.merged,
        not_refitted=planned.not_refitted,
    )


def check_library(library: str | Path | None) -> None:
    """Refuses what is no folder, nor free to become one."""
    if library is not None:
        check_path("library", library)
        if Path(library).exists() and not Path(library).is_dir():
            raise ValueError(f"library='{library}' must be a folder, or a name that is free")
