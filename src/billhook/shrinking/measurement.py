"""Second stage of a search: the loss of each variant, from a few measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from billhook.engine import runs_of
from billhook.importance.score import Importance, make_run, rank_channels, scores_of, sum_units
from billhook.linalg import IndicesByModule
from billhook.model import expert_layers
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.divergence import Broadcast, Divergence
from billhook.shrinking.modules import PrunableModule, units_by_name
from billhook.shrinking.scope import Progress, SearchScope
from billhook.shrinking.space import Point, Space, free_space, uniform_spaces
from billhook.shrinking.variants import VariantCache, cache_key, fill_cache

PROBES = (0.4, 0.8)
"""Positions on a module's grid of the variants that are measured."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """Loss and cost of each variant.

    Attributes:
        scope: The prunable modules and blocks.
        scores: Scores of the units by module, for attention modules those of KV heads.
        orders: Channels of each expert by rank, of modules whose scores are those of ranks.
        divergence: Measures the model.
        cache: The variants.
        losses: By module, the loss at each level; by block, the last entry is the loss without it.
        progress: Progress of the search.
    """

    scope: SearchScope
    scores: Mapping[str, Tensor]
    orders: IndicesByModule
    divergence: Divergence
    cache: VariantCache
    losses: dict[str, list[float]]
    progress: Progress
    _known: dict[Point, float] = field(default_factory=dict)

    @cached_property
    def spaces(self) -> list[Space]:
        """The spaces to search: for each number of removed blocks if modules are uniform."""
        make = uniform_spaces if self.scope.uniform else free_space
        return make(self.scope.modules, self.losses, self.scope.blocks.removable, self.scope.now)

    def lost(self, point: Point) -> float:
        """Returns the measured loss of a candidate, assembled from variants."""
        self.progress.advance()
        if point not in self._known:
            with self.cache.assembled(self.kept(point)):
                self._known[point] = self.divergence.mean()
        return self._known[point]

    def kept(self, point: Point) -> dict[str, int]:
        """Returns the number of kept units of a candidate by module."""
        return self.spaces[point[0]].kept(point[1])


def measure(
    scope: SearchScope,
    batches: Sequence[Any],
    held_out: Sequence[Any],
    importance: Importance,
    repair: RepairConfig | None,
    folder: Path | None = None,
    progress: Progress | None = None,
    broadcast: Broadcast = lambda value: value,
) -> Measurement:
    """Scores units, creates the variants, and measures their loss.

    Args:
        scope: The prunable modules and blocks.
        batches: Batches for scoring and fitting.
        held_out: Batches for measuring.
        importance: Scores the units.
        repair: Settings of the refits; None keeps the old weights.
        folder: Folder for the variants. Defaults to None (in memory).
        progress: Progress of the search.
        broadcast: Returns the first rank's value of a measurement, by which all ranks decide.
    """
    progress = progress or Progress()
    model, search, modules = scope.model, scope.search, scope.modules
    progress.enter("scoring")
    divergence = Divergence(model, runs_of(model, held_out), broadcast)
    units = units_by_name(modules, search.units)
    sums = sum_units(model, units, importance, batches, None, "kv_head")
    orders = broadcast(rank_channels(sums))
    scores = broadcast(scores_of(importance, sums))
    settings = [str(repair and replace(repair, match=None)), search.amount.round_to, len(batches)]
    cache_folder = folder and folder / cache_key(model, settings, scores, [*batches, *held_out])
    writers = {block.name: scope.blocks.writers[block.number] for block in scope.blocks.removable}
    cache = VariantCache(model, cache_folder, writers)
    if progress.report_cached is not None:
        progress.report_cached(len(cache.errors))
    progress.enter("refitting variants")
    runs = [make_run(model, units, batch) for batch in batches]
    with expert_layers(model):
        fill_cache(cache, modules, units, scores, orders, runs, repair, progress)
    progress.enter("measuring losses")
    losses = {}
    for module in modules:
        progress.advance()
        losses[module.name] = config_losses(cache, divergence, module)
    losses = broadcast(losses)
    for block in scope.blocks.removable:
        progress.advance()
        losses[block.name] = [0.0, cache.lost(block.name, 0, divergence)]
    return Measurement(scope, scores, orders, divergence, cache, broadcast(losses), progress)


def config_losses(cache: VariantCache, divergence: Divergence, module: PrunableModule) -> list[float]:
    """Returns the KL divergence of the model at each level of a module, all else dense.

    The loss is measured at the probes. Between them it follows the error of the refitted consumer layers, which is known for all
    levels: piecewise linear from zero through the pairs of error and loss, extended past the last. Fewer units never lose less.
    """
    points = {0.0: 0.0}
    for kept in probes(module.grid()):
        lost = cache.lost(module.name, kept, divergence)
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
