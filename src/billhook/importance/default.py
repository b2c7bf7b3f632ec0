"""The importance by which units are ranked where none is named."""

from collections.abc import Mapping

from billhook.importance.activations import OutputNorm
from billhook.importance.base import Importance
from billhook.importance.taylor import Taylor
from billhook.units.units import Units


def default_importance(units: Mapping[str, Units]) -> Importance:
    """Returns `OutputNorm()`, or `Taylor()` where no module reads some of the units alone, as experts.

    docs/smaller.md compares them at equal size, on a real model.
    """
    return OutputNorm() if all(one.readers for one in units.values()) else Taylor()
