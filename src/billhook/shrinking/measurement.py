"""The second stage of a search: what each candidate costs the whole model, from a few that are measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.batches import runs_of
from billhook.importance.blocks import BlockInfluence
from billhook.importance.score import Importance, make_run, score
from billhook.pruning.choice import rank_units
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.cache import CandidateCache, fill_cache, key_of
from billhook.shrinking.candidates import Candidates, Progress
from billhook.shrinking.divergence import Agreed, Divergence
from billhook.shrinking.knapsack import Frontier, Levels, Slot, cost, kept_at
from billhook.shrinking.layers import Layer
from billhook.shrinking.merging import Merging, find_merging
from billhook.shrinking.space import Space, all_kept, free_space, make_slots, uniform_spaces
from billhook.units.find import find_units
from billhook.units.gates import mask
from billhook.units.units import UnitKind

PROBES = (0.4, 0.8)
"""How far down the grid of a layer those candidates lie that are measured."""
CALLED: dict[UnitKind, str] = {"head": "heads", "channel": "channels", "block": "blocks"}


@dataclass(frozen=True, eq=False)
class Measured:
    """The loss and the cost of each candidate; the model stays unchanged.

    Attributes:
        candidates: What may be removed; configs of layers in which heads merge are those that are worth a choice.
        scores: The scores of units by module, of attentions those of KV heads.
        divergence: Measures the model.
        cache: The candidates.
        losses: By layer, what is lost at each of its configs; by block, the last is what is lost without it.
        merging: The KV heads that may merge; None where none may.
        progress: Says how far the search is.
    """

    candidates: Candidates
    scores: Mapping[str, Tensor]
    divergence: Divergence
    cache: CandidateCache
    losses: dict[str, list[float]]
    merging: Merging | None
    progress: Progress
    _known: dict[frozenset[tuple[str, int]], float] = field(default_factory=dict)

    @cached_property
    def spaces(self) -> list[Space]:
        """The spaces that a search chooses from: one for each number of removed blocks if layers are uniform."""
        make = uniform_spaces if self.candidates.uniform else free_space
        return make(self.candidates.layers, self.losses, self.candidates.blocks.able, self.candidates.now)

    def lost(self, kept: Mapping[str, int]) -> float:
        """Measures what the model loses where layers keep so many units, each refitted alone."""
        self.progress.advance()
        key = frozenset(kept.items())
        if key not in self._known:
            with self.cache.assembled(kept):
                self._known[key] = self.divergence.mean()
        return self._known[key]


def measure(
    candidates: Candidates,
    fitted: Sequence[Any],
    held_out: Sequence[Any],
    importance: Importance,
    repair: RepairConfig | None,
    folder: Path | None = None,
    progress: Progress | None = None,
    merges: bool = True,
    agreed: Agreed = lambda value: value,
) -> Measured:
    """Scores units, makes the candidates, in a folder or in memory, and measures what they cost the model.

    Args:
        candidates: What may be removed.
        fitted: Batches to score on and to fit to.
        held_out: Batches to measure on.
        importance: How units are scored.
        repair: How linears are refitted; None: not at all.
        folder: Where candidates are kept; None: in memory.
        progress: Says how far it is.
        merges: Whether KV heads may merge, for a budget of their cache, wherever that loses less than removal.
        agreed: Returns, of what several ranks have found alike but for rounding, that of the first, by which all decide.
    """
    progress = progress or Progress()
    model, search, layers = candidates.model, candidates.search, candidates.layers
    progress.enter("scoring")
    divergence = Divergence(model, runs_of(model, held_out), agreed)
    units = {name: search.units[name] for layer in layers for name in layer.names}
    scores = agreed(score(model, units, importance, fitted, per="kv_head"))
    settings: list[object] = [str(repair), search.amount.round_to, len(fitted)]
    cache_folder = folder and folder / key_of(model, settings, scores, [*fitted, *held_out])
    cache = CandidateCache(model, cache_folder, candidates.blocks.writers)
    if progress.reused is not None:
        progress.reused(len(cache.errors))
    progress.enter("refitting candidates of layers")
    runs = [make_run(model, units, batch) for batch in fitted]
    fill_cache(cache, layers, units, scores, runs, repair, progress.advance)
    progress.enter("measuring what they lose")
    losses = dict[str, list[float]]()
    for layer in layers:
        progress.advance()
        losses[layer.name] = config_losses(cache, divergence, layer)
    losses = agreed(losses)
    merging = find_merging(candidates, cache) if merges else None
    if merging is not None:
        merging.fill(layers, fitted, repair, progress.advance)
        layers, losses = merging.choose(divergence, layers, losses, candidates.uniform)
    for block in candidates.blocks.able:
        progress.advance()
        losses[block.name] = [0.0, cache.lost(block.name, 0, divergence.mean)]
    return Measured(replace(candidates, layers=layers), scores, divergence, cache, agreed(losses), merging, progress)


def config_losses(cache: CandidateCache, divergence: Divergence, layer: Layer) -> list[float]:
    """Returns what each config of a layer loses, the whole model's KL divergence, with all else dense.

    It is measured at the probes; at other configs it is in proportion to the error of the refitted linears between them, which is
    known for all: a straight line from zero through the probes' pairs of error and loss, and on beyond the last. Fewer units
    never lose less.
    """
    points = {0.0: 0.0}
    for kept in probes(layer.grid()):
        lost = cache.lost(layer.name, kept, divergence.mean)
        points[cache.errors[layer.name, kept]] = lost
    errors, losses = sorted(points), [0.0]
    last = errors[-1]
    for kept in layer.configs[1:]:
        error = cache.errors[layer.name, kept]
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


def of_one_kind(measured: Measured, limit: int) -> dict[UnitKind, tuple[list[Slot], Levels]]:
    """Finds the levels that lose least within a limit if layers of one kind alone keep less, by kind, where that is enough.

    There is nothing to compare where all layers are of one kind.
    """
    candidates = measured.candidates
    slots = make_slots(candidates.layers, measured.losses, candidates.uniform)
    within = limit - candidates.now + all_kept(slots)
    kinds = {layer.name: layer.kind for layer in candidates.layers}
    chosen = dict[UnitKind, tuple[list[Slot], Levels]]()
    for kind in dict.fromkeys(kinds.values()) if len(set(kinds.values())) > 1 else ():
        able = list[Slot]()
        for slot in slots:
            levels = len(slot.kept) if kinds[slot.names[0]] == kind else 1
            able.append(Slot(slot.names, slot.kept[:levels], slot.costs[:levels], slot.losses[:levels]))
        levels_within = Frontier(able).within(within)
        if levels_within is not None:
            chosen[kind] = slots, levels_within
    return chosen


def compare(measured: Measured, limit: int, fitted: Sequence[Any]) -> dict[str, tuple[int, float]]:
    """Measures what would be lost within the budget without one kind of unit alone; candidates are let go of after that.

    Returns:
        By the name of a kind, what is left of the target, and lost.
    """
    candidates, alone = measured.candidates, dict[str, tuple[int, float]]()
    measured.progress.enter("comparing with one kind of unit")
    for kind, (slots, levels) in of_one_kind(measured, limit).items():
        left = candidates.now - all_kept(slots) + cost(slots, levels)
        alone[CALLED[kind]] = left, measured.lost(kept_at(slots, levels))
    ends = candidates.search.amount.first, candidates.search.amount.last
    if candidates.target == "params":
        blocks = fewer_blocks(candidates.model, fitted, measured.divergence, candidates.now - limit, ends)
        if blocks is not None:
            alone[CALLED["block"]] = candidates.now - blocks[0], blocks[1]
    measured.cache.forget()
    return alone


def fewer_blocks(
    model: PreTrainedModel, batches: Sequence[Any], divergence: Divergence, parameters: int, ends: tuple[int, int]
) -> tuple[int, float] | None:
    """Measures the model without its least important blocks (ShortGPT's score), as many as hold so many parameters.

    Returns:
        How many parameters they hold, and the divergence; None where there is not one stack of alike blocks, or too few.
    """
    try:
        ((name, blocks),) = find_units(model, "block").items()
    except ValueError:
        return None
    sizes = {sum(one.numel() for one in block.parameters()) for block in cast(nn.ModuleList, model.get_submodule(name))}
    size = sizes.pop()
    number = -(-parameters // size) if size else 0
    if sizes or not size or number > blocks.count() - sum(ends):
        return None
    scores = score(model, {name: blocks}, BlockInfluence(), batches)
    removed = rank_units(blocks, scores[name], ends)[:number]
    with mask(model, {name: sorted(removed)}, "block"):
        return number * size, divergence.mean()
