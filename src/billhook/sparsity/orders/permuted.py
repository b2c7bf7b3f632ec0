"""The order in which the channels of a model have been put."""

import re
from collections import defaultdict
from dataclasses import dataclass

from billhook.model.shapes.handed import Indices
from billhook.page import Shown
from billhook.tracing.groups import Kind


@dataclass(frozen=True, eq=False)
class Reordered:
    """Units of one axis that stand in another order.

    Attributes:
        kind: What a unit is.
        where: The innermost module that holds them.
        readers: The linears that read them.
        orders: Which unit of each set comes to each place, int64, `[sets, units]`; value dimensions have a set for each KV head.
        kept: The share of the scores that groups keep, before and after; where an axis has many readers, of some of their rows.
    """

    kind: Kind
    where: str
    readers: tuple[str, ...]
    orders: Indices
    kept: tuple[float, float]


@dataclass(frozen=True, eq=False, repr=False)
class Permuted(Shown):
    """The order in which a model's channels now stand; `print` shows a table.

    Attributes:
        model: The name of the model's class.
        criterion: The criterion that scored weights, in words.
        pattern: `"N:M"`.
        axes: What stands in another order.
        left: Why others stay as they are, by kind and place.
    """

    model: str
    criterion: str
    pattern: str
    axes: tuple[Reordered, ...]
    left: dict[str, str]

    def text(self) -> str:
        """Returns all lines of what `print` shows."""
        rows = self._rows()
        width = max([len(name) for name, *_ in rows], default=0)
        lines = [f"{self.model} in order for {self.pattern}, by {self.criterion}: share of the scores that is kept"]
        for name, (sets, units), before, then in rows:
            lines.append(f"  {name:<{width}}  {sets:>4} x {units:>6,}  {before:.4f} -> {then:.4f}")
        return "\n".join([*lines, *(f"  {name} stay as they are: {why}" for name, why in self.left.items())])

    def _rows(self) -> list[tuple[str, tuple[int, int], float, float]]:
        """Returns for axes that are alike their name, how many orders of how many units, and what they keep on average."""
        alike: dict[tuple[str, int], list[Reordered]] = defaultdict(list)
        for one in self.axes:
            name = f"{one.kind} in {one.where or 'the model'}"
            alike[re.sub(r"\b\d+\b", "*", name), one.orders.shape[1]].append(one)
        rows = []
        for (name, units), own in alike.items():
            before, then = (sum(one.kept[n] for one in own) / len(own) for n in (0, 1))
            rows.append((name, (sum(len(one.orders) for one in own), units), before, then))
        return rows
