"""Which heads go, and all that goes with them: a plan, checked before anything changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from billhook.structure.axes import Axis, Indices
from billhook.structure.coupling import Structure
from billhook.structure.groups import Group, Member
from billhook.structure.heads import Chosen, check_layers, find_heads
from billhook.structure.shape import find_transformer
from billhook.structure.trace import trace
from billhook.structure.units import Per, Units, along

Cuts = dict[tuple[str, int], Indices]
"""(tensor, dimension) -> the positions that stay, ascending: int64."""


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """Which heads go; `print` shows a table.

    Attributes:
        model: The model's class.
        heads: The query heads that go, by attention.
        before: By attention, how many query heads and KV heads there are.
        after: By attention, how many there are then.
        cuts: What stays of each tensor.
        parameters: How many parameters there are, before and then.
    """

    model: str
    heads: dict[str, list[int]]
    before: dict[str, tuple[int, int]]
    after: dict[str, tuple[int, int]]
    cuts: Cuts
    parameters: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """As plain data; `plan_heads` makes a plan of its `"heads"`."""
        return {"model": self.model, "heads": {name: list(own) for name, own in self.heads.items()}}

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f"{self.model}: {before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer)"]
        width = max(map(len, self.before))
        for name, (query, kv) in self.before.items():
            then = "{} query, {} KV".format(*self.after[name]) if kv != query else f"{self.after[name][0]}"
            gone = ", ".join(map(str, self.heads.get(name, []))) or "none"
            lines.append(f"  {name:<{width}}  {query} -> {then} heads; without {gone}")
        return "\n".join(lines)


def plan_heads(model: nn.Module, heads: Chosen, per: Per = "head", structure: Structure | None = None) -> HeadPlan:
    """Finds what goes with some heads: their queries, keys, values, outputs, biases, position biases and adapters.

    A KV head goes with the last of its query heads.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        heads: The heads that go, by layer: its number (in the order in which the attentions run) or the attention's name.
        per: Whether heads are query heads, or KV heads with the query heads that they serve.
        structure: What `trace` has found of the model; by default it is traced.

    Raises:
        ValueError: If there is no such layer or head, a layer would be left without heads, KV heads would serve different
            numbers of query heads, layers that share a position bias would lose different heads, or the heads may not be
            removed at all; the message says why and what is legal.
    """
    subject = find_transformer(model)
    _check_plain(subject)
    structure = structure or trace(subject)
    found = find_heads(subject, structure)
    chosen = check_layers(found, heads, per)
    if per == "kv_head":
        chosen = {name: np.flatnonzero(np.isin(found[name].kv_of, own)).tolist() for name, own in chosen.items()}
    gone = {name: own for name, own in chosen.items() if own}
    _check_allowed(structure, [found[name] for name in gone])
    after = {name: _left(name, one, gone.get(name, [])) for name, one in found.items()}
    _check_together(found, gone)
    cuts = _cuts(structure.groups, {name: found[name] for name in gone}, gone)
    shapes = dict(structure.shapes)
    then = {name: [len(cuts.get((name, d), range(size))) for d, size in enumerate(shape)] for name, shape in shapes.items()}
    sizes = (sum(int(np.prod(s)) for s in shapes.values()), sum(int(np.prod(s)) for s in then.values()))
    before = {name: (one.count(), one.count("kv_head")) for name, one in found.items()}
    return HeadPlan(type(subject).__name__, gone, before, after, cuts, sizes)


def coupled(heads: Mapping[str, Units]) -> list[list[str]]:
    """Attentions that must lose the same heads, as one position bias serves them all; each name once."""
    sets: list[list[str]] = []
    for name, one in heads.items():
        near = next((own for own in sets if set(heads[own[0]].leaves) & set(one.leaves)), None)
        if near is None:
            sets.append([name])
        else:
            near.append(name)
    return sets


def _left(name: str, heads: Units, gone: Sequence[int]) -> tuple[int, int]:
    """How many query heads and KV heads an attention has left."""
    rest = np.delete(heads.kv_of, list(gone))
    if not len(rest):
        raise ValueError(f"heads: {name} would be left without heads; at least one of its {heads.count()} must stay")
    serving = np.unique(rest, return_counts=True)[1]
    if len(set(serving.tolist())) > 1:
        size = heads.count() // heads.count("kv_head")
        raise ValueError(
            f"heads: the KV heads of {name} would serve {sorted(set(serving.tolist()))} query heads each, and must all serve as "
            f"many: take whole KV heads (per='kv_head'), or the same number, 1 to {size - 1}, from each of its "
            f"{heads.count('kv_head')}"
            if size > 1
            else f"heads: {name} has one query head for each KV head"
        )
    return len(rest), len(serving)


def _check_together(heads: Mapping[str, Units], gone: Mapping[str, list[int]]) -> None:
    for own in coupled(heads):
        if len({tuple(gone.get(name, [])) for name in own}) > 1:
            raise ValueError(
                f"heads: {', '.join(own[:3])}{' and more' if len(own) > 3 else ''} share a position bias that has one column a "
                "head, so the same heads must go in all of them; masks (mask_heads) may differ"
            )


def _check_allowed(structure: Structure, heads: Sequence[Units]) -> None:
    by_leaf = {group.leaf: group for group in structure.groups}
    for one in heads:
        if not one.leaves:
            raise ValueError(f"heads: {one.name} has one head, which cannot go")
        for leaf in one.leaves:
            reason = by_leaf[leaf].reason if leaf in by_leaf else "no parameter has them"
            if not reason and "normed" in leaf.notes:
                reason = "a norm goes over all of them at once, so that without some it would give something else"
            if reason:
                raise ValueError(f"heads: those of {one.name} cannot be removed: {reason}; they can be masked (mask_heads)")


def _cuts(groups: Sequence[Group], heads: Mapping[str, Units], gone: Mapping[str, list[int]]) -> Cuts:
    cuts: Cuts = {}
    for name, one in heads.items():
        keys = one.keys
        lost = {tuple(keys[head]) for head in gone[name]}
        members = {(m.name, m.dim): m for group in groups if group.leaf in one.leaves for m in group.members}
        for place, member in members.items():
            stays = _stays(member, one.leaves, keys, lost)
            if place in cuts and not np.array_equal(cuts[place], stays):
                raise ValueError(f"heads: {member.name} would lose different heads for {name} than for another layer")
            cuts[place] = stays
    return cuts


def _stays(member: Member, query: Sequence[Axis], keys: Indices, lost: set[tuple[int, ...]]) -> Indices:
    """The positions that stay: all but those of which every head goes that they serve, as keys serve all heads of a group."""
    stays = np.ones(member.axis.size, dtype=bool)
    goes = np.array([tuple(key) in lost for key in keys])
    places, inverse = np.unique(along(member.axis, query), axis=0, return_inverse=True)
    for number, place in enumerate(places):
        own = (keys[:, place >= 0] == place[place >= 0]).all(1)
        if (place >= 0).any() and own.any() and goes[own].all():
            stays[inverse.reshape(-1) == number] = False
    return np.flatnonzero(stays)


def _check_plain(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() and parameter.dtype is not torch.bool:
            raise ValueError(f"{name} is quantised ({parameter.dtype}): remove heads before the model is quantised")
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name} is sharded over devices: remove heads before the model is sharded")
