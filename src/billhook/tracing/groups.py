"""Coupled groups: units that span several parameters and are removed from all of them."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, get_args

import numpy as np

from billhook.linalg import Indices
from billhook.tracing.axes import Axis, find, layout, leaves
from billhook.tracing.tape import Tape

Kind = Literal[
    "kv_head",  # a KV head with its query heads
    "query_head",  # a query head of every query group
    "head",  # a head with its own query, key, and value, or without attention
    "channel",  # a nonlinearity between producer and consumer: MLP, convolution
    "residual",  # a hidden dimension of the residual stream
    "expert",  # with its router row
    "rank",  # the inner size of a low-rank product: LoRA, MLA
    "query_key",  # a dimension over which queries and keys are contracted
    "value",  # a dimension of a value vector
    "rotary",  # a query/key dimension with its own rotary frequency
    "state",  # of a state-space model, or another product of activations
    "vocab",
    "position",
    "label",
    "fixed",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Member:
    """A parameter dimension that contains a group's units.

    Attributes:
        name: Parameter or buffer.
        dim: Dimension of it.
        axis: Axis of the whole dimension, which contains the group's axis.
        reads: True for consumer columns; False if the parameter produces or scales the units.
        buffer: True for a buffer.
    """

    name: str
    dim: int
    axis: Axis
    reads: bool
    buffer: bool = False


@dataclass(eq=False, repr=False)
class Group:
    """A coupled group: units of a kind and the parameter dimensions that contain them.

    Attributes:
        number: Number of the group in the structure.
        kind: Kind of unit.
        leaf: Axis of the units.
        members: Parameter dimensions that contain the units.
        reason: Why the group is not prunable; empty if it is.
        context: Numbers of groups that surround it everywhere: each of their units may lose different units.
        idle: Members that softmax cancels, such as key biases without rotary embedding. They are pruned all the same.
        entries: Parameter entries that one unit removes.
        bytes: Bytes that one unit removes.

    Example:
        >>> import billhook as bh
        >>> group = bh.trace(bh.load("tiny")).of_kind("channel")[0]
        >>> group.where, group.size, group.entries
        ('model.layers.0.mlp', 384, 768)
    """

    number: int
    kind: Kind
    leaf: Axis
    members: tuple[Member, ...]
    reason: str = ""
    context: tuple[int, ...] = ()
    idle: tuple[str, ...] = ()
    entries: int = 0
    bytes: int = 0

    @property
    def size(self) -> int:
        """The number of units."""
        return self.leaf.size

    @property
    def flags(self) -> dict[str, str]:
        """Flags of the axis (const, normed, opaque, ...) with reasons."""
        return self.leaf.notes

    @property
    def where(self) -> str:
        """The innermost module that contains all members."""
        return common_module([member.name for member in self.members])

    def __repr__(self) -> str:
        return f"Group({self.kind!r}, {self.size:,} in {self.where!r})"

    def index(self, member: Member) -> Indices:
        """Returns the unit at each position of a member's dimension, -1 for none: int64, `[size]`."""
        return layout(member.axis, self.leaf)

    def positions(self, member: Member, units: Sequence[int]) -> Indices:
        """Returns the positions of some units in a member's dimension: int64, ascending."""
        return np.flatnonzero(np.isin(self.index(member), units))


def common_module(names: Sequence[str]) -> str:
    """Returns the innermost module that contains all these parameters."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


Axes = Mapping[str, Sequence[Axis]]
"""Axes of parameters, by name."""


def find_groups(axes: Axes, tape: Tape, parameters: frozenset[str]) -> list[Group]:
    """Returns a group for every leaf of the axes, still without its kind.

    Groups are in the order of the parameters.
    """
    members = defaultdict(list)
    for name, dims in axes.items():
        for d, axis in enumerate(dims):
            for leaf in dict.fromkeys(leaves(axis)):
                if leaf.size > 1:
                    members[leaf].append(Member(name, d, axis, (name, d) in tape.reads, name not in parameters))
    return [Group(number, "channel", leaf, tuple(of_leaf)) for number, (leaf, of_leaf) in enumerate(members.items())]


def count_positions(axis: Axis, leaf: Axis) -> int:
    """Counts the positions of an axis for each index of a leaf."""
    axis = find(axis)
    if axis is leaf:
        return 1
    if axis.op == "sum":
        return sum(count_positions(part, leaf) for part in axis.parts)
    return sum(count_positions(part, leaf) * (axis.size // find(part).size) for part in axis.parts)


def measure_units(group: Group, axes: Axes, sizes: Mapping[str, int]) -> None:
    """Counts the entries and bytes that a unit removes.

    A matrix with the unit in both dimensions loses the crossing once. Names that are not in `sizes` (buffers) do not count.
    """
    group.entries = group.bytes = 0
    for name in dict.fromkeys(map(attrgetter("name"), group.members)):
        if name not in sizes:
            continue
        before = math.prod(axis.size for axis in axes[name])
        removed = before - math.prod(axis.size - count_positions(axis, group.leaf) for axis in axes[name])
        group.entries += removed
        group.bytes += removed * sizes[name]
