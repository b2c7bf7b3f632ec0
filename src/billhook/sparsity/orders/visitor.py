"""Searches the order of free axes during a walk over a model, as soon as all linears that read one have been seen."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from billhook.adapters.masked import counted
from billhook.linalg import widest_float
from billhook.model.linears import weight_of
from billhook.sparsity.criteria import Criterion, check_finite
from billhook.sparsity.grouped import scores_of
from billhook.sparsity.orders.free import Free
from billhook.sparsity.orders.search import find_order, kept
from billhook.sparsity.visitor import PruningVisitor, naming

ROWS = 2**14
"""How many rows of scores an axis is ordered by at most: as many of each linear that reads it."""

Found = tuple[Tensor, float, float]
"""Which unit of each set comes where, int64, `[sets, units]`, and the share of the scores that is kept, before and then."""


class OrderingVisitor(PruningVisitor):
    """A visitor that prunes nothing, and finds orders.

    Args:
        criterion: How weights are scored.
        free: The axes.
        kept: (N, M).
        rounds: How often groups exchange columns.
        walk: The arguments of a visitor.
    """

    def __init__(
        self, criterion: Criterion, free: Sequence[Free], kept: tuple[int, int], rounds: int, **walk: Any  # noqa: ANN401
    ) -> None:  # fmt: skip
        super().__init__(criterion, {}, f"{kept[0]}:{kept[1]}", **walk)
        self.free, self.kept, self.rounds = free, kept, rounds
        self.found: dict[int, Found] = {}
        self._scores: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(free))}

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Scores linears, and orders the axes of which all linears that read them are scored."""
        for name, linear in linears.items():
            reading = [number for number, one in enumerate(self.free) if name in one.readers]
            if not reading:
                continue
            with naming(name):
                weight = counted(weight_of(linear), self.adapters.get(name))
                check_finite(weight, "the weight")
                scores = scores_of(self.criterion, weight, self._statistics(name)).float()
                check_finite(scores, "a score")
            for number in reading:
                axis = self.free[number]
                self._scores[number][name] = _columns(scores, axis, name)
                if len(self._scores[number]) == len(axis.readers):
                    self._order(number)

    def close(self) -> None:
        """Orders the axes that some linears read which no batch has called."""
        for number, scores in list(self._scores.items()):
            if scores:
                self._order(number)

    def _order(self, number: int) -> None:
        columns, (n, m) = torch.cat([*self._scores.pop(number).values()], dim=2), self.kept
        orders = torch.stack([find_order(own, n, m, self.rounds) for own in columns])
        total = max(float(columns.sum(dtype=widest_float(columns.device))), 1e-30)
        before = sum(kept(own, n, m) for own in columns)
        then = sum(kept(own[order], n, m) for own, order in zip(columns, orders, strict=True))
        self.found[number] = orders.cpu(), before / total, then / total


def _columns(scores: Tensor, axis: Free, name: str) -> Tensor:
    """Returns the scores of a linear for each unit, of rows that are spread evenly: `[sets, units, rows]`."""
    positions = torch.from_numpy(axis.readers[name]).to(scores.device)
    share = max(1, ROWS // (len(axis.readers) * positions.shape[2]))
    rows = torch.linspace(0, len(scores) - 1, min(len(scores), share), device=scores.device).round().long()
    columns = scores[rows].t()[positions.flatten()].view(*positions.shape, len(rows))
    return columns.flatten(2).contiguous()
