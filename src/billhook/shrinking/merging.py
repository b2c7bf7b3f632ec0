"""Finds where KV heads may merge, makes the candidates in which they do, and takes these where they lose less than removal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any

from transformers import PreTrainedModel

from billhook.engine.batches import Run
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.memory import memory_to_hold
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.methods import SVD
from billhook.kv_heads.moments import gather
from billhook.kv_heads.plan import KVHeadPlan, plan_kv_heads
from billhook.model.costs import kv_cache_bytes
from billhook.model.layers import matrix_of
from billhook.model.meta import to_meta
from billhook.model.shape import set_shape
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.cache import UNFITTED, CandidateCache, resting
from billhook.shrinking.candidates import Candidates
from billhook.shrinking.divergence import Divergence
from billhook.shrinking.layers import Layer, alike_layers
from billhook.shrinking.merged import refit_readers

METHOD = SVD()
"""How KV heads become one."""
ByNumber = dict[str, dict[int, LazyTensors]]
"""Parameters by attention and number of KV heads."""


@dataclass(eq=False)
class Merging:
    """The KV heads of a model that may merge.

    Attributes:
        attentions: The attentions of the model.
        cache: Where the candidates in which they do are held.
        able: By layer, the numbers of KV heads to which its own can merge.
        chosen: The layers and numbers where they do.
    """

    attentions: Attentions
    cache: CandidateCache
    able: dict[str, list[int]]
    chosen: set[tuple[str, int]] = field(default_factory=set)

    def fill(
        self, layers: Sequence[Layer], batches: Sequence[Any], repair: RepairConfig | None, done: Callable[[], None]
    ) -> None:
        """Makes the candidates in which KV heads merge, except those that the cache holds.

        What reads heads is refitted in them, as where heads are removed; what it is in all that is planned, which is repaired as
        a whole, the cache holds beside.

        Args:
            layers: The layers.
            batches: Batches that show what heads do; runs know which tokens count for each linear.
            repair: How linears are refitted; None: not at all.
            done: Called after each layer.
        """
        attentions, cache = self.attentions, self.cache
        runs = [batch if isinstance(batch, Run) else attentions.trial(batch) for batch in batches]
        parts = len({run.source for run in runs}) + 2 if repair is not None else 0
        missing: dict[Layer, list[int]] = {}
        for layer in layers:
            numbers = [kept for kept in self.able.get(layer.name, ()) if (merged(layer), kept) not in cache.errors]
            if numbers:
                missing[layer] = numbers
        sizes = {layer: _size(attentions, layer, numbers, parts) for layer, numbers in missing.items()}
        for batch_of_layers in _passes(sizes, memory_to_hold(cache.model.device)):
            numbers_by_name = {name: missing[layer] for layer in batch_of_layers for name in layer.names}
            try:
                equal, readers = _candidates(attentions, numbers_by_name, runs, repair)
            except ValueError:  # of an attention that cannot be watched: removal remains
                self.able = {}
                return
            for layer in batch_of_layers:
                for kept in missing[layer]:
                    weights, refitted = (reduce(or_, (new[name][kept] for name in layer.names)) for new in (equal, readers))
                    if refitted:
                        cache.add(merged(layer) + UNFITTED, kept, 0.0, weights.under(refitted.modules))
                    cache.add(merged(layer), kept, 0.0, weights | refitted)
                done()

    def choose(
        self, divergence: Divergence, layers: Sequence[Layer], losses: Mapping[str, list[float]], uniform: bool
    ) -> tuple[list[Layer], dict[str, list[float]]]:
        """Takes the merged candidates that lose less than those in which heads are removed; each is measured.

        It is decided for layers that take one config together, as the whole model then loses. Configs in which more is kept, and
        more lost, than in another one go.

        Returns:
            The layers with the configs that stay, and what they lose at each.
        """
        chosen, new_losses = {layer.name: layer for layer in layers}, dict(losses)
        for group in alike_layers(layers, uniform):
            lost = {layer.name: dict(zip(layer.configs, losses[layer.name], strict=True)) for layer in group}
            able = [kept for kept in group[0].configs if all(kept in self.able.get(name, ()) for name in lost)]
            better = [kept for kept in able if self._loses_less(divergence, group, kept, lost)]
            for layer in group if better else ():
                for kept in better:
                    lost[layer.name][kept] = self.cache.measured[merged(layer), kept]
                    self.cache.instead[layer.name, kept] = merged(layer)
                    self.chosen.add((layer.name, kept))
            for layer in group if better else ():
                total = {kept: sum(of_layer[kept] for of_layer in lost.values()) for kept in layer.configs}
                stay = tuple(kept for kept in total if all(total[kept] <= total[fewer] for fewer in total if fewer < kept))
                chosen[layer.name] = replace(layer, allowed=stay, configs=stay)
                new_losses[layer.name] = [lost[layer.name][kept] for kept in stay]
        return list(chosen.values()), new_losses

    def _loses_less(
        self, divergence: Divergence, group: Sequence[Layer], kept: int, removed: Mapping[str, Mapping[int, float]]
    ) -> bool:
        """Measures merged candidates, each alone, and tells whether they lose less than removal, together."""
        alone = [self.cache.lost(merged(layer), kept, divergence.mean) for layer in group]
        if len(group) == 1:
            return alone[0] < removed[group[0].name][kept]
        together = list[float]()
        for names in (map(merged, group), (layer.name for layer in group)):
            with self.cache.assembled(dict.fromkeys(names, kept)):
                together.append(divergence.mean())
        return together[0] < together[1]

    def weights(self, layer: Layer, kept: int) -> LazyTensors:
        """Returns the parameters with which the heads of each group of a layer are equal, and their reader as it was."""
        return self.cache.weights(merged(layer), kept) | self.cache.weights(merged(layer) + UNFITTED, kept)


def find_merging(candidates: Candidates, cache: CandidateCache) -> Merging | None:
    """Finds the KV heads that may merge, as has been tried on meta tensors; None where none may."""
    layers = [layer for layer in candidates.layers if layer.merges]
    counts = {name: layer.count for layer in layers for name in layer.names}
    if not counts:
        return None
    try:
        attentions = Attentions(candidates.model, dict.fromkeys(counts, 1))
        if {name: attention.kv_heads for name, attention in attentions.projections.items()} != counts:
            return None
        attentions.check(METHOD)
    except ValueError:
        return None
    able: dict[str, list[int]] = {}
    for group in alike_layers(layers, uniform=True):
        trials = [group] if candidates.uniform else [group, group[-1:]]
        numbers = [kept for kept in group[0].merges if all(_saves(candidates.model, trial, kept) for trial in trials)]
        able |= {layer.name: numbers for layer in group}
    return Merging(attentions, cache, able)


def plans_of(model: PreTrainedModel, heads: Mapping[str, int]) -> tuple[list[KVHeadPlan], PreTrainedModel]:
    """Finds the plans, in turn, by which attentions come to have so many KV heads, and the model after that, on meta tensors."""
    plans, smaller = list[KVHeadPlan](), model
    for number in sorted(set(heads.values()), reverse=True):
        plans.append(plan_kv_heads(smaller, number, METHOD, [name for name, count in heads.items() if count == number]))
        smaller = to_meta(smaller)
        set_shape(smaller, plans[-1].shape)
    return plans, smaller


def merged(layer: Layer) -> str:
    """Returns the name under which a cache holds the candidates of a layer in which KV heads merge."""
    return f"{layer.name} merged"


def _saves(model: PreTrainedModel, layers: Sequence[Layer], kept: int) -> bool:
    """Tells whether layers can merge their heads to so many, and the cache is then as small as if the others were removed."""
    try:
        _, smaller = plans_of(model, {name: kept for layer in layers for name in layer.names})
    except ValueError:
        return False
    return (kv_cache_bytes(model) or 0) - (kv_cache_bytes(smaller) or 0) == sum(layer.saves(kept) for layer in layers)


def _passes(sizes: Mapping[Layer, int], most: int) -> Iterator[list[Layer]]:
    """Yields layers whose moments, of so many bytes, fit into memory together: for each list there is a pass over the batches."""
    layers, used = list[Layer](), 0
    for layer, size in sizes.items():
        if layers and used + size > most:
            yield layers
            layers, used = [], 0
        layers, used = [*layers, layer], used + size
    if layers:
        yield layers


def _candidates(
    attentions: Attentions, numbers: Mapping[str, Sequence[int]], runs: Sequence[Run], repair: RepairConfig | None
) -> tuple[ByNumber, ByNumber]:
    """Returns parameters with which the heads of each group are equal, and those of what reads them, refitted."""
    model, projections = attentions.model, {name: attentions.projections[name] for name in numbers}
    moments = gather(model, projections, numbers, runs)
    equal: ByNumber = {name: {} for name in numbers}
    for name, by_number in moments.items():
        for kept, of_heads in by_number.items():
            equal[name][kept] = resting(model, by_parameter(attentions.equal_in(name, METHOD, of_heads)))
    if repair is None:
        return equal, {name: dict.fromkeys(own, LazyTensors({})) for name, own in equal.items()}
    return equal, refit_readers(model, projections, equal, runs, repair)


def _size(attentions: Attentions, layer: Layer, numbers: Sequence[int], parts: int) -> int:
    """Returns how many bytes moments take, of heads and of what reads them, for each number of KV heads and part of the data."""
    size = 0
    for projections in (attentions.projections[name] for name in layer.names):
        widths = [rows.index.size for rows in (projections.k, projections.v)]
        size += sum(8 * width**2 // number for width in widths for number in numbers)
        rows, columns = matrix_of(attentions.model.get_submodule(projections.o.linear))[0].shape
        size += len(numbers) * parts * 8 * columns * (rows + columns)
    return size
