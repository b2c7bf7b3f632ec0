"""The traced structure of a model: coupled groups with kind, context, and reason."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from rich.console import RenderableType
from torch import nn

from billhook.display import Printable, render, some, text_table
from billhook.tracing import show
from billhook.tracing.axes import Axis, crossed, find, layout, leaves, mark, multiplied_with
from billhook.tracing.groups import Axes, Group, Kind, find_groups, measure_units
from billhook.tracing.roles import Attention, FeedForward, find_attention, find_feed_forward
from billhook.tracing.tape import Tape, note

Shapes = dict[str, tuple[int, ...]]


@dataclass(eq=False, repr=False)
class Structure(Printable):
    """Axes, coupled groups, and roles of a model's parameters; `print` shows a table.

    Attributes:
        model: Class name of the model.
        axes: Axis of every dimension of every parameter and buffer that the run used.
        groups: Coupled groups, in the order of the parameters.
        attention: Query, key, value, and output parts of each attention module.
        feed_forward: Gate, up, and down parts of each MLP.
        shapes: Shape of every parameter.
        tied: Tied weights: alias -> name.
        untouched: Parameters that the run never used, which are not prunable.
        opaque: Reasons for untraceable operations (no rule, or an irregular case), with counts.
        assumed: Unknown values that the model's code read, with the assumed value and counts.

    Example:
        >>> import billhook as bh
        >>> bh.trace(bh.load("tiny")).tree("model.layers.0.self_attn.q_proj.weight")
        '[head:8 * (f:16 + f:16), hidden:256]'
    """

    model: str
    axes: dict[str, tuple[Axis, ...]]
    groups: tuple[Group, ...]
    attention: tuple[Attention, ...]
    feed_forward: tuple[FeedForward, ...]
    shapes: Shapes
    tied: dict[str, str]
    untouched: tuple[str, ...]
    opaque: dict[str, int]
    assumed: dict[str, int]

    def of_kind(self, *kinds: Kind) -> list[Group]:
        """Returns the groups of some kinds."""
        return [group for group in self.groups if group.kind in kinds]

    def tree(self, name: str) -> str:
        """Returns the axes of a parameter as text, such as `[kv:3 * group:3 * (f:32 + f:32), hidden:576]`.

        Raises:
            ValueError: If the run used no parameter of that name.
        """
        name = self.tied.get(name, name)
        if name not in self.axes:
            raise ValueError(f"name={name!r} is not a parameter that the run used. See `axes` for the names in {self.model}.")
        return show.tree(self.axes[name], self.groups)

    def to_json(self) -> dict[str, Any]:
        """Returns the structure as lists, dictionaries, numbers, and strings."""
        used = {name: shape for name, shape in self.shapes.items() if name in self.axes}
        return {
            "model": self.model,
            "parameters": {name: {"shape": list(shape), "axes": self.tree(name)} for name, shape in used.items()},
            "groups": list(map(show.group_to_json, self.groups)),
            "attention": [show.roles_to_json(layer.roles) for layer in self.attention],
            "feed_forward": [show.roles_to_json(layer.roles) for layer in self.feed_forward],
            "tied": self.tied,
            "untouched": list(self.untouched),
            "opaque": self.opaque,
            "assumed": self.assumed,
        }

    def _renderables(self) -> list[RenderableType]:
        return self._table(self.groups)

    def show(self, groups: Sequence[Group]) -> str:
        """Returns some of the groups as a table."""
        return render(*self._table(groups))

    def _table(self, groups: Sequence[Group]) -> list[RenderableType]:
        """Returns a row per set of similar groups, with roles and warnings below."""
        rows, notes = show.rows_and_notes(groups)
        if len(groups) == len(self.groups):
            lines = Counter[tuple[str, str]]()  # similar layers share a line
            for layer in self.attention:
                lines["attention", show.role_line(layer.roles)] += 1
            for mlp in self.feed_forward:
                lines["MLP", show.role_line(mlp.roles)] += 1
            notes = [*((label, f"{line} ({times}x)") for (label, line), times in lines.items()), *notes]
            notes += [("tied", f"{alias} is {name}") for alias, name in self.tied.items()]
            if self.untouched:
                notes.append(("never used", some(self.untouched)))
            for label, counts in (("opaque", self.opaque), ("assumed", self.assumed)):
                notes += [(label, f"{reason} ({times}x)") for reason, times in counts.items()]
        entries = sum(math.prod(shape) for shape in self.shapes.values())
        table: list[RenderableType] = [f"{self.model}: {entries:,} parameters in {len(self.shapes)} tensors"]
        if rows:
            table += ["", text_table(rows, show.HEAD, aligns="<>>><")]
        elif not groups:
            table += ["", "no such units"]
        return [*table, "", show.labeled_notes(notes)] if notes else table


def build_structure(model: nn.Module, tape: Tape, outside: Shapes) -> Structure:
    """Builds the structure of a traced model.

    `outside` has shapes of parameters outside the model that may belong to its groups.
    """
    axes = {}
    for name, tensor in tape.parameters.items():
        known = note(tensor, touch=False)
        if known.used and not known.active:
            axes[name] = tuple(map(find, known.axes))
    first = dict[int, str]()
    tied = dict[str, str]()  # the first name of every weight, by its other names
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (original := first.setdefault(id(parameter), name)) != name:
            tied[name] = original
    sizes = {name: parameter.element_size() for name, parameter in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    untouched = {name: shape for name, shape in shapes.items() if name not in axes}
    groups = find_groups(axes, tape, frozenset(sizes))
    attention = find_attention(tape, groups)
    name_kinds(groups, attention, tape)
    groups = [group for group in groups if not all(map(attrgetter("buffer"), group.members))]  # buffers have no units to remove
    for number, group in enumerate(groups):
        group.number = number
        for member in group.members:
            if crossed(member.axis, group.leaf):
                mark(group.leaf, "opaque", f"it is multiplied with itself in dimension {member.dim} of {member.name}")
        flags = group.flags
        data = "its units are positions of the input" if "data" in flags else None
        reasons = [flags.get("opaque"), data, NEVER.get(group.kind), *(flags.get(flag) for flag in ("fixed", "const", "output"))]
        group.reason = next((reason for reason in reasons if reason), "")
        measure_units(group, axes, sizes)
    exclude_unseen(groups, untouched, outside)
    find_contexts(groups, axes)
    find_idle(groups, attention, axes)
    return Structure(
        model=type(model).__name__,
        axes=axes,
        groups=tuple(groups),
        attention=tuple(attention),
        feed_forward=tuple(find_feed_forward(tape, groups)),
        shapes=shapes,
        tied=tied,
        untouched=tuple(untouched),
        opaque=dict(tape.misses),
        assumed=dict(tape.assumed),
    )


BY_FLAG: dict[str, Kind] = {"data": "position", "fixed": "fixed", "vocab": "vocab", "label": "label", "topk": "expert"}

NEVER: dict[Kind, str] = {
    "vocab": "tokens belong to the tokenizer, too: remove them with tokens=",
    "position": "a table of positions or types, addressed by number",
    "label": "labels belong to the task",
    "rotary": "a rotary frequency serves all heads of all layers, and the code derives it from the head dimension",
}


def name_kinds(groups: Sequence[Group], attention: Sequence[Attention], tape: Tape) -> None:
    """Sets the kind of every group, from the roles of its axis."""
    axes = {(member.name, member.dim): member.axis for group in groups for member in group.members}
    queries, of_keys, over, values = (set[Axis]() for _ in range(4))  # head leaves of queries, and of keys and values
    for layer in attention:
        over.update(layer.query_key)
        values.update(layer.value)
        heads = set(layer.heads)
        for part in layer.q:
            if (part.name, part.dim) in axes:
                queries |= heads & set(leaves(axes[part.name, part.dim]))
        for part in (*layer.k, *layer.v):
            axis = axes.get((part.name, part.dim))
            if axis is not None:  # in a fused matrix, only the leaves that these positions reach
                of_keys |= {leaf for leaf in heads & set(leaves(axis)) if (layout(axis, leaf)[part.positions] >= 0).any()}
    only_queries = queries - of_keys
    for group in groups:
        leaf = group.leaf
        flags = group.flags
        if (flag := next(filter(flags.__contains__, BY_FLAG), None)) is not None:
            group.kind = BY_FLAG[flag]
        elif leaf in queries or leaf in of_keys or "batched" in flags:
            grouped = any(leaf in layer.heads and not only_queries.isdisjoint(layer.heads) for layer in attention)
            group.kind = "query_head" if leaf in only_queries else "kv_head" if grouped else "head"
        elif leaf in over:
            rotary = "const" in flags or any(member.buffer for member in group.members)  # cos and sin tables are buffers
            group.kind = "rotary" if rotary else "query_key"
        elif leaf in values:
            group.kind = "value"
        elif "contracted" in flags:
            group.kind = "state"
        elif "indexed" in flags:
            group.kind = "position"
        else:
            keys = [(member.name, member.dim) for member in group.members]
            reads, writes = ([order[key] for key in keys if key in order] for order in (tape.reads, tape.writes))
            again = "added" in flags and bool(reads and writes) and max(writes) > min(reads)
            if "embedded" in flags or again:  # from an embedding, or recomputed from values read earlier and added to them
                group.kind = "residual"
            else:
                group.kind = "channel" if "bent" in flags or not (reads and writes) else "rank"


def find_idle(groups: Sequence[Group], attention: Sequence[Attention], axes: Axes) -> None:
    """Finds key biases that softmax cancels: constant over keys and without rotary embedding."""
    by_leaf = {group.leaf: group for group in groups}
    for layer in attention:
        query_key = [by_leaf[leaf] for leaf in layer.query_key if leaf in by_leaf]
        key_parts = [part for part in layer.k if part.name in axes and len(part.positions) == part.size]
        key_axes = [axes[part.name][part.dim] for part in key_parts]
        candidates = list(query_key)
        if "rotary" not in map(attrgetter("kind"), query_key):
            candidates += [by_leaf[leaf] for leaf in layer.heads if leaf in by_leaf]
        for group in candidates:
            for member in group.members if group.kind != "rotary" else ():
                is_bias = len(axes[member.name]) == 1 and axes[member.name][0] in key_axes
                if is_bias and member.name not in group.idle:
                    group.idle += (member.name,)


def find_contexts(groups: Sequence[Group], axes: Axes) -> None:
    """Finds the groups that surround each group in every member.

    They are multiplied with it in one dimension, or are experts in another dimension.
    """
    numbers = {group.leaf: group.number for group in groups}
    for group in groups:
        shared: set[Axis] | None = None
        for member in group.members:
            neighbors = multiplied_with(member.axis, group.leaf)
            for d, axis in enumerate(axes[member.name]):
                for leaf in leaves(axis) if d != member.dim else ():
                    if "topk" in leaf.notes:
                        neighbors.add(leaf)
            shared = neighbors if shared is None else shared & neighbors
        group.context = tuple(sorted(numbers[leaf] for leaf in shared or () if leaf in numbers and leaf is not group.leaf))


def exclude_unseen(groups: Sequence[Group], untouched: Shapes, outside: Shapes) -> None:
    """Marks groups to which an untraced parameter of the same size may belong."""
    for group in groups:
        unused = next((name for name, shape in untouched.items() if group.size in shape), None)
        other = next((name for name, shape in outside.items() if group.size in shape), None)
        if group.reason:
            continue
        if unused is not None and any(member.axis is group.leaf for member in group.members):
            group.reason = f"{unused}, which the run never used, may have it too; pass example_inputs that make use of it"
        elif other is not None and group.kind == "residual":
            group.reason = f"{other}, outside of the model that was traced, may have it too; pass example_inputs for the whole"
