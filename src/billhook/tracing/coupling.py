"""The structure that a run has shown of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from billhook.page import Shown
from billhook.tracing import show
from billhook.tracing.axes import find
from billhook.tracing.findings import Findings
from billhook.tracing.groups import Group, find_groups, weigh
from billhook.tracing.kinds import find_contexts, find_idle, give_reason, mind_outside, mind_untouched, name_kinds
from billhook.tracing.roles import find_attention, find_feed_forward
from billhook.tracing.tape import Tape, note


class Structure(Shown, Findings):
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

    def text(self) -> str:
        """Returns all lines of what `print` shows."""
        return show.table(self, self.groups)

    def _repr_html_(self) -> str:
        return show.html(self, self.groups)

    def show(self, groups: Sequence[Group]) -> str:
        """Shows some of the groups as a table."""
        return show.table(self, groups)


def couple(model: nn.Module, tape: Tape, outside: Mapping[str, tuple[int, ...]] | None = None) -> Structure:
    """Makes a structure of what a run has shown; parameters of the shapes `outside` stand next to the model and may be its."""
    parameters = dict(model.named_parameters())
    used = {name: note(tensor, touch=False) for name, tensor in tape.parameters.items()}
    axes = {name: tuple(map(find, one.axes)) for name, one in used.items() if one.used and not one.active}
    groups = find_groups(axes, tape, frozenset(parameters))
    attention = find_attention(tape, groups)
    name_kinds(groups, attention, tape)
    groups = [group for group in groups if not all(member.buffer for member in group.members)]
    untouched = {name: tuple(parameter.shape) for name, parameter in parameters.items() if name not in axes}
    sizes = {name: parameter.element_size() for name, parameter in parameters.items()}
    for number, group in enumerate(groups):
        group.number = number
        give_reason(group)
        weigh(group, axes, sizes)
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
