"""Pools KV heads for a KV cache budget, where that loses less than removing them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.engine.batches import Run
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.memory import memory_to_hold
from billhook.engine.store import store_of
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.distance import EqualHeads
from billhook.kv_heads.methods import SVD
from billhook.kv_heads.moments import gather
from billhook.kv_heads.plan import KVHeadPlan, plan_kv_heads
from billhook.model.costs import kv_cache_bytes
from billhook.model.layers import matrix_of
from billhook.model.meta import to_meta
from billhook.model.rotary import rotating
from billhook.model.shape import set_shape
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.divergence import Divergence
from billhook.shrinking.modules import PrunableModule, uniform_groups
from billhook.shrinking.pooled_consumers import refit_consumers
from billhook.shrinking.scope import SearchScope
from billhook.shrinking.variants import UNFITTED, VariantCache, staged

METHOD = SVD(frequencies="fixed")
"""Pooling method of variants. Those of each layer are combined, and all layers rotate with the same frequencies."""
FREE = SVD()
"""Pooling method if all layers keep as many heads."""
ByNumber = dict[str, dict[int, LazyTensors]]
"""Parameters by attention module and number of KV heads."""


@dataclass(eq=False)
class HeadPooling:
    """The KV heads of a model that may be pooled.

    Attributes:
        attentions: The attention modules of the model.
        cache: Holds the variants with pooled heads.
        sizes: By module, the numbers of KV heads that its heads can be pooled to.
        chosen: Pairs of a module and a number of KV heads for which pooling is used.
    """

    attentions: Attentions
    cache: VariantCache
    sizes: dict[str, list[int]]
    chosen: set[tuple[str, int]] = field(default_factory=set)

    def fill(
        self, modules: Sequence[PrunableModule], batches: Sequence[Any], repair: RepairConfig | None, done: Callable[[], None]
    ) -> None:
        """Creates the variants with pooled heads that the cache lacks.

        Their consumer layers are refitted, as for removed heads. The cache also keeps each consumer layer before its refit, for
        plans that are repaired jointly.

        Args:
            modules: The modules.
            batches: Batches for the statistics of heads; runs know the non-padding tokens of each linear layer.
            repair: Settings of the refits; None keeps the old weights.
            done: Callback after each module.
        """
        attentions, cache = self.attentions, self.cache
        runs = self._runs(batches)
        parts = 2 if repair is not None else 0
        missing, sizes = dict[PrunableModule, list[int]](), dict[PrunableModule, int]()
        for module in modules:
            numbers = [kept for kept in self.sizes.get(module.name, ()) if (pooled_name(module), kept) not in cache.errors]
            if numbers:
                missing[module], sizes[module] = numbers, _size(attentions, module, numbers, parts)
        for in_pass in _passes(sizes, memory_to_hold(cache.model.device)):
            numbers_by_name = dict[str, list[int]]()
            for module in in_pass:
                numbers_by_name |= dict.fromkeys(module.names, missing[module])
            try:
                equal, consumers = _pooled_variants(attentions, numbers_by_name, runs, repair)
            except ValueError:  # of an attention module that cannot be watched: removal remains
                self.sizes = {}
                return
            for module in in_pass:
                for kept in missing[module]:
                    self._add(module, kept, equal, consumers)
                done()

    def _add(self, module: PrunableModule, kept: int, equal: ByNumber, consumers: ByNumber) -> None:
        """Adds the variant of a module with pooled heads to the cache."""
        weights = reduce(or_, (equal[name][kept] for name in module.names))
        refitted = reduce(or_, (consumers[name][kept] for name in module.names))
        if refitted:
            self.cache.add(pooled_name(module) + UNFITTED, kept, 0.0, weights.under(refitted.modules))
        self.cache.add(pooled_name(module), kept, 0.0, weights | refitted)

    def choose(
        self, divergence: Divergence, modules: Sequence[PrunableModule], losses: Mapping[str, list[float]], uniform: bool
    ) -> tuple[list[PrunableModule], dict[str, list[float]]]:
        """Selects pooling at each level where it measurably loses less than removal.

        Modules that share a level are decided jointly, by the loss of the whole model. Levels that keep more units but lose more
        than another level are dropped.

        Returns:
            The modules with their remaining levels, and the losses at these.
        """
        chosen, new_losses = dict(zip(modules, modules, strict=True)), dict(losses)
        for group in uniform_groups(modules, uniform):
            lost = {module.name: dict(zip(module.levels, losses[module.name], strict=True)) for module in group}
            better = []
            for kept in group[0].levels:
                if kept in self.sizes.get(group[0].name, ()) and self._loses_less(divergence, group, kept, lost):
                    better.append(kept)
            if not better:
                continue
            for module in group:
                for kept in better:
                    lost[module.name][kept] = self.cache.measured[pooled_name(module), kept]
                    self.cache.substitutes[module.name, kept] = pooled_name(module)
                    self.chosen.add((module.name, kept))
            levels = _undominated(lost, group[0].levels)
            for module in group:
                chosen[module] = replace(module, allowed=levels, levels=levels)
                new_losses[module.name] = [lost[module.name][kept] for kept in levels]
        return list(chosen.values()), new_losses

    def _loses_less(
        self, divergence: Divergence, group: Sequence[PrunableModule], kept: int, removed: Mapping[str, Mapping[int, float]]
    ) -> bool:
        """Returns whether pooling measurably loses less than removal."""
        alone = [self.cache.lost(pooled_name(module), kept, divergence.mean) for module in group]
        if len(group) == 1:
            return alone[0] < removed[group[0].name][kept]
        together = []
        for names in (map(pooled_name, group), removed):
            with self.cache.assembled(dict.fromkeys(names, kept)):
                together.append(divergence.mean())
        return together[0] < together[1]

    @torch.no_grad()
    def with_frequencies(
        self, heads: Mapping[str, int], fixed: LazyTensors, batches: Sequence[Any], divergence: Divergence
    ) -> EqualHeads:
        """Returns pooled heads with other rotary frequencies, if these lose less than `fixed` ones.

        Layers share the frequencies, so all attention modules must keep the same number of heads.
        """
        model, kept = self.attentions.model, EqualHeads(fixed)
        if heads.keys() != self.attentions.projections.keys() or len(set(heads.values())) > 1:
            return kept
        attentions = Attentions(model, heads)
        if attentions.rotation[0] is None or attentions.rotates_in_blocks:
            return kept
        ((_, free),) = attentions.reconstructed([FREE], self._runs(batches))
        free = replace(free, values=free.values.without([name for name in free.values if name not in fixed]))
        losses = []
        for new in (kept, free):
            with store_of(model).computing_with(new.values), rotating(model, new.rope):
                losses.append(divergence.mean())
        return free if losses[1] < losses[0] else kept

    def _runs(self, batches: Sequence[Any]) -> list[Run]:
        return [batch if isinstance(batch, Run) else self.attentions.trial(batch) for batch in batches]

    def weights(self, module: PrunableModule, kept: int) -> LazyTensors:
        """Returns the parameters with equal heads, before the refit of the consumer layer."""
        return self.cache.weights(pooled_name(module), kept) | self.cache.weights(pooled_name(module) + UNFITTED, kept)


def find_pooling(scope: SearchScope, cache: VariantCache) -> HeadPooling | None:
    """Returns the KV heads that may be pooled, as tried on the meta device.

    None if there are none.
    """
    counts = dict[str, int]()
    for module in scope.modules:
        if module.pool_sizes:
            counts |= dict.fromkeys(module.names, module.count)
    if not counts:
        return None
    try:
        attentions = Attentions(scope.model, dict.fromkeys(counts, 1))
        if {name: attention.kv_heads for name, attention in attentions.projections.items()} != counts:
            return None
        attentions.check(METHOD)
    except ValueError:
        return None
    sizes = {}
    for group in uniform_groups(scope.modules, uniform=True):
        numbers = []
        for kept in group[0].pool_sizes:
            if _saves(scope.model, group, kept) and (scope.uniform or _saves(scope.model, group[-1:], kept)):
                numbers.append(kept)
        for module in group:
            sizes[module.name] = numbers
    return HeadPooling(attentions, cache, sizes)


def _undominated(lost: Mapping[str, Mapping[int, float]], levels: Sequence[int]) -> tuple[int, ...]:
    """Returns the levels without any that lose more than a lower level."""
    undominated, least = list[int](), math.inf
    for kept in reversed(levels):
        total = sum(of_module[kept] for of_module in lost.values())
        if total <= least:
            undominated.append(kept)
            least = total
    return tuple(reversed(undominated))


def pooling_plans(model: PreTrainedModel, heads: Mapping[str, int]) -> tuple[list[KVHeadPlan], PreTrainedModel]:
    """Returns the plans for these numbers of KV heads, and the converted meta model."""
    plans, smaller = list[KVHeadPlan](), model
    for number in sorted(set(heads.values()), reverse=True):
        plans.append(plan_kv_heads(smaller, number, METHOD, [name for name, count in heads.items() if count == number]))
        smaller = to_meta(smaller)
        set_shape(smaller, plans[-1].shape)
    return plans, smaller


def pooled_name(module: PrunableModule) -> str:
    """Returns the name of a module's variants with pooled heads."""
    return f"{module.name} merged"


def _saves(model: PreTrainedModel, modules: Sequence[PrunableModule], kept: int) -> bool:
    """Returns whether pooling is possible and shrinks the cache as much as removal."""
    try:
        _, smaller = pooling_plans(model, {name: kept for module in modules for name in module.names})
    except ValueError:
        return False
    return (kv_cache_bytes(model) or 0) - (kv_cache_bytes(smaller) or 0) == sum(module.saves(kept) for module in modules)


def _passes(sizes: Mapping[PrunableModule, int], most: int) -> Iterator[list[PrunableModule]]:
    """Yields modules whose statistics fit into memory together.

    Each list needs one pass over the batches.
    """
    modules, used = list[PrunableModule](), 0
    for module, size in sizes.items():
        if modules and used + size > most:
            yield modules
            modules, used = [], 0
        modules, used = [*modules, module], used + size
    if modules:
        yield modules


def _pooled_variants(
    attentions: Attentions, numbers: Mapping[str, Sequence[int]], runs: Sequence[Run], repair: RepairConfig | None
) -> tuple[ByNumber, ByNumber]:
    """Returns parameters with equal heads, and the refitted consumer layers."""
    model, projections = attentions.model, {name: attentions.projections[name] for name in numbers}
    equal, consumers = ByNumber(), ByNumber()
    for name, by_number in gather(model, projections, numbers, runs).items():
        equal[name], consumers[name] = {}, dict.fromkeys(by_number, LazyTensors({}))
        for kept, of_heads in by_number.items():
            equal[name][kept] = staged(model, by_parameter(attentions.equal_in(name, METHOD, of_heads)))
    return equal, consumers if repair is None else refit_consumers(model, projections, equal, runs, repair)


def _size(attentions: Attentions, module: PrunableModule, numbers: Sequence[int], parts: int) -> int:
    """Returns the bytes of the statistics of heads and consumer layers."""
    size = 0
    for name in module.names:
        projections = attentions.projections[name]
        for rows in (projections.k, projections.v):
            size += sum(8 * rows.index.size**2 // number for number in numbers)
        outputs, inputs = matrix_of(attentions.model.get_submodule(projections.o.linear))[0].shape
        size += len(numbers) * parts * 8 * inputs * (outputs + inputs)
    return size
