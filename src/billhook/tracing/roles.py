"""Finds attention and MLP roles from the order of products, not from names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from billhook.display import Printable
from billhook.linalg import Indices
from billhook.tracing.axes import Axis, find, leaves
from billhook.tracing.groups import Group, Member
from billhook.tracing.tape import ActivationProduct, Sources, Tape

NEAR = 6  # products to search after the query-key product for the one with the values


@dataclass(frozen=True, eq=False)
class Part:
    """Positions along a parameter dimension: all, or a piece of a fused matrix.

    Attributes:
        name: Parameter.
        dim: Dimension.
        positions: Positions, ascending: int64.
        size: Size of the dimension.
    """

    name: str
    dim: int
    positions: Indices
    size: int

    def __repr__(self) -> str:
        if len(self.positions) == self.size:
            return self.name
        every = consecutive_ranges(self.positions)
        ranges = [f"{first}-{last}" if first != last else f"{first}" for first, last in every[:3]]
        more = f", ... ({len(every)} stretches)" if len(every) > 3 else ""
        return f"{self.name}[{', '.join(ranges)}{more} of {self.size}]"


Parts = tuple[Part, ...]
Roles = dict[str, Parts]


@dataclass(frozen=True, eq=False, repr=False)
class Attention(Printable):
    """An attention module: its query, key, and value rows, and the consumer columns.

    Attributes:
        q: Producers of queries; several with LoRA, or if parts of a head come from different matrices.
        k: Producers of keys.
        v: Producers of values.
        o: Consumers of the heads.
        heads: Leaves of the head axis: KV heads and query heads per group, or heads.
        query_key: Leaves of the axis over which queries and keys are contracted.
        value: Leaves of the axis of a value vector.
    """

    q: Parts
    k: Parts
    v: Parts
    o: Parts
    heads: tuple[Axis, ...]
    query_key: tuple[Axis, ...]
    value: tuple[Axis, ...]

    @property
    def roles(self) -> Roles:
        """The parts by role."""
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}

    def _renderables(self) -> list[str]:
        return _lines(self.roles)


@dataclass(frozen=True, eq=False, repr=False)
class FeedForward(Printable):
    """An MLP: the producers, gates, and consumers of its channels.

    Attributes:
        gate: Producers of the factor that passes the nonlinearity, if there are two factors; else empty.
        up: Producers of the other factor, or of the only one.
        down: Consumers of the channels.
        channel: Leaf of the channel axis.
    """

    gate: Parts
    up: Parts
    down: Parts
    channel: Axis

    @property
    def roles(self) -> Roles:
        """The parts by role."""
        return {"gate": self.gate, "up": self.up, "down": self.down}

    def _renderables(self) -> list[str]:
        return _lines(self.roles)


def _lines(roles: Roles) -> list[str]:
    return [f"{role}: {', '.join(map(repr, parts))}" for role, parts in roles.items() if parts]


def find_attention(tape: Tape, groups: Sequence[Group]) -> list[Attention]:
    """Finds attention: products of two activations whose result is multiplied with a third."""
    layers: dict[tuple[object, ...], Attention] = {}
    contractions = [product for product in tape.products if product.over is not None]
    by_leaf = {group.leaf: group for group in groups}
    for i, scores in enumerate(contractions):
        values = _find_values(scores, contractions[i + 1 : i + 1 + NEAR])
        if values is None:
            continue
        sources, axes = values
        q, k, v = (_parts(tape, of) for of in (scores.left, scores.right, sources))
        heads = tuple(dict.fromkeys([*_units(scores.left_axes[:-2]), *_units(axes[:-2])]))
        value = tuple(leaf for leaf in _units(axes[-2:]) if leaf not in heads)
        producers = set(map(attrgetter("name"), (*q, *k, *v)))
        readers = {}  # parameters that consume a value axis of these heads
        for leaf in filter(by_leaf.__contains__, value):
            for member in by_leaf[leaf].members:
                has_heads = not heads or not set(heads).isdisjoint(leaves(member.axis))
                if member.reads and member.name not in producers and has_heads:
                    readers[member.name, member.dim] = _whole_dimension(member)
        parents = {name.rsplit(".", 2)[0] for name in producers}
        # if all layers share a value axis, take the consumers next to the values
        neighbors = [part for part in readers.values() if part.name.rsplit(".", 2)[0] in parents]
        o = tuple(neighbors or readers.values())
        over = tuple(_units([scores.over])) if scores.over is not None else ()
        if q and k and v and o:
            rows = tuple((part.name, part.dim, len(part.positions)) for part in (*q, *k, *v))
            layers.setdefault(rows, Attention(q, k, v, o, heads, over, value))
    return list(layers.values())


def _find_values(scores: ActivationProduct, later: Iterable[ActivationProduct]) -> tuple[Sources, list[Axis]] | None:
    if not scores.left or not scores.right:
        return None
    both = scores.left.keys() | scores.right.keys()
    for product in later:
        if both <= product.left.keys() and product.right:
            return product.right, product.right_axes
        if both <= product.right.keys() and product.left:
            return product.left, product.left_axes
    return None


def _units(axes: Iterable[Axis]) -> list[Axis]:
    return [leaf for axis in axes for leaf in leaves(axis) if leaf.size > 1 and "data" not in leaf.notes]


def _whole_dimension(member: Member) -> Part:
    return Part(member.name, member.dim, np.arange(member.axis.size), member.axis.size)


def _parts(tape: Tape, sources: Sources) -> Parts:
    parts = []
    for (name, dim), rows in sources.items():
        if dim < 0:
            continue
        size = tape.parameters[name].shape[dim]
        seen = np.full(size + 1, rows.positions is None)  # the last entry collects positions from elsewhere (-1)
        for positions in () if rows.positions is None else (rows.positions, *rows.more):
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in positions.stride())  # without repetitions
            seen[positions[once].numpy().reshape(-1)] = True
        parts.append(Part(name, dim, np.flatnonzero(seen[:-1]), size))
    return tuple(parts)


def find_feed_forward(tape: Tape, groups: Iterable[Group]) -> list[FeedForward]:
    """Finds MLPs: channels that are produced, passed through a nonlinearity, and consumed."""
    gated: dict[Axis, ActivationProduct] = {}
    for product in tape.products:
        for axis in product.left_axes if product.over is None else ():  # all axes: image channels are not last
            for leaf in leaves(axis):
                gated.setdefault(find(leaf), product)
    layers = []
    for group in groups:
        down = tuple(_whole_dimension(member) for member in group.members if member.reads)
        if group.kind != "channel" or not down:
            continue
        if group.leaf in gated:
            gating = gated[group.leaf]
            swapped = gating.bent[1] and not gating.bent[0]
            gate, up = (gating.right, gating.left) if swapped else (gating.left, gating.right)
            layers.append(FeedForward(_parts(tape, gate), _parts(tape, up), down, group.leaf))
        else:
            producers = [m for m in group.members if (m.name, m.dim) in tape.writes and not m.reads]
            if producers:
                layers.append(FeedForward((), tuple(map(_whole_dimension, producers)), down, group.leaf))
    return layers


def consecutive_ranges(positions: Indices) -> list[tuple[int, int]]:
    """Returns the ranges without gaps in ascending numbers: first and last number."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return [(int(part[0]), int(part[-1])) for part in np.split(positions, breaks) if len(part)]
