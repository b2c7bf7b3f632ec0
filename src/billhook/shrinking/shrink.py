"""Makes a model smaller within one budget, where that loses least."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from billhook.arguments import a_path, annotated, whole
from billhook.calibration.calibration import Batches, batches_of
from billhook.importance.obs import OBS
from billhook.model.find import check_stored, check_values, find_transformer
from billhook.model.surgery import undone_by_errors, values_kept
from billhook.pruning.repair import Repairing
from billhook.repairs.moments import NoRepair, without_name
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.divergence import divided, to_search
from billhook.shrinking.latency import Clock, Workload, clock_of, fast_enough, timed
from billhook.shrinking.planned import apply_in_turn
from billhook.shrinking.search import Budget, Search
from billhook.shrinking.shrunk import Shrunk
from billhook.shrinking.smallest import Found, smallest
from billhook.shrinking.variants import check_enough
from billhook.shrinking.work import Work

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

    Each place (a feed-forward, an attention) is cut to several levels and refitted, on its own; for `params` and `bytes` an
    attention may also keep fewer of the query heads that share a KV head, as many of each. What a level costs the whole model is
    measured at two of them, as KL divergence from the dense model on batches that nothing is fitted to, and is in proportion to
    the error of the refitted linears in between. So is the model without each whole block, where a block whose last linears are
    zero computes nothing, as in most decoders; what is printed says why all must stay. A knapsack then finds what loses least,
    and evolution on the divergence itself refines it, from several numbers of blocks on. What is chosen is cut as a whole, in
    place, and repaired from front to back; the blocks behind one that goes make up for it, too. Where layers stay alike, the best
    choice that cuts other kinds of units is repaired as well if it loses at most a quarter more before, and what then loses less
    is taken. The parts are from ZipLM (Kurtic et al., 2023, https://arxiv.org/abs/2302.04089), MoDeGPT (Lin et al., 2024,
    https://arxiv.org/abs/2408.09632: how much each layer gives decides) and Týr-the-Pruner (Li et al., 2025,
    https://arxiv.org/abs/2503.09657).

    Args:
        model: A Hugging Face model with `logits`, or a module that holds one.
        budget: What is left at most, such as `Budget(params=0.8)`.
        batches: Inputs of the model's forward, as dictionaries; two rows of each source at least, three in all. A `Calibration`
            reads them; by default they are what the model itself writes.
        layers: `"uniform"`: all feed-forwards keep as many channels and all attentions as many heads, which plain checkpoints
            can say; `"free"`: each place keeps its own number. Whole blocks may go in both.
        search: How it is searched for, as by `Search(generations=0)`.
        library: A folder for the variants of all places; by default they stay in memory. A search of the same model, batches,
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
    annotated(shrink, locals())
    whole("seed", seed, 0)
    check_library(library)
    if workload is not None and budget.latency is None:
        raise ValueError(f"workload={workload!r} is what latency is measured of, and latency=None")
    search = search or Search()
    subject = find_transformer(model)
    check_values(subject)
    check_stored(subject)
    clock = None if budget.latency is None else (budget.latency, clock_of(subject, workload))
    work = Work.begun(subject, search.amount(budget), layers == "uniform", timed=clock is not None)
    work.progress = progress
    fitted, held_out = divided(list(batches_of(batches, subject)))
    how = repair_for(work, fitted, search.repair)
    if work.not_repaired:
        warnings.warn(f"shrink: {work.not_repaired}", stacklevel=2)
    return shrink_begun(work, fitted, held_out, budget, clock, search, how, library, seed)


def repair_for(work: Work, fitted: Sequence[Any], repair: Repairing) -> RepairConfig | None:
    """Returns how linears are refitted; with `"auto"` not at all, for a reason that the work notes, where tokens are too few.

    Raises:
        NoRepair: If there are too few tokens for any refit, and a `RepairConfig` was asked for.
    """
    work.not_repaired = ""
    if repair is None:
        return None
    try:
        check_enough(work.search, work.places, fitted)
    except NoRepair as error:
        if repair != "auto":
            raise
        work.not_repaired = f"not repaired: {without_name(error)}"
        return None
    return RepairConfig() if repair == "auto" else repair


def shrink_begun(
    work: Work,
    fitted: Sequence[Any],
    held_out: Sequence[Any],
    budget: Budget,
    latency: tuple[float, Clock] | None,
    search: Search,
    repair: RepairConfig | None,
    library: str | Path | None,
    seed: int,
) -> Shrunk:
    """Makes a model smaller as `shrink` does, which says what is given, once a work has begun for a budget (see `repair_for`).

    A budget of time comes with the clock that it is measured by.
    """
    work.steps = work.most_steps(search.generations, search.candidates)
    if latency is not None:
        work = timed(work, *latency)
    searched, folder = to_search(fitted, work.widest), None if library is None else Path(library)
    work.measure(searched, held_out, search.importance or OBS(), repair, folder)
    choosing = partial(work.chosen, search.generations, search.candidates, seed)
    if latency is not None:
        found = fast_enough(work, *latency, fitted, repair, choosing)
    elif budget.max_loss is not None:
        found = smallest(work, budget.max_loss, held_out, fitted, repair, choosing)
    else:
        found = Found.within(work, fitted, repair, choosing)
    work.compare(searched)
    given = [work.model.get_parameter(name) for name in found.planned.weights or {}]
    with undone_by_errors(work.model), values_kept(given):  # also if what has been cut cannot be measured
        apply_in_turn(work.model, found.planned.plans, weights=found.planned.weights)
        return work.finished(found.planned, found.kept, found.curve, found.tried, found.ratio, found.times)


def check_library(library: str | Path | None) -> None:
    """Refuses what is no folder, nor free to become one."""
    if library is not None:
        a_path("library", library)
        if Path(library).exists() and not Path(library).is_dir():
            raise ValueError(f"library='{library}' must be a folder, or a name that is free")
