"""Searches for the best smaller model within a budget."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from billhook.arguments import check_int, check_path, check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.engine.state import cpu_by_default
from billhook.importance.obs import OBS
from billhook.model.costs import cost_of
from billhook.model.find import check_stored, check_values, find_transformer
from billhook.model.plan import apply_plan
from billhook.model.surgery import restored_on_error, values_restored_on_error
from billhook.pruning.plan import UnitPlan
from billhook.pruning.planning import plan_units
from billhook.pruning.repair import RepairOption
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import NoRepair, strip_argument
from billhook.shrinking.divergence import search_batches, split_batches
from billhook.shrinking.knapsack import interpolated_loss
from billhook.shrinking.latency import Clock, Workload, fast_enough, make_clock, with_latency
from billhook.shrinking.measurement import Measurement, compare, measure
from billhook.shrinking.modules import unit_counts
from billhook.shrinking.planning import apply_plans
from billhook.shrinking.result import Shrunk
from billhook.shrinking.scope import Progress, SearchScope
from billhook.shrinking.search import Budget, Search
from billhook.shrinking.selection import SearchResult, TokensChoice, search_with_tokens, search_within, smallest
from billhook.shrinking.space import make_slots, modules_outside
from billhook.shrinking.variants import check_token_count
from billhook.shrinking.vocabulary import SmallerVocabularies, VocabularyLevel, VocabularyText

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
    workload: Workload | None = None,
    text: VocabularyText | None = None,
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

    With `Search(tokens=True)`, smaller vocabularies compete: each is measured by what the same held-out text costs in the tokens
    that are left, and the one with the lowest sum of losses after repair is used. The repair sees text in these tokens. What the
    selected units leave of the budget is filled with tokens.

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
        workload: Workload for a latency budget, a `billhook.shrinking.latency.Workload`. Defaults to decoding after a prompt of
            512 tokens.
        text: Tokenizer of the model, and text to count tokens in, for `Search(tokens=True)`: a
            `billhook.shrinking.vocabulary.VocabularyText`.
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
        >>> shrunk = bh.shrink(model, bh.Budget(kv_cache_bytes=0.5), batches, layers="free", search=search)
        >>> shrunk.limit, shrunk.left, sum(now for _, now in shrunk.kept.values())
        (4096, 4096, 16)
    """
    check_types(shrink, locals())
    check_int("seed", seed, 0)
    check_variant_cache(variant_cache)
    if workload is not None and budget.latency is None:
        raise ValueError(f"workload={workload!r} requires a latency budget. Set Budget(latency=...), or remove workload.")
    search = search or Search()
    if search.tokens != (text is not None):
        raise ValueError(f"tokens={search.tokens} {'requires' if search.tokens else 'does not use'} text. See VocabularyText.")
    subject = find_transformer(model)
    check_values(subject)
    check_stored(subject)
    clock = None if budget.latency is None else (budget.latency, make_clock(subject, workload))
    amount = search.amount(budget)
    fitted, held_out = split_batches(list(read_batches(batches, subject)))
    vocabularies = None if text is None else SmallerVocabularies.find(subject, amount.target or "", text, held_out)
    scope = SearchScope.find(subject, amount, layers == "uniform", vocabularies.most_saved if vocabularies else 0)
    repair, not_repaired = resolve_repair(scope, fitted, search.repair)
    if not_repaired:
        warnings.warn(f"shrink: {not_repaired}", stacklevel=3)
    shrunk = run_shrink(
        scope, budget, clock, fitted, held_out, repair, search, seed, variant_cache, Progress(progress), vocabularies
    )
    return replace(shrunk, not_refitted=shrunk.not_refitted or not_repaired)


def resolve_repair(scope: SearchScope, fitted: Sequence[Any], repair: RepairOption) -> tuple[RepairConfig | None, str]:
    """Returns the repair settings; `"auto"` becomes None if there are too few tokens.

    Raises:
        NoRepair: If there are too few tokens for any refit, and `repair` is a `RepairConfig`.
    """
    if repair is None:
        return None, ""
    try:
        check_token_count(scope.search, scope.modules, fitted)
    except NoRepair as error:
        if repair != "auto":
            raise
        return None, f"not repaired: {strip_argument(error)}"
    return RepairConfig() if repair == "auto" else repair, ""


def run_shrink(
    scope: SearchScope,
    budget: Budget,
    clock: tuple[float, Clock] | None,
    fitted: Sequence[Any],
    held_out: Sequence[Any],
    repair: RepairConfig | None,
    search: Search,
    seed: int,
    variant_cache: str | Path | None,
    progress: Progress,
    vocabularies: SmallerVocabularies | None = None,
) -> Shrunk:
    """Runs the search of `shrink` for a known scope; see `resolve_repair`.

    `clock` is the latency budget with its clock, or None. `vocabularies` compete if they are passed.
    """
    progress.steps = scope.most_steps(search.generations, search.candidates)
    if clock is not None:
        scope = with_latency(scope, *clock, progress)
    model, searched = scope.model, search_batches(fitted, scope.widest)
    folder = None if variant_cache is None else Path(variant_cache)
    measurement = measure(scope, searched, held_out, search.importance or OBS(), repair, folder, progress)
    with_tokens = None
    if vocabularies is None:
        chosen = select_for_budget(measurement, budget, searched, fitted, held_out, repair, search, seed, clock)
    else:
        alone = compare(measurement, scope.limit, searched)
        with_tokens = search_with_tokens(measurement, vocabularies, fitted, held_out, repair, search, seed)
        measurement, chosen = with_tokens.measurement, replace(with_tokens.result, alone=alone)
        measurement.cache.forget()
    changed = [model.get_parameter(name) for name in chosen.planned.weights or {}]
    with restored_on_error(model), values_restored_on_error(changed):  # also if what has been cut cannot be measured
        apply_plans(model, chosen.planned.plans, weights=chosen.planned.weights)
        shrunk = measure_result(measurement, chosen)
        if vocabularies is None or with_tokens is None:
            return shrunk
        tokens = remove_tokens(model, vocabularies, with_tokens.level)
        return replace(in_bits(shrunk, with_tokens, scope), tokens=tokens)


def remove_tokens(model: PreTrainedModel, vocabularies: SmallerVocabularies, level: VocabularyLevel) -> UnitPlan | None:
    """Removes the tokens that a level does not keep, if any."""
    if not level.saved:
        return None
    removed = np.delete(np.arange(vocabularies.size), level.kept).tolist()
    tokens = plan_units(model, {vocabularies.where: removed}, "token")
    assert isinstance(tokens, UnitPlan)
    apply_plan(model, tokens)
    return tokens


def in_bits(shrunk: Shrunk, chosen: TokensChoice, scope: SearchScope) -> Shrunk:
    """Returns the result of units and the vocabulary, with losses in bits per byte."""
    level, dense, smallest_level = chosen.level, chosen.levels[0], chosen.levels[-1]
    alone = {kind: (left, dense.bits * loss) for kind, (left, loss) in shrunk.alone.items()}
    if scope.now - smallest_level.saved <= scope.limit:
        alone["tokens"] = scope.now - smallest_level.saved, smallest_level.loss
    return replace(
        shrunk,
        limit=scope.limit,
        left=int(cost_of(scope.model, scope.target) or 0),
        predicted=level.loss + level.bits * shrunk.predicted,
        measured=level.with_units(shrunk.measured),
        alone=alone,
        token_loss=level.loss,
        per_byte=True,
    )


def select_for_budget(
    measurement: Measurement,
    budget: Budget,
    searched: Sequence[Any],
    fitted: Sequence[Any],
    held_out: Sequence[Any],
    repair: RepairConfig | None,
    search: Search,
    seed: int,
    clock: tuple[float, Clock] | None = None,
) -> SearchResult:
    """Selects the best repaired candidate within a budget."""
    within = partial(search_within, measurement, fitted, repair, search, seed)
    if clock is not None:
        chosen = fast_enough(measurement, *clock, within)
    elif budget.max_loss is not None:
        chosen = smallest(measurement, budget.max_loss, held_out, within)
    else:
        chosen = within(measurement.scope.limit)
    alone = compare(measurement, chosen.limit, searched)
    measurement.cache.forget()
    return replace(chosen, alone=alone)


def measure_result(measurement: Measurement, chosen: SearchResult) -> Shrunk:
    """Measures the model after the selected plans were applied."""
    scope, kept, planned = measurement.scope, chosen.kept, chosen.planned
    removed = scope.blocks.removed(kept)
    slots = make_slots(modules_outside(scope.modules, removed), measurement.losses, scope.uniform)
    predicted = sum(interpolated_loss(slot, kept[slot.names[0]]) for slot in slots)
    predicted += sum(measurement.losses[block.name][-1] for block in removed)
    left = int(cost_of(scope.model, scope.target) or 0) if chosen.times is None else round(chosen.times.ratio * scope.now)
    return Shrunk(
        plan=planned.units,
        target=scope.target,
        limit=chosen.limit,
        left=left,
        kept=unit_counts(scope.modules, kept),
        predicted=predicted,
        measured=measurement.divergence.by_source(),
        curve=tuple(chosen.curve),
        tried=tuple(chosen.tried),
        alone=chosen.alone,
        ratio=chosen.ratio,
        times=chosen.times,
        blocks=planned.blocks,
        blocks_stay=scope.blocks.why,
        merged=planned.merged,
        not_refitted=planned.not_refitted,
    )


def check_variant_cache(variant_cache: str | Path | None) -> None:
    """Raises a ValueError if the path is a file."""
    if variant_cache is not None:
        check_path("variant_cache", variant_cache)
        if Path(variant_cache).exists() and not Path(variant_cache).is_dir():
            raise ValueError(f"variant_cache='{variant_cache}' is a file. Pass a folder.")
