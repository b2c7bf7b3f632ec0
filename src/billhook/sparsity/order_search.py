"""Searches the order of channels in which groups of N:M lose least: exchanges, and an exact assignment."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from billhook.adapters.masked import counted
from billhook.linalg import widest_float
from billhook.model.handed import Indices
from billhook.model.linears import weight_of
from billhook.sparsity.criteria import Criterion, check_finite
from billhook.sparsity.free_order import Free
from billhook.sparsity.visitor import PruningVisitor, naming, scores_of

Costs = NDArray[np.float64]


def assign(gains: Costs) -> Indices:
    """Finds for each row a column of its own, so that the sum of their gains is the largest there is.

    By shortest augmenting paths: "A Shortest Augmenting Path Algorithm for Dense and Sparse Linear Assignment Problems" (Jonker &
    Volgenant, 1987), without its start.

    Args:
        gains: Finite, `[n, n]`.

    Returns:
        The column of each row: int64, `[n]`.

    >>> assign(np.array([[3.0, 2.0], [2.0, 0.0]])).tolist()
    [1, 0]
    """
    costs = gains.max(initial=0) - gains
    size = len(costs)
    of_rows = costs.min(1, initial=np.inf)  # prices: no cost is below the sum of both
    of_columns = (costs - of_rows[:, None]).min(0, initial=np.inf)
    row_of, column_of = np.full(size, -1), np.full(size, -1)
    for row in range(size):
        free, came_from = _shortest_path(row, costs, of_rows, of_columns, row_of)
        while free >= 0:  # each row on the path takes the next one's column
            taker = came_from[free]
            row_of[free], column_of[taker], free = taker, free, column_of[taker]
    return column_of


def _shortest_path(row: int, costs: Costs, of_rows: Costs, of_columns: Costs, row_of: Indices) -> tuple[int, Indices]:
    """Finds the cheapest path from a row to a column that is free, and raises prices for that.

    Returns:
        The free column, and for each column that was reached the row from which it was.
    """
    shortest, came_from = np.full(len(costs), np.inf), np.full(len(costs), -1)
    open_costs, settled = np.full(len(costs), np.inf), list[int]()
    at, length = row, 0.0
    closed = np.zeros(len(costs), dtype=bool)
    while True:
        reached = length + costs[at] - of_rows[at] - of_columns
        nearer = (reached < shortest) & ~closed
        shortest[nearer] = open_costs[nearer] = reached[nearer]
        came_from[nearer] = at
        column = int(open_costs.argmin())
        length = float(shortest[column])
        if row_of[column] < 0:
            break
        closed[column], open_costs[column] = True, np.inf
        settled.append(column)
        at = int(row_of[column])
    of_rows[row] += length
    of_rows[row_of[settled]] += length - shortest[settled]
    of_columns[settled] -= length - shortest[settled]
    return column, came_from


def kept(columns: Tensor, n: int, m: int) -> float:
    """Sums the n highest of every m consecutive scores of each row: `columns` is `[columns, rows]`, float32.

    >>> kept(torch.tensor([[1.0], [4.0], [3.0], [2.0]]), 2, 4)
    7.0
    """
    return float(
        sum(one.sum(dtype=widest_float(columns.device)) for one in _highest(columns.view(-1, m, columns.shape[1]).unbind(1), n))
    )


def find_order(columns: Tensor, n: int, m: int, rounds: int) -> Tensor:
    """Finds the order of columns in which the n highest of every m consecutive scores of a row have the largest sum.

    Args:
        columns: Scores of at least 0, float32, `[columns, rows]`.
        n: How many are kept.
        m: Of how many.
        rounds: How often groups exchange columns.

    Returns:
        Which column comes where, int64, `[columns]`; the old order where no better one is found.
    """
    start = torch.arange(len(columns), device=columns.device)
    order = max(start, _dealt(columns, m), key=lambda one: kept(columns[one], n, m))
    groups, generator = order.view(-1, m).clone(), torch.Generator().manual_seed(0)
    for _ in range(rounds):
        slots = torch.randint(m, (len(groups), 1), generator=generator).to(columns.device)
        _exchange(columns, groups, slots, n)
    return groups.flatten()


def _dealt(columns: Tensor, m: int) -> Tensor:
    """Deals columns out to groups by the sum of their scores, forth and back, so that each gets some of all sizes."""
    hands = columns.sum(1).argsort(descending=True, stable=True).view(m, -1)
    return torch.stack([hand.flip(0) if number % 2 else hand for number, hand in enumerate(hands)], 1).flatten()


def _exchange(columns: Tensor, groups: Tensor, slots: Tensor, n: int) -> None:
    """Takes a column out of each group, and gives it another group's, so that all together gain most.

    A column x adds max(0, x - t) to each row of a group whose n-th highest score is t without it, and the sum over rows of that
    is (|x - t| + x - t) / 2, of which only the first part depends on which column goes where.
    """
    taken = groups.gather(1, slots).squeeze(1)
    others = torch.arange(groups.shape[1] - 1, device=groups.device)
    rest = groups.gather(1, others + (others >= slots))
    least = _highest((columns[one] for one in rest.unbind(1)), n)[-1]
    gains = torch.cdist(columns[taken][None], least[None], p=1)[0].cpu().double().numpy()
    given = torch.empty_like(taken)
    given[torch.from_numpy(assign(gains)).to(taken.device)] = taken
    groups.scatter_(1, slots, given[:, None])


def _highest(scores: Iterable[Tensor], n: int) -> list[Tensor]:
    """Returns the highest score at each place of several tensors of one size, the second highest, and so on to the n-th."""
    highest: list[Tensor] = []
    for one in scores:
        rest = one
        for place, other in enumerate(highest):
            highest[place], rest = torch.maximum(other, rest), torch.minimum(other, rest)
        if len(highest) < n:
            highest.append(rest)
    return highest


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
