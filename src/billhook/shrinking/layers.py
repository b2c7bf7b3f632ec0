"""Finds the layers that a search may prune, the numbers of units that each may keep, and what a unit costs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.model.costs import kv_cache_bytes
from billhook.model.layers import is_linear
from billhook.pruning.amount import divides_among_devices
from billhook.pruning.choice import rank_units
from billhook.pruning.cut import Cut, coupled_modules, find_cut
from billhook.pruning.removal import try_removal
from billhook.pruning.target import RatioSearch
from billhook.units.units import Per, UnitKind, Units

PARTS = 8
"""Candidates keep so many parts of a layer."""


@dataclass(frozen=True)
class Layer:
    """Feed-forward channels, or KV heads with the query heads that they serve, of which fewer may be kept.

    Attributes:
        names: The modules that lose the same units; nearly always one.
        kind: The kind of the units.
        count: How many there are now.
        allowed: The numbers of them that may be kept, falling, from all on.
        each: What one unit costs, of an attention one KV head with its query heads: parameters, bytes, or bytes of the key/value
            cache per token, as the budget says.
        configs: The numbers that a search chooses from, falling, from all on.
        times: Numbers of units, rising, each with what they cost by the clock, where the budget is one of time.
        merges: The numbers to which KV heads may be merged, where the budget is one of their cache.
    """

    names: tuple[str, ...]
    kind: UnitKind
    count: int
    allowed: tuple[int, ...]
    each: int
    configs: tuple[int, ...] = ()
    times: tuple[tuple[int, int], ...] = ()
    merges: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name of the first module."""
        return self.names[0]

    def cost(self, kept: int) -> int:
        """Returns what is left of the budget's target in this layer where it keeps so many units."""
        if not self.times:
            return kept * self.each
        numbers, times = zip(*self.times, strict=True)
        return round(float(np.interp(kept, numbers, times)))

    def saves(self, kept: int) -> int:
        """Returns by how much less is left where it keeps so many units instead of all."""
        return self.cost(self.count) - self.cost(kept)

    def grid(self) -> tuple[int, ...]:
        """Returns the numbers to keep that suit any budget: nearest to eighths of all, and where heads merge, falling."""
        numbers = set(self.allowed)
        if len(numbers) > PARTS:
            sizes = [self.count * part / PARTS for part in range(1, PARTS + 1)]
            numbers = {min(self.allowed, key=lambda kept: abs(kept - size)) for size in sizes}
        return tuple(sorted({*numbers, *self.merges}, reverse=True))


def find_layers(search: RatioSearch, target: str, alike: bool = False) -> list[Layer]:
    """Finds the layers that may keep less for a target, with what each unit costs; refuses a model without any.

    Protected layers stay as they are, and those whose units something else than linears of their own reads, and kinds of units
    that the model's class does not run without.

    Args:
        search: The model, and its units.
        target: What is limited.
        alike: Whether all attentions are to keep as many KV heads: then numbers that engines can divide among devices, where
            numbers are left to us, and channels make up for what they do not save.
    """
    model, amount, free = search.model, search.amount, search.removable()
    groups = [names for names in coupled_modules(free) if all(readable(model, free[name]) for name in names)]
    layers, taken = list[Layer](), set[str]()
    for names, cost in zip(groups, _unit_costs(search, groups, target), strict=True):
        units, readers = free[names[0]], {reader for name in names for reader in free[name].readers}
        count, step = units.count("kv_head"), search.step(names[0]) if units.kind == "channel" else 1
        allowed = tuple(n for n in range(count, 0, -1) if n == count or (n % step == 0 and n >= amount.min_units))
        caches = target == "kv_cache_bytes" and units.kind == "head"
        if alike and amount.round_to == "auto" and units.kind == "head" and not caches:
            allowed = tuple(kept for kept in allowed if kept == count or divides_among_devices(kept))
        if len(allowed) > 1 and cost > 0 and not readers & taken:
            merges = tuple(kept for kept in allowed[1:] if caches and count % kept == 0)
            layer = Layer(tuple(names), units.kind, count, allowed, cost, merges=merges)
            layers.append(replace(layer, configs=layer.grid()))
            taken |= readers
    refusals = {
        kind: _refusal(search, [layer for layer in layers if layer.kind == kind]) for kind in {layer.kind for layer in layers}
    }
    able = [layer for layer in layers if not refusals[layer.kind]]
    if layers and not able:
        raise ValueError(f"{target}: {refusals[layers[0].kind]}")
    if not able:
        raise ValueError(
            f"{target}: no layer of this {type(model).__name__} may keep less, of channels or KV heads that linears alone read"
        )
    return able


def readable(model: PreTrainedModel, units: Units) -> bool:
    """Tells whether linears, and nothing else, read the units of a layer."""
    return bool(units.readers) and all(is_linear(model.get_submodule(reader)) for reader in units.readers)


def _refusal(search: RatioSearch, layers: Sequence[Layer]) -> str:
    """Says why the model's class does not run where layers keep as few units as they may; empty if it does."""
    removed = dict[str, list[int]]()
    for layer in layers:
        removed |= any_removed(layer, search.units, layer.allowed[-1])
    try:
        try_removal(search.model, cut_of(search, removed, "head"))
    except ValueError as error:
        return str(error)
    return ""


def cut_of(search: RatioSearch, numbers: Mapping[str, list[int]], per: Per = "kv_head") -> Cut:
    """Finds what is removed with channels and KV heads, or query heads."""
    return find_cut(search.model, search.structure, search.units, numbers, per)


def _unit_costs(search: RatioSearch, groups: Sequence[list[str]], target: str) -> list[int]:
    """Counts what one unit (of attentions, one KV head) of modules that lose them together costs; 0 where it may not go."""
    model, units, cached = search.model, search.units, target == "kv_cache_bytes"

    def cut(names: list[str]) -> Cut | None:
        try:
            return None if cached and units[names[0]].kind != "head" else cut_of(search, {name: [0] for name in names})
        except ValueError:  # as under a norm that spans all heads
            return None

    if not cached:
        return [_parameters_saved(model, cut(names), target) for names in groups]
    cache, cuts = kv_cache_bytes(model) or 0, list(map(cut, groups))
    # asking the class what each attention saves takes long; where the first has an equal share of the cache, all have
    heads, costs = sum(one.count("kv_head") for one in units.values() if one.kind == "head"), list[int]()
    for names, removed in zip(groups, cuts, strict=True):
        costs.append(0 if removed is None else cache - (kv_cache_bytes(try_removal(model, removed)) or 0))
        if removed is not None and costs[-1] * heads == cache * len(names):
            return [0 if cut is None else cache // heads * len(names) for names, cut in zip(groups, cuts, strict=True)]
    return costs


def _parameters_saved(model: PreTrainedModel, cut: Cut | None, target: str) -> int:
    """Counts the parameters, or bytes, that go with a cut."""
    parameters, cuts, total = dict(model.named_parameters()), {} if cut is None else cut.cuts, 0
    for name in {name for name, _ in cuts if name in parameters}:
        parameter = parameters[name]
        left = math.prod(len(cuts.get((name, dim), range(size))) for dim, size in enumerate(parameter.shape))
        total += (parameter.numel() - left) * (parameter.element_size() if target == "bytes" else 1)
    return total


def removed_units(layer: Layer, units: Mapping[str, Units], scores: Mapping[str, Tensor], kept: int) -> dict[str, list[int]]:
    """Returns the units, of attentions query heads, that go where a layer keeps so many: those of the lowest scores."""
    if kept == layer.count:
        return {}
    mean = torch.stack([scores[name].double() for name in layer.names]).mean(0)
    lowest = sorted(rank_units(units[layer.name], mean)[: layer.count - kept])
    return {name: units[name].query_heads(lowest) if layer.kind == "head" else lowest for name in layer.names}


def any_removed(layer: Layer, units: Mapping[str, Units], kept: int) -> dict[str, list[int]]:
    """Returns as many units as go where a layer keeps so many, whichever these are."""
    return removed_units(layer, units, {name: torch.zeros(layer.count) for name in layer.names}, kept)


def counts(layers: Sequence[Layer], kept: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Returns by module how many units there are and stay, where layers, by name, keep so many."""
    return {name: (layer.count, kept[layer.name]) for layer in layers for name in layer.names}


def alike_layers(layers: Sequence[Layer], uniform: bool) -> list[list[Layer]]:
    """Returns the layers that take one config together: each alone, or all of one kind and size."""
    return grouped(layers, lambda layer: (layer.kind, layer.count, layer.allowed)) if uniform else [[layer] for layer in layers]


def grouped(layers: Sequence[Layer], key: Callable[[Layer], object]) -> list[list[Layer]]:
    """Groups layers that have a key in common."""
    groups: dict[object, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return list(groups.values())
