"""What a run has shown of a model, as plain fields."""

from dataclasses import dataclass, field

from billhook.tracing.axes import Axis
from billhook.tracing.groups import Group, Kind
from billhook.tracing.roles import Attention, FeedForward


@dataclass(eq=False)
class Findings:
    """What belongs together in a model.

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
    """

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
        """The groups of some kinds."""
        return [group for group in self.groups if group.kind in kinds]
