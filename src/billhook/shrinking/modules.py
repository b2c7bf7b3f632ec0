"""Finds the prunable modules, their numbers of units, and the cost of a unit."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from billhook.model import is_linear
from billhook.pruning.amount import divides_among_devices, kernel_multiple
from billhook.pruning.choice import rank_units
from billhook.pruning.cut import coupled_modules, find_cut, size_after
from billhook.pruning.removal import try_removal
from billhook.pruning.target import RatioSearch
from billhook.units import UnitKind, UnitNumbers, Units, UnitsByModule

PARTS = 8
"""Levels keep multiples of one part in this many of a module."""


@dataclass(frozen=True)
class PrunableModule:
    """An attention or MLP module that may keep fewer KV heads or channels.

    Attributes:
        names: Modules that lose the same units; nearly always one.
        kind: Kind of its units.
        count: Current number of units.
        allowed: Numbers of units that it may keep, decreasing, starting with all.
        unit_cost: Cost of one unit (KV heads include their query heads): parameters or bytes.
        levels: Numbers of units that the search considers, decreasing, starting with all.
    """

    names: tuple[str, ...]
    kind: UnitKind
    count: int
    allowed: tuple[int, ...]
    unit_cost: int
    levels: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Name of the first module."""
        return self.names[0]

    def cost(self, kept: int) -> int:
        """Returns the cost of this module at a number of kept units."""
        return kept * self.unit_cost

    def saves(self, kept: int) -> int:
        """Returns the cost saved by keeping this number of units instead of all."""
        return self.cost(self.count) - self.cost(kept)

    def grid(self) -> tuple[int, ...]:
        """Returns the levels for any budget: the numbers nearest to eighths."""
        if len(self.allowed) <= PARTS:
            return self.allowed
        sizes = [self.count * part / PARTS for part in range(1, PARTS + 1)]
        return tuple(sorted({min(self.allowed, key=lambda kept: abs(kept - size)) for size in sizes}, reverse=True))


PrunableModules = Sequence[PrunableModule]


def find_modules(search: RatioSearch, target: str, uniform: bool = False) -> list[PrunableModule]:
    """Finds the modules that may keep fewer units, with the cost of each unit.

    Excluded are protected blocks, modules whose units are consumed by anything but linear layers of their own, and kinds of units
    without which the model's class does not run.

    Args:
        search: The model, its units, and their costs.
        target: Name of the budget.
        uniform: If True, all attention modules keep the same number of KV heads. With `round_to="auto"`, only numbers that
            engines can divide among devices are allowed, and channels make up the difference.

    Raises:
        ValueError: If no module may keep fewer units.
    """
    model, free, modules, consumed = search.model, search.removable(), [], set[str]()
    for names in coupled_modules(free):
        layers = [free[name] for name in names]
        consumers = [consumer for layer in layers for consumer in layer.own_readers]
        if not all(layer.readers for layer in layers) or not all(is_linear(model.get_submodule(name)) for name in consumers):
            continue
        cost = _unit_cost(search, names, target)
        units, amount = layers[0], search.amount
        count, step = units.count("kv_head"), search.step(names[0]) if units.kind == "channel" else 1
        divided = uniform and amount.round_to == "auto" and units.kind == "head"
        smaller = (n for n in range(count - 1, amount.min_units - 1, -1) if n % step == 0)
        allowed = (count, *(n for n in smaller if not divided or divides_among_devices(n)))
        module = PrunableModule(tuple(names), units.kind, count, allowed, cost)
        module = replace(module, levels=module.grid())
        if len(module.allowed) > 1 and cost > 0 and consumed.isdisjoint(consumers_of(module, free)):
            modules.append(module)
            consumed.update(consumers_of(module, free))
    refusals = {}  # by kind, if the model does not run at the lowest numbers of units
    for of_kind in group_by(modules, lambda module: module.kind):
        removed = UnitNumbers()
        for module in of_kind:
            removed |= any_removed(module, search.units, module.allowed[-1])
        try:
            try_removal(model, find_cut(model, search.structure, search.units, removed))
        except ValueError as error:
            refusals[of_kind[0].kind] = str(error)
    able = [module for module in modules if module.kind not in refusals]
    if able:
        return able
    if modules:
        raise ValueError(f"{target}: {refusals[modules[0].kind]}")
    raise ValueError(
        f"{target} cannot be met: {type(model).__name__} has no channels or KV heads that only linear layers consume, and "
        "that are not protected. Protect fewer blocks, or use another method."
    )


def consumers_of(module: PrunableModule, units: UnitsByModule) -> list[str]:
    """Returns the names of a module's consumer layers."""
    return list(dict.fromkeys(consumer for name in module.names for consumer in units[name].readers))


def units_by_name(modules: Iterable[PrunableModule], units: UnitsByModule) -> dict[str, Units]:
    """Returns the units of some modules by name."""
    return {name: units[name] for module in modules for name in module.names}


def _unit_cost(search: RatioSearch, names: Sequence[str], target: str) -> int:
    """Returns the cost of a unit of coupled modules; 0 if it is not prunable."""
    step = kernel_multiple(search.model, search.units[names[0]])
    try:
        cut = find_cut(search.model, search.structure, search.units, dict.fromkeys(names, range(step)), "kv_head")
    except ValueError:  # as under a norm that spans all heads
        return 0
    parameters, total = dict(search.model.named_parameters()), 0
    for name in {name for name, _ in cut.cuts if name in parameters}:
        parameter = parameters[name]
        left = math.prod(size_after(cut.cuts, name, parameter.shape))
        total += (parameter.numel() - left) * (parameter.element_size() if target == "bytes" else 1)
    return total // step


def removed_units(module: PrunableModule, units: UnitsByModule, scores: Mapping[str, Tensor], kept: int) -> UnitNumbers:
    """Returns the units (or query heads) with the lowest scores, to keep this number of units."""
    if kept == module.count:
        return {}
    mean = torch.stack([scores[name].double() for name in module.names]).mean(0)
    lowest = sorted(rank_units(units[module.name], mean)[: module.count - kept])
    return {name: units[name].query_heads(lowest) if module.kind == "head" else lowest for name in module.names}


def any_removed(module: PrunableModule, units: UnitsByModule, kept: int) -> UnitNumbers:
    """Returns the units to remove without regard to scores."""
    return removed_units(module, units, {name: torch.zeros(module.count) for name in module.names}, kept)


def unit_counts(modules: PrunableModules, kept: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Returns by module name the number of units before and after."""
    return {name: (module.count, kept[module.name]) for module in modules for name in module.names}


def uniform_groups(modules: PrunableModules, uniform: bool) -> list[list[PrunableModule]]:
    """Groups the modules that share a level: each module alone, or all of a kind and size."""
    return (
        group_by(modules, lambda module: (module.kind, module.count, module.allowed))
        if uniform
        else [[module] for module in modules]
    )


def group_by(modules: PrunableModules, key: Callable[[PrunableModule], object]) -> list[list[PrunableModule]]:
    """Groups modules by a key."""
    groups: dict[object, list[PrunableModule]] = {}
    for module in modules:
        groups.setdefault(key(module), []).append(module)
    return list(groups.values())
