"""Finds what may stand in another order before N:M pruning: units whose order nothing fixes, and that linears read in groups."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.model.handed import Indices
from billhook.model.linears import is_convolution, weight_of
from billhook.tracing.axes import Axis, layout, multiplied_with
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Group, Member
from billhook.units.units import along, match


@dataclass(frozen=True, eq=False)
class Free:
    """Units that may stand in any order.

    Attributes:
        group: The units, and every parameter that has them.
        beside: What they stand next to everywhere, as value dimensions next to KV heads: each of these may have its own order.
        sets: The sets of units that have an order of their own, as numbers along `beside`: int64, `[sets, leaves]`.
        readers: Of each linear that reads the units, their positions among its inputs: int64, `[sets, units, times]`.
    """

    group: Group
    beside: tuple[Axis, ...]
    sets: Indices
    readers: dict[str, Indices]

    def positions(self, axis: Axis) -> Indices:
        """Returns the positions of the units along an axis: int64, `[sets, units, times]`."""
        found = _positions(axis, self.group.leaf, self.beside, self.sets)
        assert found is not None, "the sets are those of every member"
        return found


def find_free(
    model: PreTrainedModel, structure: Structure, linears: Mapping[str, nn.Module], m: int
) -> tuple[list[Free], dict[str, str]]:
    """Finds the units that linears read in whole groups of m, and that may stand in any order.

    Units that each fill groups of their own, as heads do, are left out: their order changes no group.

    Returns:
        Those that may, and why others may not, by their kind and place.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {name: names.get(id(one.get_parameter("weight")), "") for name, one in linears.items() if not _is_grouped(one)}
    inputs = {(weight, 0 if isinstance(linears[name], Conv1D) else 1): name for name, weight in weights.items()}
    stored, free, why = model.state_dict(keep_vars=True).keys(), list[Free](), dict[str, str]()
    for group in structure.groups:
        reading = {inputs[one.name, one.dim]: one for one in group.members if (one.name, one.dim) in inputs}
        if not reading or _alone(group, reading.values(), m):
            continue
        found = _free(group, reading, {name: weight_of(linears[name]).shape[1] for name in reading})
        lost = next((one.name for one in group.members if one.buffer and one.name not in stored), "")
        reason = group.reason or (f"{lost}, which no checkpoint holds, has them" if lost else "")
        if not reason and any(_straddles(own, m) for own in found.readers.values()):
            reason = f"groups of {m} hold others beside them"
        if reason:
            why[f"{group.kind} in {group.where or 'the model'}"] = reason
        else:
            free.append(found)
    return free, why


def _is_grouped(linear: nn.Module) -> bool:
    """Tells whether outputs of a convolution read channels of their own."""
    return is_convolution(linear) and linear.groups > 1


def _free(group: Group, reading: Mapping[str, Member], inputs: Mapping[str, int]) -> Free:
    """Finds the sets of units that may have an order of their own: all together, if not every member has the same sets."""
    near = set.intersection(*[multiplied_with(one.axis, group.leaf) for one in group.members])
    for beside in (tuple(sorted(near, key=lambda leaf: leaf.number)), ()):
        axis = group.members[0].axis
        sets = np.unique(along(axis, beside)[layout(axis, group.leaf) >= 0], axis=0)
        if all(_positions(one.axis, group.leaf, beside, sets) is not None for one in group.members):
            break
    free = Free(group, beside, sets, {})
    for name, one in reading.items():
        taps = np.arange(0, inputs[name], one.axis.size)  # a convolution reads all channels at each
        free.readers[name] = (free.positions(one.axis)[..., None] + taps).reshape(len(sets), group.size, -1)
    return free


def _positions(axis: Axis, leaf: Axis, beside: Sequence[Axis], sets: Indices) -> Indices | None:
    """Returns the positions of each set's units along an axis, `[sets, units, times]`; None if it has others, or not as many."""
    index = layout(axis, leaf)
    there = np.flatnonzero(index >= 0)
    own = match(along(axis, beside)[there], sets)
    key = own * leaf.size + index[there]
    counts = np.bincount(key[own >= 0], minlength=len(sets) * leaf.size)
    if (own < 0).any() or len(set(counts.tolist())) > 1:
        return None
    return there[np.argsort(key, kind="stable")].reshape(len(sets), leaf.size, -1)


def _alone(group: Group, reading: Iterable[Member], m: int) -> bool:
    """Tells whether each group of m inputs that has one of the units has no other of them."""
    blocks = [group.index(one).reshape(-1, m) for one in reading]
    return all((block == block[:, :1]).all() for block in blocks)


def _straddles(positions: Indices, m: int) -> bool:
    """Tells whether some group of m inputs does not hold m units that follow one another."""
    _, units, times = positions.shape
    if units % m:
        return True
    groups = positions.reshape(-1, m, times)
    return bool((groups != groups[:, :1] + np.arange(m)[:, None]).any() or (groups[:, 0] % m).any())
