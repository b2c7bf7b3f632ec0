"""Searches for the best smaller model within a budget."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from billhook.arguments import check_int, check_path, check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.engine import cpu_by_default
from billhook.importance.obs import OBS
from billhook.model import check_stored, check_values, cost_of, find_transformer, restored_on_error, values_restored_on_error
from billhook.pruning.repair import RepairOption
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import NoRepair, strip_argument
from billhook.shrinking.divergence import search_batches, split_batches
from billhook.shrinking.knapsack import interpolated_loss
from billhook.shrinking.measurement import Measurement, measure
from billhook.shrinking.modules import unit_counts
from billhook.shrinking.result import Budget, Search, Shrunk
from billhook.shrinking.scope import Progress, SearchScope
from billhook.shrinking.selection import SearchResult, select_for_budget
from billhook.shrinking.shrink_plan import apply_plans
from billhook.shrinking.space import make_slots, modules_outside
from billhook.shrinking.variants import check_token_count

Layers = Literal["uniform", "free"]


@cpu_by_default()
def shrink(
    model: nn.Module,
    budget: Budget,
    batches: Batches | None = None,
    *,
    layers: Layers = "uniform",
    search: Search | None = None,
    variant_cache: str | Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Shrunk:
    """Removes channels, heads, and blocks within a budget, and repairs the model.

    Each attention and MLP module is pruned to several levels and refitted separately. The loss of a level is the KL divergence
    of the model from the dense model on held-out batches. It is measured at two levels of each module and follows the error of
    the refitted layers in between. The loss without each block is measured too, if the block computes nothing once its output
    layers are zero; most decoders qualify, and the result reports the reason otherwise. A knapsack solver minimizes the sum of
    these losses, and an evolutionary search refines its solution by measured divergence. The selected model is pruned in place
    and repaired from front to back, including the layers behind removed blocks. With uniform modules, the best candidate that
    prunes other kinds of units is also repaired if its loss is at most 1.25x the best, and the better of both is used.

    With `RepairConfig.match`, candidates of a size are compared before it, and only the selected one is reconstructed.

    Reference: ZipLM (Kurtic et al., 2023), https://arxiv.org/abs/2302.04089
    Reference: MoDeGPT (Lin et al., 2024), https://arxiv.org/abs/2408.09632
    Reference: Týr-the-Pruner (Li et al., 2025), https://arxiv.org/abs/2503.09657

    Args:
        model: A Hugging Face model with `logits`, or a module that contains one.
        budget: The budget, such as `Budget(params=0.8)`.
        batches: Calibration batches (dictionaries of forward inputs) or a `Calibration`: at least three examples, and two of each
            source. Defaults to `"mixed"` and `"generated"` text for language models.
        layers: `"uniform"` keeps the same number of channels in all MLP modules and of heads in all attention modules, which
            gives a standard checkpoint. `"free"` lets each module keep its own number. Both may remove blocks.
        search: Search settings, such as `Search(generations=0)`. Defaults to `Search()`.
        variant_cache: Folder for the variants. Later searches with the same model, batches, importance, rounding, and repair
            reuse them, also with another `params` or `bytes` budget. Defaults to None (kept in memory).
        seed: Seed of the evolutionary search.
        progress: Callback with the number of finished steps and the total.

    Returns:
        The removed units, the estimated and measured loss, and the loss at other sizes; `print` shows a summary.

    Raises:
        ValueError: If an argument is not legal, the budget is out of reach (the message states the reachable range), there are
            too few batches, or the model predicts nothing. The model is then unchanged.

    Example:
        >>> import torch, billhook as bh
        >>> model = bh.load("tiny", dtype="float32")
        >>> batches = [{"input_ids": torch.randint(2048, (2, 32))} for _ in range(3)]
        >>> search = bh.Search(generations=0, repair=None)
        >>> shrunk = bh.shrink(model, bh.Budget(params=0.9), batches, layers="free", search=search)
        >>> shrunk.left <= shrunk.limit, shrunk.left == model.num_parameters()
        (True, True)
    """
    check_types(shrink, locals())
    check_int("seed", seed, 0)
    check_variant_cache(variant_cache)
    search = search or Search()
    subject = find_transformer(model)
    check_values(subject)
    check_stored(subject)
    repair_batches, held_out = split_batches(list(read_batches(batches, subject)))
    scope = SearchScope.find(subject, budget.amount(search), layers == "uniform")
    repair, not_repaired = resolve_repair(scope, repair_batches, search.repair)
    if not_repaired:
        warnings.warn(f"shrink: {not_repaired}", stacklevel=3)
    shrunk = run_shrink(scope, budget, repair_batches, held_out, repair, search, seed, variant_cache, Progress(progress))
    return replace(shrunk, not_refitted=shrunk.not_refitted or not_repaired)


def resolve_repair(scope: SearchScope, batches: Sequence[Any], repair: RepairOption) -> tuple[RepairConfig | None, str]:
    """Returns the repair settings; `"auto"` becomes None if there are too few tokens.

    Raises:
        NoRepair: If there are too few tokens for any refit, and `repair` is a `RepairConfig`.
    """
    if repair is None:
        return None, ""
    try:
        check_token_count(scope.search, scope.modules, batches)
    except NoRepair as error:
        if repair != "auto":
            raise
        return None, f"not repaired: {strip_argument(error)}"
    return RepairConfig() if repair == "auto" else repair, ""


def run_shrink(
    scope: SearchScope,
    budget: Budget,
    repair_batches: Sequence[Any],
    held_out: Sequence[Any],
    repair: RepairConfig | None,
    search: Search,
    seed: int,
    variant_cache: str | Path | None,
    progress: Progress,
) -> Shrunk:
    """Runs the search of `shrink` for a known scope; see `resolve_repair`."""
    progress.steps = scope.most_steps(search.generations, search.candidates)
    folder = None if variant_cache is None else Path(variant_cache)
    batches = search_batches(repair_batches, scope.widest)
    measurement = measure(scope, batches, held_out, search.importance or OBS(), repair, folder, progress)
    chosen = select_for_budget(measurement, budget, repair_batches, held_out, repair, search, seed)
    changed = [scope.model.get_parameter(name) for name in chosen.planned.weights or {}]
    # also if the smaller model cannot be measured
    with restored_on_error(scope.model), values_restored_on_error(changed):
        apply_plans(scope.model, chosen.planned.plans, weights=chosen.planned.weights)
        return measure_result(measurement, chosen)


def measure_result(measurement: Measurement, chosen: SearchResult) -> Shrunk:
    """Measures the model after the selected plans were applied."""
    scope, kept, planned = measurement.scope, chosen.kept, chosen.planned
    removed = scope.blocks.removed(kept)
    slots = make_slots(modules_outside(scope.modules, removed), measurement.losses, scope.uniform)
    predicted = sum(interpolated_loss(slot, kept[slot.names[0]]) for slot in slots)
    predicted += sum(measurement.losses[block.name][-1] for block in removed)
    return Shrunk(
        plan=planned.units,
        target=scope.target,
        limit=chosen.limit,
        left=int(cost_of(scope.model, scope.target) or 0),
        kept=unit_counts(scope.modules, kept),
        predicted=predicted,
        measured=measurement.divergence.by_source(),
        curve=tuple(chosen.curve),
        tried=tuple(chosen.tried),
        ratio=chosen.ratio,
        blocks=planned.blocks,
        blocks_stay=scope.blocks.why,
        not_refitted=planned.not_refitted,
    )


def check_variant_cache(variant_cache: str | Path | None) -> None:
    """Raises a ValueError if the path is a file."""
    if variant_cache is not None:
        check_path("variant_cache", variant_cache)
        if Path(variant_cache).exists() and not Path(variant_cache).is_dir():
            raise ValueError(f"variant_cache='{variant_cache}' is a file. Pass a folder.")
