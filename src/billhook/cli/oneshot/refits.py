"""Reckons the memory in which the linears of a streamed model are refitted."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from billhook.model.config_fields import text_config
from billhook.model.linears import prunable, weight_of
from billhook.pruning.cuts import Cut
from billhook.pruning.target import Search
from billhook.repairs.moments import OUTPUTS
from billhook.running.statistics import ROWS

HELD = 5
"""Tensors of the hidden size that a run holds while it waits within a block: the stream, its norm, queries, keys and values."""


@dataclass(frozen=True)
class Refits:
    """How linears are refitted, each run of the cut model beside one of the whole model.

    Attributes:
        parts: Of how many parts of the data moments are kept.
        kept: How many inputs are left to each that is refitted; by default all linears keep all.
    """

    parts: int
    kept: Mapping[str, int] | None = None

    def sums(self, model: PreTrainedModel) -> int:
        """Returns the bytes that the largest refit takes."""
        shapes = {name: weight_of(linear).shape for name, linear in prunable(model).items()}
        kept = {name: columns for name, (_, columns) in shapes.items()} if self.kept is None else self.kept
        sizes = [(shapes[name][0], columns) for name, columns in kept.items() if name in shapes]
        return max((self._one(rows, columns, model.dtype.itemsize) for rows, columns in sizes), default=0)

    def _one(self, rows: int, columns: int, itemsize: int) -> int:
        """Returns the bytes of one: float64 matrices, and the weight of the inputs that are left.

        Of each part, half of a square, in panels, and one like the weight; and a square to solve in, with what is solved for: all
        outputs, or mixtures of these for each part beside while ridges are tried.
        """
        half = columns * (columns + min(ROWS, columns)) // 2
        solved = max(rows, (self.parts + 1) * OUTPUTS if rows > OUTPUTS else 0) * columns
        return 8 * (self.parts * (half + rows * columns) + columns**2 + solved) + itemsize * rows * columns

    def waits(self, model: PreTrainedModel, tokens: int) -> int:
        """Returns the bytes that both runs of so many tokens hold while they wait within a block, without what may rest."""
        hidden: int = text_config(model.config).hidden_size
        return 2 * HELD * tokens * hidden * model.dtype.itemsize

    def rests(self, model: PreTrainedModel, tokens: int) -> int:
        """Returns the bytes of what may: the widest inputs of both runs, and what two linears fall short of."""
        widest = max((weight_of(linear).shape[1] for linear in prunable(model).values()), default=0)
        hidden: int = text_config(model.config).hidden_size
        return 2 * tokens * (widest * model.dtype.itemsize + 4 * hidden)


def left(search: Search, cut: Cut) -> dict[str, int]:
    """Returns how many inputs a cut leaves to each module that reads units; if scores decide how many, all of them."""
    lasts = search.amount.ranking == "layer"
    return {
        reader: len(one.index) * cut.after[name][0] // cut.before[name][0] if lasts else len(one.index)
        for name, one in search.units.items()
        if name in cut.units
        for reader in one.readers
    }
