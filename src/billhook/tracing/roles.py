"""Who is query, key, value and output, who gate, up and down: from the order of products, not from names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from billhook.display import Printable
from billhook.model.repeat_kv import Indices
from billhook.tracing.axes import Axis, find, leaves
from billhook.tracing.groups import Group, Kind
from billhook.tracing.tape import ActivationProduct, Rows, Sources, Tape

NEAR = 6  # products after that of query and key among which the one with the values is looked for


@dataclass(frozen=True, eq=False)
class Part:
    """Some positions along one dimension of a parameter; all of them, or a piece of a fused matrix.

    Attributes:
        name: The parameter.
        dim: The dimension.
        positions: Which positions, ascending: int64.
        size: How many positions the dimension has.
    """

    name: str
    dim: int
    positions: Indices
    size: int

    def __repr__(self) -> str:
        return self.name if len(self.positions) == self.size else f"{self.name}[{_ranges(self.positions)} of {self.size}]"


@dataclass(frozen=True, eq=False, repr=False)
class Attention(Printable):
    """One attention: which rows make queries, keys and values, and who reads the outcome.

    Attributes:
        q: What makes queries; several with LoRA, or where parts of the head come from different matrices.
        k: What makes keys.
        v: What makes values.
        o: What reads the heads.
        heads: The leaves of the axis that counts heads: KV heads and query heads in a group, or heads.
        query_key: The leaves of the axis over which queries and keys are contracted.
        value: The leaves of the axis that a value vector has.
    """

    q: tuple[Part, ...]
    k: tuple[Part, ...]
    v: tuple[Part, ...]
    o: tuple[Part, ...]
    heads: tuple[Axis, ...]
    query_key: tuple[Axis, ...]
    value: tuple[Axis, ...]

    @property
    def roles(self) -> dict[str, tuple[Part, ...]]:
        """The parts by role."""
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}

    def _renderables(self) -> list[str]:
        return _lines(self.roles)


@dataclass(frozen=True, eq=False, repr=False)
class FeedForward(Printable):
    """One feed-forward block: who makes the channels, who gates them, who reads them.

    Attributes:
        gate: What makes the factor that goes through the non-linearity, where there are two; else empty.
        up: What makes the other, or the only one.
        down: What reads the channels.
        channel: The leaf of the axis of channels.
    """

    gate: tuple[Part, ...]
    up: tuple[Part, ...]
    down: tuple[Part, ...]
    channel: Axis

    @property
    def roles(self) -> dict[str, tuple[Part, ...]]:
        """The parts by role."""
        return {"gate": self.gate, "up": self.up, "down": self.down}

    def _renderables(self) -> list[str]:
        return _lines(self.roles)


def _lines(roles: dict[str, tuple[Part, ...]]) -> list[str]:
    return [f"{role}: {', '.join(map(repr, parts))}" for role, parts in roles.items() if parts]


def find_attention(tape: Tape, groups: Sequence[Group]) -> list[Attention]:
    """Finds the attentions of a run: a product of two activations, whose outcome is multiplied with a third."""
    layers: dict[tuple[object, ...], Attention] = {}
    products = [meeting for meeting in tape.meetings if meeting.over is not None]
    by_leaf = {group.leaf: group for group in groups}
    for i, scores in enumerate(products):
        outcome = next((m for m in products[i + 1 : i + 1 + NEAR] if _continues(scores, m)), None)
        if outcome is None or not scores.left or not scores.right:
            continue
        first = scores.left.keys() | scores.right.keys() <= outcome.left.keys()
        values, axes = (outcome.right, outcome.right_axes) if first else (outcome.left, outcome.left_axes)
        q, k, v = (_parts(tape, sources) for sources in (scores.left, scores.right, values))
        heads = tuple(dict.fromkeys(leaf for axis in (scores.left_axes[:-2], axes[:-2]) for leaf in _units(axis)))
        value = [leaf for leaf in _units(axes[-2:]) if leaf not in heads]
        o = _readers(by_leaf, value, heads, {part.name for part in (*q, *k, *v)})
        key = tuple((part.name, part.dim, len(part.positions)) for part in (*q, *k, *v))
        if q and k and v and o:
            over = tuple(_units([scores.over])) if scores.over is not None else ()
            layers.setdefault(key, Attention(q, k, v, o, heads, over, tuple(value)))
    return list(layers.values())


def _continues(scores: ActivationProduct, later: ActivationProduct) -> bool:
    """Tells whether a later product multiplies the outcome of an earlier one with something else."""
    both = scores.left.keys() | scores.right.keys()
    return any(both <= outcome.keys() and other for outcome, other in ((later.left, later.right), (later.right, later.left)))


def _units(axes: Iterable[Axis]) -> list[Axis]:
    return [leaf for axis in axes for leaf in leaves(axis) if leaf.size > 1 and "data" not in leaf.notes]


def _readers(by_leaf: dict[Axis, Group], value: Iterable[Axis], heads: Sequence[Axis], made: set[str]) -> tuple[Part, ...]:
    """Returns the parameters that read a value axis, of the heads at hand."""
    members = [member for leaf in value if leaf in by_leaf for member in by_leaf[leaf].members]
    reading = [m for m in members if m.reads and m.name not in made and (not heads or set(heads) & set(leaves(m.axis)))]
    if len({m.name for m in reading}) > 1:  # a value axis that all layers share: the reader next to the value
        near = [m for m in reading if any(m.name.rsplit(".", 2)[0] == name.rsplit(".", 2)[0] for name in made)]
        reading = near or reading
    unique = {(m.name, m.dim): m for m in reading}
    return tuple(Part(m.name, m.dim, np.arange(m.axis.size), m.axis.size) for m in unique.values())


def _parts(tape: Tape, sources: Sources) -> tuple[Part, ...]:
    return tuple(_part(tape, name, dim, rows) for (name, dim), rows in sources.items() if dim >= 0)


def _part(tape: Tape, name: str, dim: int, rows: Rows) -> Part:
    size = tape.parameters[name].shape[dim]
    if rows.positions is None:
        return Part(name, dim, np.arange(size), size)
    seen = np.zeros(size + 1, dtype=bool)  # the last place takes what comes from elsewhere, -1
    for positions in (rows.positions, *rows.more):
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in positions.stride())  # without repetitions
        seen[positions[once].numpy().reshape(-1)] = True
    return Part(name, dim, np.flatnonzero(seen[:-1]), size)


def find_feed_forward(tape: Tape, groups: Iterable[Group]) -> list[FeedForward]:
    """Finds the feed-forward blocks of a run: channels that are made, bent and read."""
    gated: dict[Axis, ActivationProduct] = {}
    for meeting in tape.meetings:
        if meeting.over is None and meeting.left_axes:
            for leaf in (leaf for axis in meeting.left_axes for leaf in leaves(axis)):  # of images channels are not the last
                gated.setdefault(find(leaf), meeting)
    layers = []
    for group in groups:
        down = tuple(Part(m.name, m.dim, np.arange(m.axis.size), m.axis.size) for m in group.members if m.reads)
        if group.kind != "channel" or not down:
            continue
        if (product := gated.get(group.leaf)) is not None:
            swapped = product.bent[1] and not product.bent[0]
            gate, up = (product.right, product.left) if swapped else (product.left, product.right)
            layers.append(FeedForward(_parts(tape, gate), _parts(tape, up), down, group.leaf))
        else:
            made = [(m.name, m.dim) for m in group.members if (m.name, m.dim) in tape.writes and not m.reads]
            parts = tuple(_part(tape, name, dim, Rows(None)) for name, dim in made)
            if parts:
                layers.append(FeedForward((), parts, down, group.leaf))
    return layers


def _ranges(positions: Indices) -> str:
    """Shows ascending numbers as stretches: 0-47, 96-143."""
    every = consecutive_ranges(positions)
    shown = [f"{first}-{last}" if first != last else f"{first}" for first, last in every[:3]]
    return ", ".join(shown) + (f", ... ({len(every)} stretches)" if len(every) > 3 else "")


def consecutive_ranges(positions: Indices) -> list[tuple[int, int]]:
    """Finds stretches without a gap in ascending numbers: the first and the last of each."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return [(int(part[0]), int(part[-1])) for part in np.split(positions, breaks) if len(part)]


@dataclass(eq=False)
class StructureFields:
    """Fields of a `Structure`, where they are documented."""

    model: str
    axes: dict[str, tuple[Axis, ...]]
    groups: tuple[Group, ...]
    attention: tuple[Attention, ...]
    feed_forward: tuple[FeedForward, ...]
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str] = field(default_factory=dict)
    untouched: tuple[str, ...] = ()
    opaque: dict[str, int] = field(default_factory=dict)
    assumed: dict[str, int] = field(default_factory=dict)

    def of_kind(self, *kinds: Kind) -> list[Group]:
        """Returns the groups of some kinds."""
        return [group for group in self.groups if group.kind in kinds]
