"""Findings of a run on a model, as plain fields."""

from dataclasses import dataclass, field

from billhook.tracing.axes import Axis
from billhook.tracing.groups import Group, Kind
from billhook.tracing.roles import Attention, FeedForward


@dataclass(eq=False)
class Findings:
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
