"""The structure that a run has shown of a model: its groups, each with its kind, its context, and why it must not be pruned."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from torch import nn

from billhook.display import Printable, render
from billhook.tracing import show
from billhook.tracing.axes import Axis, crossed, find, layout, leaves, mark, multiplied_with
from billhook.tracing.groups import Group, Kind, find_groups, measure_units
from billhook.tracing.roles import Attention, StructureFields, find_attention, find_feed_forward
from billhook.tracing.tape import Tape, note


class Structure(Printable, StructureFields):
    """Axes, groups and roles of a model's parameters; `print` shows them as a table.

    Attributes:
        model: The model's class.
        axes: The axis of every dimension of every parameter and buffer that the run used.
        groups: The groups, in the order of the parameters.
        attention: Queries, keys, values and outputs.
        feed_forward: Gates, ups and downs.
        shapes: The shape of every parameter.
        tied: Names that are the same tensor as another: alias -> name.
        untouched: Parameters that the run never used, and that must be left alone.
        opaque: Why axes are opaque: an op without a rule or in an irregular place, with how often.
        assumed: Where the code asked for a value that nobody knows, and what was assumed, with how often.

    Example:
        >>> import billhook as bh
        >>> bh.trace(bh.load("tiny")).tree("model.layers.0.self_attn.q_proj.weight")
        '[head:8 * (f:16 + f:16), hidden:256]'
    """

    def tree(self, name: str) -> str:
        """Returns the axes of a parameter as a readable tree, such as `[kv:3 * group:3 * (f:32 + f:32), hidden:576]`.

        Raises:
            ValueError: If the run used no parameter of that name.
        """
        name = self.tied.get(name, name)
        if name not in self.axes:
            raise ValueError(f"name: the run used no parameter '{name}'; those of {self.model} are in `axes`")
        return show.tree(self, name)

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data."""
        return show.to_json(self)

    def _renderables(self) -> list[RenderableType]:
        return show.table(self, self.groups)

    def show(self, groups: Sequence[Group]) -> str:
        """Shows some of the groups as a table."""
        return render(*show.table(self, groups))


def build_structure(model: nn.Module, tape: Tape, outside: Mapping[str, tuple[int, ...]] | None = None) -> Structure:
    """Makes a structure of what a run has shown; parameters of the shapes `outside` stand next to the model and may be its."""
    parameters = dict(model.named_parameters())
    notes = {name: note(tensor, touch=False) for name, tensor in tape.parameters.items()}
    axes = {name: tuple(map(find, known.axes)) for name, known in notes.items() if known.used and not known.active}
    groups = find_groups(axes, tape, frozenset(parameters))
    attention = find_attention(tape, groups)
    name_kinds(groups, attention, tape)
    groups = [group for group in groups if not all(member.buffer for member in group.members)]
    untouched = {name: tuple(parameter.shape) for name, parameter in parameters.items() if name not in axes}
    sizes = {name: parameter.element_size() for name, parameter in parameters.items()}
    for number, group in enumerate(groups):
        group.number = number
        give_reason(group)
        measure_units(group, axes, sizes)
    mind_untouched(groups, untouched)
    mind_outside(groups, outside or {})
    find_contexts(groups, axes)
    find_idle(groups, attention, axes)
    first = {id(parameter): name for name, parameter in parameters.items()}
    every = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    return Structure(
        model=type(model).__name__,
        axes=axes,
        groups=tuple(groups),
        attention=tuple(attention),
        feed_forward=tuple(find_feed_forward(tape, groups)),
        shapes={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        tied={alias: name for alias, name in every.items() if alias != name},
        untouched=tuple(untouched),
        opaque=dict(tape.misses),
        assumed=dict(tape.assumed),
    )


BY_FLAG: dict[str, Kind] = {"data": "position", "fixed": "fixed", "vocab": "vocab", "label": "label", "topk": "expert"}

NEVER: dict[Kind, str] = {
    "vocab": "tokens belong to the tokenizer",
    "position": "a table of positions or types, addressed by number",
    "label": "labels belong to the task",
    "rotary": "a rotary frequency serves all heads of all layers, and the code derives it from the width of a head",
}


def name_kinds(groups: Sequence[Group], attention: Sequence[Attention], tape: Tape) -> None:
    """Gives every group its kind, from the roles that its axis plays."""
    axes = {(member.name, member.dim): member.axis for group in groups for member in group.members}
    queries, keys, over, values = set[Axis](), set[Axis](), set[Axis](), set[Axis]()
    for layer in attention:
        heads = set(layer.heads)
        for part in layer.q:
            if (part.name, part.dim) in axes:
                queries |= heads & set(leaves(axes[part.name, part.dim]))
        for part in (*layer.k, *layer.v):
            if (axis := axes.get((part.name, part.dim))) is not None:  # keys and values may be parts of one matrix
                keys |= {leaf for leaf in heads & set(leaves(axis)) if (layout(axis, leaf)[part.positions] >= 0).any()}
        over |= set(layer.query_key)
        values |= set(layer.value)
    only_queries = queries - keys
    for group in groups:
        leaf, flags = group.leaf, group.flags
        if (flag := next((flag for flag in BY_FLAG if flag in flags), None)) is not None:
            group.kind = BY_FLAG[flag]
        elif leaf in queries or leaf in keys or "batched" in flags:
            grouped = any(leaf in layer.heads and not only_queries.isdisjoint(layer.heads) for layer in attention)
            group.kind = "query_head" if leaf in only_queries else "kv_head" if grouped else "head"
        elif leaf in over:
            rotary = "const" in flags or any(member.buffer for member in group.members)
            group.kind = "rotary" if rotary else "query_key"
        elif leaf in values:
            group.kind = "value"
        elif "contracted" in flags:
            group.kind = "state"
        elif "indexed" in flags:
            group.kind = "position"
        else:
            group.kind = _width_kind(group, tape)


def find_idle(groups: Sequence[Group], attention: Sequence[Attention], axes: Mapping[str, Sequence[Axis]]) -> None:
    """Finds the biases of keys that add the same to all scores of a query: one whose width no position turns."""
    by_leaf = {group.leaf: group for group in groups}
    for layer in attention:
        rotary = any(by_leaf[leaf].kind == "rotary" for leaf in layer.query_key if leaf in by_leaf)
        made = [axes[part.name][part.dim] for part in layer.k if part.name in axes and len(part.positions) == part.size]
        biases = {name for name, dims in axes.items() if len(dims) == 1 and dims[0] in made}
        for leaf in (*layer.query_key, *(() if rotary else layer.heads)):
            if leaf in by_leaf and by_leaf[leaf].kind != "rotary":
                group = by_leaf[leaf]
                group.idle += tuple(m.name for m in group.members if m.name in biases and m.name not in group.idle)


def _width_kind(group: Group, tape: Tape) -> Kind:
    """Finds residual channels: a table writes them, or they are made again from what was read of them, and added."""
    dims = [(member.name, member.dim) for member in group.members]
    reads = [tape.reads[dim] for dim in dims if dim in tape.reads]
    writes = [tape.writes[dim] for dim in dims if dim in tape.writes]
    again = bool(reads and writes) and max(writes) > min(reads)
    if "embedded" in group.flags or ("added" in group.flags and again):
        return "residual"
    return "channel" if "bent" in group.flags or not (reads and writes) else "rank"


def find_contexts(groups: Sequence[Group], axes: Mapping[str, Sequence[Axis]]) -> None:
    """Finds the groups next to which each stands in every member: multiplied in a dimension, or experts in another one."""
    numbers = {group.leaf: group.number for group in groups}
    for group in groups:
        near: set[Axis] | None = None
        for member in group.members:
            beside = multiplied_with(member.axis, group.leaf)
            for d, axis in enumerate(axes[member.name]):
                beside |= {leaf for leaf in leaves(axis) if "topk" in leaf.notes} if d != member.dim else set()
            near = beside if near is None else near & beside
        group.context = tuple(sorted(numbers[leaf] for leaf in near or () if leaf in numbers and leaf is not group.leaf))


def give_reason(group: Group) -> None:
    """Says why a group may not be pruned, if it may not."""
    for member in group.members:
        if crossed(member.axis, group.leaf):
            mark(group.leaf, "opaque", f"it is multiplied with itself in dimension {member.dim} of {member.name}")
    flags = group.flags
    data = "its units are positions of the input" if "data" in flags else None
    reasons = [flags.get("opaque"), data, NEVER.get(group.kind), *(flags.get(flag) for flag in ("fixed", "const", "output"))]
    group.reason = next((reason for reason in reasons if reason), "")


def mind_untouched(groups: Sequence[Group], untouched: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses groups that a parameter which the run never used may belong to: one that is as wide as the units are many."""
    for group in groups:
        plain = any(member.axis is group.leaf for member in group.members)
        name = next((name for name, shape in untouched.items() if group.size in shape), None)
        if plain and name is not None and not group.reason:
            group.reason = f"{name}, which the run never used, may have it too; pass example_inputs that make use of it"


def mind_outside(groups: Sequence[Group], outside: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses residual channels that a parameter outside of the model may write or read: one that is as wide."""
    for group in groups:
        name = next((name for name, shape in outside.items() if group.size in shape), None)
        if group.kind == "residual" and name is not None and not group.reason:
            group.reason = f"{name}, outside of the model that was traced, may have it too; pass example_inputs for the whole"
