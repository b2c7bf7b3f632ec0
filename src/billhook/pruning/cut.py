"""Finds what remains of a model without some of its units, and checks it before anything changes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from billhook.model.find import check_plain
from billhook.model.repeat_kv import Indices
from billhook.pruning.amount import kernel_multiple
from billhook.tracing.axes import Axis, leaves
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Member
from billhook.units.find import Chosen, unit_ids
from billhook.units.units import PLURAL, Per, UnitKind, Units, counts

Cuts = dict[tuple[str, int], Indices]
"""(tensor, dimension) -> the positions that remain, ascending: int64."""


@dataclass(frozen=True, eq=False, repr=False)
class Cut:
    """Which units are removed from a model, by place (of an attention, query heads), and what remains.

    Attributes:
        units: The removed units; places that keep all are left out.
        before: The number of units; of an attention, of query heads and KV heads.
        after: The number of units that remain.
        cuts: The positions that remain of each tensor.
        parameters: The number of parameters, before and after.
        structure: The trace in which it was found.
        all_units: All units of these kinds in that trace, by place.
    """

    model: str
    kinds: dict[str, UnitKind]
    units: dict[str, list[int]]
    before: dict[str, tuple[int, ...]]
    after: dict[str, tuple[int, ...]]
    cuts: Cuts
    parameters: tuple[int, int]
    structure: Structure
    all_units: dict[str, Units]


def size_after(cuts: Cuts, name: str, size: Sequence[int]) -> tuple[int, ...]:
    """Returns what cuts leave of the size of a tensor."""
    return tuple(len(cuts.get((name, dim), range(length))) for dim, length in enumerate(size))


def find_cut(model: nn.Module, structure: Structure, units: Mapping[str, Units], chosen: Chosen, per: Per = "head") -> Cut:
    """Finds what is removed with some units, a KV head with the last of its query heads; refuses what may not be removed."""
    check_plain(model, "remove units before the model is")
    removed = {name: numbers for name, numbers in unit_ids(units, chosen, per).items() if numbers}
    _check_allowed(structure, [units[name] for name in removed])
    kinds: dict[str, UnitKind] = {}
    before: dict[str, tuple[int, ...]] = {}
    after: dict[str, tuple[int, ...]] = {}
    for name, layer in units.items():
        kinds[name], before[name] = layer.kind, counts(layer)
        after[name] = _count_left(name, layer, removed.get(name, []))
    _check_left(model, units, removed, after)
    cuts = _cuts(structure, units, removed)
    num_before = num_after = 0
    for name, shape in structure.shapes.items():
        num_before += math.prod(shape)
        num_after += math.prod(size_after(cuts, name, shape))
    return Cut(type(model).__name__, kinds, removed, before, after, cuts, (num_before, num_after), structure, dict(units))


def coupled_modules(units: Mapping[str, Units]) -> list[list[str]]:
    """Groups places that must lose the same units, as attentions with one position bias; each name comes once."""
    sets: list[list[str]] = []
    for name, layer in units.items():
        near = next((names for names in sets if set(units[names[0]].leaves) & set(layer.leaves)), None)
        if near is None:
            sets.append([name])
        else:
            near.append(name)
    return sets


def _check_allowed(structure: Structure, units: Sequence[Units]) -> None:
    by_leaf = {group.leaf: group for group in structure.groups}
    for layer in units:
        what = PLURAL[layer.kind]
        if not layer.leaves:
            raise ValueError(f"{what}: {layer.name} has one {layer.kind}, which cannot be removed")
        for leaf in layer.leaves:
            reason = by_leaf[leaf].reason if leaf in by_leaf else "no parameter has them"
            if not reason and "normed" in leaf.notes and layer.kind != "residual":
                reason = "a norm spans all of them, so that without some it would compute something else"
            if reason:
                masked = "; they can be masked (bh.mask)" if layer.kind == "head" else ""
                raise ValueError(f"{what}: those of {layer.name or 'the model'} cannot be removed: {reason}{masked}")


def _count_left(name: str, units: Units, removed: Sequence[int]) -> tuple[int, ...]:
    """Counts the units that remain in a place; refuses too few of them."""
    rest, size = np.delete(units.kv_of, list(removed)), units.count()
    what, name = PLURAL[units.kind], name or "the model"
    if not len(rest):
        raise ValueError(f"{what}: {name} would be left without {what}; at least one of its {size} must stay")
    if len(rest) < (taken := max((int(leaf.notes.get("taken", 0)) for leaf in units.leaves), default=0)):
        raise ValueError(
            f"{what}: {name} would be left with {len(rest)} of {size} {what}, and each token takes {taken}: "
            f"at least {taken} must stay"
        )
    if units.kind != "head":
        return (len(rest),)
    serving = np.unique(rest, return_counts=True)[1]
    served = sorted(set(serving.tolist()))
    if len(served) > 1:
        kv_heads = units.count("kv_head")
        raise ValueError(
            f"heads: the KV heads of {name} would serve {served} query heads each, and must all serve as many: take whole KV "
            f"heads (per='kv_head'), or the same number, 1 to {size // kv_heads - 1}, from each of its {kv_heads}"
        )
    return len(rest), len(serving)


def _check_left(
    model: nn.Module, units: Mapping[str, Units], removed: Mapping[str, list[int]], after: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses widths of experts that transformers does not compute, and different heads where one position bias is read."""
    for name in removed:
        step, left = kernel_multiple(model, units[name]), after[name][0]
        if left % step:
            raise ValueError(
                f"{PLURAL[units[name].kind]}: {name or 'the model'} would be left with {left} of {units[name].count()}, and its "
                f"experts are computed by a kernel that takes multiples of {step}: {left // step * step or step} or "
                f"{-(-left // step) * step} may stay"
            )
    for names in coupled_modules(units):
        if len({tuple(removed.get(name, [])) for name in names}) > 1:
            raise ValueError(
                f"heads: {', '.join(names[:3])}{' and more' if len(names) > 3 else ''} share a position bias that has one column "
                "a head, so all of them must lose the same heads; masks (bh.mask) may differ"
            )


def _cuts(structure: Structure, units: Mapping[str, Units], removed: Mapping[str, list[int]]) -> Cuts:
    cuts: Cuts = {}
    leaves_of: dict[tuple[str, int], set[Axis]] = {}
    for name, numbers in removed.items():
        layer = units[name]
        members = {(m.name, m.dim): m for group in structure.groups if group.leaf in layer.leaves for m in group.members}
        for key, member in members.items():
            stays, own_leaves = _stays(layer, member, numbers), set(leaves(member.axis)) & set(layer.leaves)
            if key not in cuts:
                cuts[key], leaves_of[key] = stays, own_leaves
            elif leaves_of[key] != own_leaves:
                # one matrix that makes or reads units of two kinds, or queries of a layer whose keys another one reads, too
                cuts[key] = np.intersect1d(cuts[key], stays)
            elif not np.array_equal(cuts[key], stays):
                raise ValueError(f"heads: {member.name} would lose different heads for {name} than for another layer")
    return cuts


def _stays(units: Units, member: Member, removed: Sequence[int]) -> Indices:
    """Returns the positions that remain: all except those whose heads are all removed, as keys serve all heads of a group."""
    if units.kind != "head":
        return np.flatnonzero(~np.isin(units.of_member(member), removed))
    (place_of, holders), is_removed = units.units_at(member), np.isin(np.arange(units.count()), removed)
    goes: Indices = np.any(holders, axis=1) & np.all(~holders | is_removed, axis=1)
    return np.flatnonzero(~goes[place_of])
