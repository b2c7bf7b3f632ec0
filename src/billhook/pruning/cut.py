"""Finds which tensor positions remain without some units, and validates the removal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from billhook.linalg import Indices, IndicesByModule
from billhook.model import check_plain
from billhook.pruning.amount import kernel_multiple
from billhook.tracing.axes import leaves
from billhook.tracing.coupling import NEVER, Structure
from billhook.units import PLURAL, Chosen, Per, UnitKind, UnitNumbers, Units, UnitsByModule, counts, unit_ids

Cuts = dict[tuple[str, int], Indices]
"""(tensor, dimension) -> the positions to keep, ascending: int64, `[positions]`, or `[experts, positions]` by the first
dimension of the tensor."""


@dataclass(frozen=True, eq=False, repr=False)
class Cut:
    """The units to remove from a model, by module, and the tensor positions that remain.

    Attributes:
        units: Units to remove, for attention query heads. Modules that keep all units are left out.
        before: Number of units; for attention, of query heads and KV heads.
        after: Number of units that remain.
        cuts: Positions to keep in each tensor.
        parameters: Number of parameters before and after.
        structure: Trace in which the units were found.
        all_units: All units of these kinds in that trace, by module.
        by_expert: Channels to remove from each expert, int64, `[experts, channels]`, by module, if they differ. In `units` are
            then their ranks.
    """

    model: str
    kinds: dict[str, UnitKind]
    units: UnitNumbers
    before: dict[str, tuple[int, ...]]
    after: dict[str, tuple[int, ...]]
    cuts: Cuts
    parameters: tuple[int, int]
    structure: Structure
    all_units: dict[str, Units]
    by_expert: dict[str, Indices] = field(default_factory=dict)

    @property
    def tokens(self) -> tuple[Indices, int] | None:
        """The remaining token ids, ascending, and the number before; None if no token goes."""
        for name in self.units:
            if self.kinds[name] == "token":
                (size,) = self.before[name]
                return np.delete(np.arange(size), self.units[name]), size
        return None


def size_after(cuts: Cuts, name: str, size: Sequence[int]) -> tuple[int, ...]:
    """Returns the size of a tensor after its cuts."""
    return tuple(cuts[name, dim].shape[-1] if (name, dim) in cuts else length for dim, length in enumerate(size))


def of_ranks(orders: IndicesByModule, removed: UnitNumbers) -> dict[str, Indices]:
    """Returns the channels of each expert at the removed ranks, as `Cut.by_expert`."""
    return {name: np.sort(order[:, list(removed[name])]) for name, order in orders.items() if removed.get(name)}


def find_cut(
    model: nn.Module,
    structure: Structure,
    units: UnitsByModule,
    chosen: Chosen,
    per: Per = "head",
    by_expert: IndicesByModule | None = None,
) -> Cut:
    """Finds the tensor cuts for removing units; a KV head goes with its last query head.

    `by_expert` is that of `Cut`, for modules with ranks instead of units.
    """
    check_plain(model, "From FP8 and MXFP4 files, bh.stream removes experts. Remove other units before the model is")
    removed = {name: numbers for name, numbers in unit_ids(units, chosen, per).items() if numbers}
    _check_allowed(structure, [units[name] for name in removed])
    kinds = {}
    before = {}
    after = {}
    for name, layer in units.items():
        kinds[name], before[name] = layer.kind, counts(layer)
        after[name] = _count_left(name, layer, removed.get(name, []))
    for name in removed:
        step, left = kernel_multiple(model, units[name]), after[name][0]
        if left % step:
            raise ValueError(
                f"{PLURAL[units[name].kind]}: {name or 'the model'} would be left with {left} of {units[name].count()}, but the "
                f"kernel of its experts requires multiples of {step}. Keep {left // step * step or step} or "
                f"{-(-left // step) * step}."
            )
    for names in coupled_modules(units):
        if len({tuple(removed.get(name, [])) for name in names}) > 1:
            raise ValueError(
                f"heads: {', '.join(names[:3])}{' and more' if len(names) > 3 else ''} share a position bias with one column per "
                "head. Remove the same heads from all of them, or use bh.mask."
            )
    by_expert = dict(by_expert or {})
    cuts = _cuts(structure, units, removed, by_expert)
    num_before = num_after = 0
    for name, shape in structure.shapes.items():
        num_before += math.prod(shape)
        num_after += math.prod(size_after(cuts, name, shape))
    sizes = num_before, num_after
    return Cut(type(model).__name__, kinds, removed, before, after, cuts, sizes, structure, dict(units), by_expert)


def coupled_modules(units: UnitsByModule) -> list[list[str]]:
    """Groups modules that must lose the same units, such as a shared position bias."""
    sets: list[list[str]] = []
    for name, layer in units.items():
        coupled_names = next((names for names in sets if set(units[names[0]].leaves) & set(layer.leaves)), None)
        if coupled_names is None:
            sets.append([name])
        else:
            coupled_names.append(name)
    return sets


def _check_allowed(structure: Structure, units: Sequence[Units]) -> None:
    by_leaf = {group.leaf: group for group in structure.groups}
    for layer in units:
        what = PLURAL[layer.kind]
        if not layer.leaves:
            raise ValueError(f"{what}: {layer.name} has only one {layer.kind}, which cannot be removed")
        for leaf in layer.leaves:
            reason = by_leaf[leaf].reason if leaf in by_leaf else "no parameter has them"
            if layer.kind == "token" and reason == NEVER["vocab"]:
                continue  # the tokenizer follows
            if not reason and "normed" in leaf.notes and layer.kind != "residual":
                reason = "a norm spans all of them, so its output would change"
            if reason:
                masked = ". Use bh.mask to mask them instead" if layer.kind == "head" else ""
                raise ValueError(f"{what}: cannot be removed from {layer.name or 'the model'}: {reason}{masked}")


def _count_left(name: str, units: Units, removed: Sequence[int]) -> tuple[int, ...]:
    """Counts the units that remain in a module, and raises if too few remain."""
    kv_of_kept, size = np.delete(units.kv_of, list(removed)), units.count()
    what, name = PLURAL[units.kind], name or "the model"
    if not len(kv_of_kept):
        raise ValueError(f"{what}: {name} would be left without {what}; at least one of its {size} must stay")
    if len(kv_of_kept) < (experts_per_token := max((int(leaf.notes.get("taken", 0)) for leaf in units.leaves), default=0)):
        raise ValueError(
            f"{what}: {name} would be left with {len(kv_of_kept)} of {size} {what}, but each token uses {experts_per_token}. "
            f"Keep at least {experts_per_token}."
        )
    if units.kind != "head":
        return (len(kv_of_kept),)
    heads_per_kv = np.unique(kv_of_kept, return_counts=True)[1]
    distinct = sorted(set(heads_per_kv.tolist()))
    if len(distinct) > 1:
        kv_heads = units.count("kv_head")
        raise ValueError(
            f"heads: the KV heads of {name} would have {distinct} query heads each, but need the same number. Remove whole KV "
            f"heads (per='kv_head'), or the same number, 1 to {size // kv_heads - 1}, from each of its {kv_heads}."
        )
    return len(kv_of_kept), len(heads_per_kv)


def _cuts(structure: Structure, units: UnitsByModule, removed: UnitNumbers, by_expert: IndicesByModule) -> Cuts:
    cuts = {}
    leaves_of = {}
    for name, numbers in removed.items():
        layer = units[name]
        members = {(m.name, m.dim): m for group in structure.groups if group.leaf in layer.leaves for m in group.members}
        for key, member in members.items():
            if layer.kind == "head":  # keys serve all query heads of a group, so they stay until the last of these goes
                (place_of, holders), is_removed = layer.units_at(member), np.isin(np.arange(layer.count()), numbers)
                goes = np.any(holders, axis=1) & np.all(~holders | is_removed, axis=1)
                kept_positions = np.flatnonzero(~goes[place_of])
            elif name in by_expert:
                kept_positions = np.stack([np.flatnonzero(~np.isin(layer.of_member(member), lost)) for lost in by_expert[name]])
            else:
                kept_positions = np.flatnonzero(~np.isin(layer.of_member(member), numbers))
            unit_leaves = set(leaves(member.axis)) & set(layer.leaves)
            if key not in cuts:
                cuts[key], leaves_of[key] = kept_positions, unit_leaves
            elif leaves_of[key] != unit_leaves:
                # one matrix holds units of two kinds, or the queries of a layer whose keys another layer uses, too
                cuts[key] = np.intersect1d(cuts[key], kept_positions)
            elif not np.array_equal(cuts[key], kept_positions):
                raise ValueError(f"heads: {member.name} would lose different heads for {name} than for another layer")
    return cuts
