"""Which units go, and all that goes with them: a plan, checked before anything changes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from billhook.model.figures import Figures
from billhook.model.find import find_transformer
from billhook.model.handed import Indices
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Member
from billhook.tracing.show import pattern
from billhook.tracing.trace import trace
from billhook.units.channels import find_units
from billhook.units.units import UnitKind, Units, along

Cuts = dict[tuple[str, int], Indices]
"""(tensor, dimension) -> the positions that stay, ascending: int64."""

PLURAL: dict[UnitKind, str] = {
    "head": "heads",
    "channel": "channels",
    "residual": "residual channels",
    "expert": "experts",
}


@dataclass(frozen=True, eq=False)
class Plan:
    """Which units go; `print` shows a table.

    Attributes:
        model: The model's class.
        kinds: What the units of each place are.
        units: The units that go, by place; of an attention, query heads.
        before: By place, how many units there are; of an attention, how many query heads and KV heads.
        after: By place, how many there are then.
        cuts: What stays of each tensor.
        parameters: How many parameters there are, before and then.
        costs: What the model costs, before and then, if that was asked.
    """

    model: str
    kinds: dict[str, UnitKind]
    units: dict[str, list[int]]
    before: dict[str, tuple[int, ...]]
    after: dict[str, tuple[int, ...]]
    cuts: Cuts
    parameters: tuple[int, int]
    costs: tuple[Figures, Figures] | None = None

    @property
    def told(self) -> str:
        """How many units of each kind go, in words."""
        gone = {kind: [len(own) for name, own in self.units.items() if self.kinds[name] == kind] for kind in self.kinds.values()}
        return ", ".join(f"{sum(own):,} {PLURAL[kind]} of {len(own)} places" for kind, own in gone.items() if own)

    def to_json(self) -> dict[str, Any]:
        """As plain data; `plan_from_json` makes a plan of it."""
        return {
            "model": self.model,
            "kinds": dict(self.kinds),
            "units": {name: list(own) for name, own in self.units.items()},
            "before": {name: list(counts) for name, counts in self.before.items()},
        }

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f"{self.model}: {before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer)"]
        for label, field in {"FLOPs a token": "flops", "KV-cache bytes a token": "kv_cache_bytes", "bytes": "bytes"}.items():
            now, then = [getattr(cost, field) for cost in self.costs] if self.costs else (None, None)
            if now and then:
                lines.append(f"  {now:,} -> {then:,} {label} ({1 - then / now:.1%} fewer)")
        rows: dict[tuple[str, str], list[str]] = {}
        for name, kind in self.kinds.items():
            change = _change(kind, self.before[name], self.after[name], self.units.get(name, []))
            shown = name if kind == "head" else pattern(f"{name}.").strip(". ") or "the model"
            rows.setdefault((shown, change), []).append(name)
        width = max(len(name) for name, _ in rows)
        for (name, change), places in rows.items():
            lines.append(f"  {name:<{width}}  {change}" + (f" in each of {len(places)}" if len(places) > 1 else ""))
        return "\n".join(lines)


def plan_units(
    model: nn.Module,
    units: Mapping[str, Iterable[int]],
    kinds: Iterable[UnitKind] = get_args(UnitKind),
    structure: Structure | None = None,
) -> Plan:
    """Finds what goes with some units: rows that make them, columns that read them, biases, norms, adapters, routers.

    A KV head goes with the last of its query heads.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        units: The units that go, by place, as `find_units` names them; of an attention, query heads.
        kinds: The kinds among which places are looked for.
        structure: What `trace` has found of the model; by default it is traced.

    Raises:
        ValueError: If there is no such place or unit, a place would be left without units, KV heads would serve different
            numbers of query heads, layers that share a position bias would lose different heads, or the units may not be
            removed at all; the message says why and what is legal.
    """
    subject = find_transformer(model)
    structure = structure or trace(subject)
    return plan_found(subject, structure, find_units(subject, kinds, structure), units)


def plan_found(
    model: PreTrainedModel, structure: Structure, found: Mapping[str, Units], units: Mapping[str, Iterable[int]]
) -> Plan:
    """What `plan_units` does, of units that have been found.

    Raises:
        ValueError: As `plan_units`.
    """
    _check_plain(model)
    gone = {name: own for name, own in _checked(found, units).items() if own}
    _check_allowed(structure, [found[name] for name in gone])
    after = {name: _left(name, one, gone.get(name, [])) for name, one in found.items()}
    _check_together(found, gone)
    cuts = _cuts(structure, {name: found[name] for name in gone}, gone)
    shapes = dict(structure.shapes)
    then = {name: [len(cuts.get((name, d), range(size))) for d, size in enumerate(shape)] for name, shape in shapes.items()}
    sizes = (sum(int(np.prod(s)) for s in shapes.values()), sum(int(np.prod(s)) for s in then.values()))
    kinds = {name: one.kind for name, one in found.items()}
    return Plan(type(model).__name__, kinds, gone, {name: counts(one) for name, one in found.items()}, after, cuts, sizes)


def plan_from_json(model: nn.Module, plain: Mapping[str, Any]) -> Plan:
    """The plan that `Plan.to_json` said, of a model that is as it was then.

    Args:
        model: The model.
        plain: What `to_json` gave.

    Raises:
        ValueError: If it is no such thing, or was made for a model of another class or shape.
    """
    parts = ("model", "kinds", "units", "before")
    if not isinstance(plain, Mapping) or not all(part in plain for part in parts):
        raise ValueError(f"plan: a mapping with {', '.join(parts)} is needed, as Plan.to_json makes it")
    for part in parts[1:]:
        said, kinds = plain[part], get_args(UnitKind)
        if not isinstance(said, Mapping) or not all(one in kinds if part == "kinds" else _is_list(one) for one in said.values()):
            raise ValueError(f"plan: {part} is {str(said)[:80]!r}, and must be as Plan.to_json makes it")
    subject = find_transformer(model)
    structure = trace(subject)
    found = find_units(subject, dict.fromkeys(plain["kinds"].values()), structure)
    check_made_for(plain["model"], {name: tuple(own) for name, own in plain["before"].items()}, subject, found)
    return plan_found(subject, structure, found, plain["units"])


def _is_list(said: object) -> bool:
    return isinstance(said, list | tuple) and all(type(number) is int for number in said)


def check_made_for(kind: str, before: Mapping[str, tuple[int, ...]], model: nn.Module, found: Mapping[str, Units]) -> None:
    """Refuses a model that a plan was not made for.

    Raises:
        ValueError: If its class, places or numbers of units are others.
    """
    now = {name: counts(one) for name, one in found.items()}
    if kind == type(model).__name__ and before == now:
        return
    name = next((name for name in [*before, *now] if before.get(name) != now.get(name)), None)
    differs = f"{name}: {_told(before.get(name or ''))} then, {_told(now.get(name or ''))} now" if name else "another class"
    raise ValueError(f"plan: it was made for a {kind} with other units than this {type(model).__name__} has ({differs})")


def counts(units: Units) -> tuple[int, ...]:
    """How many units there are; of an attention, query heads and KV heads."""
    return (units.count(), units.count("kv_head")) if units.kind == "head" else (units.count(),)


def coupled(units: Mapping[str, Units]) -> list[list[str]]:
    """Places that must lose the same units, as one position bias serves all these attentions; each name once."""
    sets: list[list[str]] = []
    for name, one in units.items():
        near = next((own for own in sets if set(units[own[0]].leaves) & set(one.leaves)), None)
        if near is None:
            sets.append([name])
        else:
            near.append(name)
    return sets


def _told(numbers: tuple[int, ...] | None) -> str:
    return "none" if numbers is None else " and ".join(map(str, numbers))


def _change(kind: UnitKind, before: tuple[int, ...], after: tuple[int, ...], gone: Sequence[int]) -> str:
    """A line of the table: heads by number, other units by how many."""
    if kind != "head":
        return f"{before[0]:,} -> {after[0]:,} {PLURAL[kind]}" if gone else f"{before[0]:,} {PLURAL[kind]}"
    query, kv = before
    then = "{} query, {} KV".format(*after) if kv != query else f"{after[0]}"
    return f"{query} -> {then} heads; without {', '.join(map(str, gone)) or 'none'}"


def _checked(found: Mapping[str, Units], units: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """Units by place, ascending, each once."""
    checked: dict[str, list[int]] = {}
    for name, given in units.items():
        if name not in found:
            known = list(found)
            raise ValueError(f"units: there is no place {name!r}; there are {', '.join(known[:4])}" + ", ..." * (len(known) > 4))
        own, count = list(given), found[name].count()
        if wrong := [unit for unit in own if type(unit) is not int or not 0 <= unit < count]:
            raise ValueError(f"units: {name} has no unit {wrong[0]!r}; it has 0 to {count - 1}")
        checked[name] = sorted(set(own))
    return checked


def _left(name: str, units: Units, gone: Sequence[int]) -> tuple[int, ...]:
    """How many units a place has left."""
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


def _check_together(units: Mapping[str, Units], gone: Mapping[str, list[int]]) -> None:
    for own in coupled(units):
        if len({tuple(gone.get(name, [])) for name in own}) > 1:
            raise ValueError(
                f"heads: {', '.join(own[:3])}{' and more' if len(own) > 3 else ''} share a position bias that has one column a "
                "head, so the same heads must go in all of them; masks (mask_heads) may differ"
            )


def _check_allowed(structure: Structure, units: Sequence[Units]) -> None:
    by_leaf = {group.leaf: group for group in structure.groups}
    for one in units:
        what = PLURAL[one.kind]
        if not one.leaves:
            raise ValueError(f"{what}: {one.name} has one {one.kind}, which cannot go")
        for leaf in one.leaves:
            reason = by_leaf[leaf].reason if leaf in by_leaf else "no parameter has them"
            if not reason and "normed" in leaf.notes and one.kind != "residual":
                reason = "a norm goes over all of them at once, so that without some it would give something else"
            if reason:
                masked = "; they can be masked (mask_heads)" if one.kind == "head" else ""
                raise ValueError(f"{what}: those of {one.name or 'the model'} cannot be removed: {reason}{masked}")


def _cuts(structure: Structure, units: Mapping[str, Units], gone: Mapping[str, list[int]]) -> Cuts:
    cuts: Cuts = {}
    of: dict[tuple[str, int], Units] = {}
    for name, one in units.items():
        members = {(m.name, m.dim): m for group in structure.groups if group.leaf in one.leaves for m in group.members}
        for place, member in members.items():
            stays = _stays(one, member, gone[name])
            if place not in cuts:
                cuts[place], of[place] = stays, one
            elif set(of[place].leaves) & set(one.leaves):
                if not np.array_equal(cuts[place], stays):
                    raise ValueError(f"heads: {member.name} would lose different heads for {name} than for another layer")
            else:  # one matrix that makes or reads units of two kinds
                cuts[place] = np.intersect1d(cuts[place], stays)
    return cuts


def _stays(units: Units, member: Member, gone: Sequence[int]) -> Indices:
    """The positions that stay: all but those of which every head goes that they serve, as keys serve all heads of a group."""
    if units.kind != "head":
        return np.flatnonzero(~np.isin(units.of_member(member), gone))
    keys, lost = units.keys, np.isin(np.arange(units.count()), gone)
    stays = np.ones(member.axis.size, dtype=bool)
    places, inverse = np.unique(along(member.axis, units.leaves), axis=0, return_inverse=True)
    for number, place in enumerate(places):
        own = (keys[:, place >= 0] == place[place >= 0]).all(1)
        if (place >= 0).any() and own.any() and lost[own].all():
            stays[inverse.reshape(-1) == number] = False
    return np.flatnonzero(stays)


def _check_plain(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() and parameter.dtype is not torch.bool:
            raise ValueError(f"{name} is quantised ({parameter.dtype}): remove units before the model is quantised")
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name} is sharded over devices: remove units before the model is sharded")
