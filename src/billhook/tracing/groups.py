"""Groups: units that exist once but in several parameters, so that removing one must remove it everywhere."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from billhook.model.repeat_kv import Indices
from billhook.tracing.axes import Axis, find, layout, leaves
from billhook.tracing.tape import Tape

Kind = Literal[
    "kv_head",  # a key/value head with the query heads that it serves
    "query_head",  # a query head of every group, or of the only one
    "head",  # a head with query, key and value of its own, or a head without attention
    "channel",  # something bends it between who makes it and who reads it: feed-forward, convolution
    "residual",  # a channel of the stream that blocks add to
    "expert",  # with its row of the router
    "rank",  # the inner width of a low-rank product: LoRA, MLA
    "query_key",  # a dimension over which queries and keys are contracted
    "value",  # a dimension of a value vector
    "rotary",  # a query/key dimension with a rotary frequency of its own
    "state",  # of a state-space model, or another product of activations
    "vocab",
    "position",
    "label",
    "fixed",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter that a group's axis reaches.

    Attributes:
        name: The parameter or buffer.
        dim: Which dimension of it.
        axis: The whole axis of that dimension; the group's is a part of it.
        reads: Whether the parameter is contracted with the units along it; otherwise it makes or scales them.
        buffer: Whether it is a buffer and no parameter.
    """

    name: str
    dim: int
    axis: Axis
    reads: bool
    buffer: bool = False


@dataclass(eq=False, repr=False)
class Group:
    """Units of one kind, and where they are.

    Attributes:
        number: Its number in the structure.
        kind: What a unit is.
        leaf: The axis of the units.
        members: Where it is.
        reason: Why it may not be pruned; empty if it may.
        context: Numbers of the groups next to which it stands everywhere: other units may be removed for each unit of theirs.
        idle: Members that softmax cancels, as it does the bias of keys without rotary embedding: they are members all the same.
        entries: How many entries of parameters one unit takes with it.
        bytes: How many bytes these are.

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
        """How many units."""
        return self.leaf.size

    @property
    def flags(self) -> dict[str, str]:
        """Notes on the axis (const, normed, opaque, ...), with the reason."""
        return self.leaf.notes

    @property
    def where(self) -> str:
        """The innermost module that holds all members."""
        return common_module([member.name for member in self.members])

    def __repr__(self) -> str:
        return f"Group({self.kind!r}, {self.size:,} in {self.where!r})"

    def index(self, member: Member) -> Indices:
        """Returns for each position of a member's dimension its unit, -1 for none: int64 of shape (size,)."""
        return layout(member.axis, self.leaf)

    def positions(self, member: Member, units: Sequence[int]) -> Indices:
        """Returns the positions of a member's dimension that belong to some units, ascending: int64."""
        return np.flatnonzero(np.isin(self.index(member), units))


def common_module(names: Sequence[str]) -> str:
    """Returns the innermost module that holds all these parameters."""
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def find_groups(axes: Mapping[str, Sequence[Axis]], tape: Tape, parameters: frozenset[str]) -> list[Group]:
    """Makes one group for every leaf of the axes, in the order of the parameters; their kinds are not known yet."""
    members: dict[Axis, list[Member]] = {}
    for name, dims in axes.items():
        for d, axis in enumerate(dims):
            for leaf in dict.fromkeys(leaves(axis)):
                if leaf.size > 1:
                    members.setdefault(leaf, []).append(Member(name, d, axis, (name, d) in tape.reads, name not in parameters))
    return [Group(number, "channel", leaf, tuple(of_leaf)) for number, (leaf, of_leaf) in enumerate(members.items())]


def count_positions(axis: Axis, leaf: Axis) -> int:
    """Counts the positions of an axis at which each index of a leaf stands."""
    axis = find(axis)
    if axis is leaf:
        return 1
    if axis.op == "sum":
        return sum(count_positions(part, leaf) for part in axis.parts)
    return sum(count_positions(part, leaf) * (axis.size // find(part).size) for part in axis.parts)


def measure_units(group: Group, axes: Mapping[str, Sequence[Axis]], sizes: Mapping[str, int]) -> None:
    """Counts the entries and bytes that one unit takes with it; a matrix that has it in both dimensions loses its cross once.

    What has no bytes an entry in `sizes` (buffers) does not count.
    """
    group.entries = group.bytes = 0
    names: Iterable[str] = dict.fromkeys(member.name for member in group.members if member.name in sizes)
    for name in names:
        before = math.prod(axis.size for axis in axes[name])
        lost = before - math.prod(axis.size - count_positions(axis, group.leaf) for axis in axes[name])
        group.entries += lost
        group.bytes += lost * sizes[name]
