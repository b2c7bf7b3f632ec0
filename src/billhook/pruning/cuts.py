"""Finds what remains of a model without some of its units, and checks it before anything changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from billhook.model.find import check_plain
from billhook.model.handed import Indices
from billhook.pruning.amount import width_step
from billhook.tracing.axes import Axis, leaves
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Member
from billhook.units.find import Chosen, numbered
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
        places: All units of these kinds in that trace, by place.
    """

    model: str
    kinds: dict[str, UnitKind]
    units: dict[str, list[int]]
    before: dict[str, tuple[int, ...]]
    after: dict[str, tuple[int, ...]]
    cuts: Cuts
    parameters: tuple[int, int]
    structure: Structure
    places: dict[str, Units]


def find_cut(model: nn.Module, structure: Structure, units: Mapping[str, Units], chosen: Chosen, per: Per = "head") -> Cut:
    """Finds what is removed with some units, a KV head with the last of its query heads; refuses what may not be removed."""
    check_plain(model, "remove units before the model is")
    gone = {name: own for name, own in numbered(units, chosen, per).items() if own}
    _check_allowed(structure, [units[name] for name in gone])
    after = {name: _left(name, one, gone.get(name, [])) for name, one in units.items()}
    for name in gone:
        _check_width(model, name, units[name], after[name][0])
    _check_together(units, gone)
    cuts = _cuts(structure, {name: units[name] for name in gone}, gone)
    shapes = dict(structure.shapes)
    then = {name: [len(cuts.get((name, d), range(size))) for d, size in enumerate(shape)] for name, shape in shapes.items()}
    sizes = (sum(int(np.prod(s)) for s in shapes.values()), sum(int(np.prod(s)) for s in then.values()))
    before = {name: counts(one) for name, one in units.items()}
    kinds = {name: one.kind for name, one in units.items()}
    return Cut(type(model).__name__, kinds, gone, before, after, cuts, sizes, structure, dict(units))


def coupled(units: Mapping[str, Units]) -> list[list[str]]:
    """Groups places that must lose the same units, as attentions with one position bias; each name comes once."""
    sets: list[list[str]] = []
    for name, one in units.items():
        near = next((own for own in sets if set(units[own[0]].leaves) & set(one.leaves)), None)
        if near is None:
            sets.append([name])
        else:
            near.append(name)
    return sets


def _left(name: str, units: Units, gone: Sequence[int]) -> tuple[int, ...]:
    """Counts the units that remain in a place."""
    rest = np.delete(units.kv_of, list(gone))
    what, name = PLURAL[units.kind], name or "the model"
    if not len(rest):
        raise ValueError(f"{what}: {name} would be left without {what}; at least one of its {units.count()} must stay")
    if len(rest) < (taken := max((int(leaf.notes.get("taken", 0)) for leaf in units.leaves), default=0)):
        raise ValueError(
            f"{what}: {name} would be left with {len(rest)} of {units.count()} {what}, and each token takes {taken}: "
            f"at least {taken} must stay"
        )
    if units.kind != "head":
        return (len(rest),)
    serving = np.unique(rest, return_counts=True)[1]
    if len(set(serving.tolist())) > 1:
        size = units.count() // units.count("kv_head")
        raise ValueError(
            f"heads: the KV heads of {name} would serve {sorted(set(serving.tolist()))} query heads each, and must all serve as "
            f"many: take whole KV heads (per='kv_head'), or the same number, 1 to {size - 1}, from each of its "
            f"{units.count('kv_head')}"
            if size > 1
            else f"heads: {name} has one query head for each KV head"
        )
    return len(rest), len(serving)


def _check_width(model: nn.Module, name: str, units: Units, left: int) -> None:
    """Refuses widths of experts that transformers does not compute."""
    step, what = width_step(model, units), PLURAL[units.kind]
    if left % step:
        raise ValueError(
            f"{what}: {name or 'the model'} would be left with {left} of {units.count()}, and its experts are computed by a "
            f"kernel that takes multiples of {step}: {left // step * step or step} or {-(-left // step) * step} may stay"
        )


def _check_together(units: Mapping[str, Units], gone: Mapping[str, list[int]]) -> None:
    for own in coupled(units):
        if len({tuple(gone.get(name, [])) for name in own}) > 1:
            raise ValueError(
                f"heads: {', '.join(own[:3])}{' and more' if len(own) > 3 else ''} share a position bias that has one column a "
                "head, so all of them must lose the same heads; masks (bh.mask) may differ"
            )


def _check_allowed(structure: Structure, units: Sequence[Units]) -> None:
    by_leaf = {group.leaf: group for group in structure.groups}
    for one in units:
        what = PLURAL[one.kind]
        if not one.leaves:
            raise ValueError(f"{what}: {one.name} has one {one.kind}, which cannot be removed")
        for leaf in one.leaves:
            reason = by_leaf[leaf].reason if leaf in by_leaf else "no parameter has them"
            if not reason and "normed" in leaf.notes and one.kind != "residual":
                reason = "a norm spans all of them, so that without some it would compute something else"
            if reason:
                masked = "; they can be masked (bh.mask)" if one.kind == "head" else ""
                raise ValueError(f"{what}: those of {one.name or 'the model'} cannot be removed: {reason}{masked}")


def _cuts(structure: Structure, units: Mapping[str, Units], gone: Mapping[str, list[int]]) -> Cuts:
    cuts: Cuts = {}
    of: dict[tuple[str, int], set[Axis]] = {}
    for name, one in units.items():
        members = {(m.name, m.dim): m for group in structure.groups if group.leaf in one.leaves for m in group.members}
        for place, member in members.items():
            stays, held = _stays(one, member, gone[name]), set(leaves(member.axis)) & set(one.leaves)
            if place not in cuts:
                cuts[place], of[place] = stays, held
            elif of[place] == held:
                if not np.array_equal(cuts[place], stays):
                    raise ValueError(f"heads: {member.name} would lose different heads for {name} than for another layer")
            else:  # one matrix that makes or reads units of two kinds, or queries of a layer whose keys another one reads, too
                cuts[place] = np.intersect1d(cuts[place], stays)
    return cuts


def _stays(units: Units, member: Member, gone: Sequence[int]) -> Indices:
    """Returns the positions that remain: all except those whose heads are all removed, as keys serve all heads of a group."""
    if units.kind != "head":
        return np.flatnonzero(~np.isin(units.of_member(member), gone))
    (place, holders), lost = units.holders(member), np.isin(np.arange(units.count()), gone)
    goes: Indices = np.any(holders, axis=1) & np.all(~holders | lost, axis=1)
    return np.flatnonzero(~goes[place])
