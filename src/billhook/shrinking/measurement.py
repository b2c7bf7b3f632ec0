"""Second stage of a search: the loss of each variant, from a few measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import Self

from billhook.engine.batches import runs_of
from billhook.importance.blocks import BlockInfluence
from billhook.importance.score import Importance, make_run, score
from billhook.pruning.choice import rank_units
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.divergence import Broadcast, Divergence
from billhook.shrinking.knapsack import Frontier, Levels, Slot, cost, kept_at
from billhook.shrinking.modules import PrunableModule, units_by_name
from billhook.shrinking.pooling import HeadPooling, find_pooling
from billhook.shrinking.scope import Progress, SearchScope
from billhook.shrinking.space import Space, free_space, full_cost, make_slots, uniform_spaces
from billhook.shrinking.variants import VariantCache, cache_key, fill_cache
from billhook.units.find import find_units
from billhook.units.gates import mask
from billhook.units.units import UnitKind

PROBES = (0.4, 0.8)
"""Positions on a module's grid of the variants that are measured."""
KIND_NAMES: dict[UnitKind, str] = {"head": "heads", "channel": "channels", "block": "blocks"}


@dataclass(frozen=True, eq=False)
class Measurement:
    """Loss and cost of each variant.

    Attributes:
        scope: The prunable modules and blocks; levels of modules with pooled heads are those worth choosing.
        scores: Scores of the units by module, for attention modules those of KV heads.
        divergence: Measures the model.
        cache: The variants.
        losses: By module, the loss at each level; by block, the last entry is the loss without it.
        pooling: The KV heads that may be pooled; None if there are none.
        progress: Progress of the search.
    """

    scope: SearchScope
    scores: Mapping[str, Tensor]
    divergence: Divergence
    cache: VariantCache
    losses: dict[str, list[float]]
    pooling: HeadPooling | None
    progress: Progress
    _known: dict[frozenset[tuple[str, int]], float] = field(default_factory=dict)

    @cached_property
    def spaces(self) -> list[Space]:
        """The spaces to search: for each number of removed blocks if modules are uniform."""
        make = uniform_spaces if self.scope.uniform else free_space
        return make(self.scope.modules, self.losses, self.scope.blocks.removable, self.scope.now)

    def on(self, held_out: Sequence[Any], limit: int) -> Self:
        """Returns the same for another limit, measured on other batches."""
        divergence = Divergence(self.scope.model, runs_of(self.scope.model, held_out), self.divergence.broadcast)
        return replace(self, scope=replace(self.scope, limit=limit), divergence=divergence, _known={})

    def lost(self, kept: Mapping[str, int]) -> float:
        """Returns the measured loss of a candidate, assembled from variants."""
        self.progress.advance()
        key = frozenset(kept.items())
        if key not in self._known:
            with self.cache.assembled(kept):
                self._known[key] = self.divergence.mean()
        return self._known[key]


def measure(
    scope: SearchScope,
    fitted: Sequence[Any],
    held_out: Sequence[Any],
    importance: Importance,
    repair: RepairConfig | None,
    folder: Path | None = None,
    progress: Progress | None = None,
    pool_heads: bool = True,
    broadcast: Broadcast = lambda value: value,
) -> Measurement:
    """Scores units, creates the variants, and measures their loss.

    Args:
        scope: The prunable modules and blocks.
        fitted: Batches for scoring and fitting.
        held_out: Batches for measuring.
        importance: Scores the units.
        repair: Settings of the refits; None keeps the old weights.
        folder: Folder for the variants. Defaults to None (in memory).
        progress: Progress of the search.
        pool_heads: If True, KV heads may be pooled for a KV cache budget, if that loses less than removal.
        broadcast: Returns the first rank's value of a measurement, by which all ranks decide.
    """
    progress = progress or Progress()
    model, search, modules = scope.model, scope.search, scope.modules
    progress.enter("scoring")
    divergence = Divergence(model, runs_of(model, held_out), broadcast)
    units = units_by_name(modules, search.units)
    scores = broadcast(score(model, units, importance, fitted, per="kv_head"))
    settings: list[object] = [str(repair and replace(repair, match=None)), search.amount.round_to, len(fitted)]
    cache_folder = folder and folder / cache_key(model, settings, scores, [*fitted, *held_out])
    writers = {block.name: scope.blocks.writers[block.number] for block in scope.blocks.removable}
    cache = VariantCache(model, cache_folder, writers)
    if progress.reused is not None:
        progress.reused(len(cache.errors))
    progress.enter("refitting variants")
    runs = [make_run(model, units, batch) for batch in fitted]
    fill_cache(cache, modules, units, scores, runs, repair, progress.advance)
    progress.enter("measuring losses")
    losses = {}
    for module in modules:
        progress.advance()
        losses[module.name] = config_losses(cache, divergence, module)
    losses = broadcast(losses)
    pooling = find_pooling(scope, cache) if pool_heads else None
    if pooling is not None:
        pooling.fill(modules, fitted, repair, progress.advance)
        modules, losses = pooling.choose(divergence, modules, losses, scope.uniform)
    for block in scope.blocks.removable:
        progress.advance()
        losses[block.name] = [0.0, cache.lost(block.name, 0, divergence.mean)]
    return Measurement(replace(scope, modules=modules), scores, divergence, cache, broadcast(losses), pooling, progress)


def config_losses(cache: VariantCache, divergence: Divergence, module: PrunableModule) -> list[float]:
    """Returns the loss of a module at each level.

    The KL divergence of the model, all else dense.

    The loss is measured at the probes. Between them it follows the error of the refitted consumer layers, which is known for all
    levels: piecewise linear from zero through the pairs of error and loss, extended past the last. Fewer units never lose less.
    """
    points = {0.0: 0.0}
    for kept in probes(module.grid()):
        lost = cache.lost(module.name, kept, divergence.mean)
        points[cache.errors[module.name, kept]] = lost
    errors, losses = sorted(points), [0.0]
    last = errors[-1]
    for kept in module.levels[1:]:
        error = cache.errors[module.name, kept]
        if last and error > last:
            losses.append(points[last] * error / last)
        else:
            losses.append(float(np.interp(error, errors, [points[known] for known in errors])))
    return list(accumulate(losses, max))


def probes(grid: Sequence[int]) -> list[int]:
    """Returns the numbers of units at which the whole model is measured.

    >>> probes((384, 336, 288, 240, 192, 144, 96, 48)), probes((3, 2, 1)), probes((2, 1))
    ([240, 96], [2, 1], [1])
    """
    below = grid[1:]
    return [below[number] for number in dict.fromkeys(round(part * (len(below) - 1)) for part in PROBES)]


def single_kind_levels(measurement: Measurement, limit: int) -> dict[UnitKind, tuple[list[Slot], Levels]]:
    """Returns by kind the best levels if only this kind is pruned.

    Kinds that cannot meet the limit are missing.

    Empty if all modules are of one kind.
    """
    scope = measurement.scope
    slots = make_slots(scope.modules, measurement.losses, scope.uniform)
    within = limit - scope.now + full_cost(slots)
    kinds = {module.name: module.kind for module in scope.modules}
    chosen = {}
    for kind in dict.fromkeys(kinds.values()) if len(set(kinds.values())) > 1 else ():
        able = []
        for slot in slots:
            levels = len(slot.kept) if kinds[slot.names[0]] == kind else 1
            able.append(Slot(slot.names, slot.kept[:levels], slot.costs[:levels], slot.losses[:levels]))
        levels_within = Frontier(able).within(within)
        if levels_within is not None:
            chosen[kind] = slots, levels_within
    return chosen


def compare(measurement: Measurement, limit: int, fitted: Sequence[Any]) -> dict[str, tuple[int, float]]:
    """Measures the loss of pruning a single kind of unit within the budget.

    Returns:
        By kind, the remaining cost and the loss.
    """
    scope, alone = measurement.scope, dict[str, tuple[int, float]]()
    measurement.progress.enter("comparing single kinds of unit")
    for kind, (slots, levels) in single_kind_levels(measurement, limit).items():
        left = scope.now - full_cost(slots) + cost(slots, levels)
        alone[KIND_NAMES[kind]] = left, measurement.lost(kept_at(slots, levels))
    ends = scope.search.amount.first, scope.search.amount.last
    if scope.target == "params":
        blocks = measure_without_blocks(scope.model, fitted, measurement.divergence, scope.now - limit, ends)
        if blocks is not None:
            alone[KIND_NAMES["block"]] = scope.now - blocks[0], blocks[1]
    return alone


def measure_without_blocks(
    model: PreTrainedModel, batches: Sequence[Any], divergence: Divergence, parameters: int, ends: tuple[int, int]
) -> tuple[int, float] | None:
    """Measures the model without enough of its least important blocks (ShortGPT's score).

    Returns:
        Their number of parameters and the divergence; None if there is no single stack of equal blocks, or too few blocks.
    """
    try:
        ((name, blocks),) = find_units(model, "block").items()
    except ValueError:
        return None
    sizes = {
        sum(parameter.numel() for parameter in block.parameters()) for block in cast(nn.ModuleList, model.get_submodule(name))
    }
    size = sizes.pop()
    number = -(-parameters // size) if size else 0
    if sizes or not size or number > blocks.count() - sum(ends):
        return None
    scores = score(model, {name: blocks}, BlockInfluence(), batches)
    removed = rank_units(blocks, scores[name], ends)[:number]
    with mask(model, {name: sorted(removed)}, "block"):
        return number * size, divergence.mean()
