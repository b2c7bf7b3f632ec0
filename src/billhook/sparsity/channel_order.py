"""Finds the order of channels in which groups of N:M lose least: which may stand in any order, and the search for the best."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.linalg import widest_float
from billhook.model.layers import is_convolution, weight_of
from billhook.model.repeat_kv import Indices
from billhook.sparsity.criteria import Criterion, check_finite
from billhook.sparsity.grouped import prefix_errors
from billhook.sparsity.visitor import PruningVisitor, Walks
from billhook.tracing.axes import Axis, layout, multiplied_with
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Group, Kind, Member
from billhook.units.units import axis_numbers, match

Costs = NDArray[np.float64]
ROUNDS = 8
"""How often groups exchange channels."""
ROWS = 2**14
"""How many rows of scores an axis is ordered by at most: as many of each linear that reads it."""


@dataclass(frozen=True, eq=False)
class FreeAxis:
    """Units that may stand in any order.

    Attributes:
        group: The units, and every parameter that has them.
        beside: What they stand next to everywhere, as value dimensions next to KV heads: each of these may have its own order.
        sets: The sets of units that have an order of their own, as numbers along `beside`: int64, `[sets, leaves]`.
        readers: Of each linear that reads the units, their positions among its inputs: int64, `[sets, units, times]`.
    """

    group: Group
    beside: tuple[Axis, ...]
    sets: Indices
    readers: dict[str, Indices]

    def positions(self, axis: Axis) -> Indices:
        """Returns the positions of the units along an axis: int64, `[sets, units, times]`."""
        positions = _positions(axis, self.group.leaf, self.beside, self.sets)
        assert positions is not None, "the sets are those of every member"
        return positions


def find_free_axes(
    model: PreTrainedModel, structure: Structure, linears: Mapping[str, nn.Module], m: int
) -> tuple[list[FreeAxis], dict[str, str]]:
    """Finds the units that linears read in whole groups of m, and that may stand in any order.

    Units that each fill groups of their own, as heads do, are left out: their order changes no group.

    Returns:
        Those that may, and why others may not, by their kind and place.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inputs = dict[tuple[str, int], str]()  # (weight, dimension of its inputs) -> linear
    for name, linear in linears.items():
        if not is_convolution(linear) or linear.groups == 1:  # outputs of others read channels of their own
            inputs[names.get(id(linear.get_parameter("weight")), ""), 0 if isinstance(linear, Conv1D) else 1] = name
    stored, free, why = model.state_dict(keep_vars=True).keys(), list[FreeAxis](), dict[str, str]()
    for group in structure.groups:
        reading = {inputs[key]: member for member in group.members if (key := (member.name, member.dim)) in inputs}
        if not reading or _fill_groups_alone(group, reading.values(), m):
            continue
        units = _free(group, reading, {name: weight_of(linears[name]).shape[1] for name in reading})
        lost = next((member.name for member in group.members if member.buffer and member.name not in stored), "")
        reason = group.reason or (f"{lost}, which no checkpoint holds, has them" if lost else "")
        if not reason and any(_straddle(positions, m) for positions in units.readers.values()):
            reason = f"groups of {m} hold others beside them"
        if reason:
            why[f"{group.kind} in {group.where or 'the model'}"] = reason
        else:
            free.append(units)
    return free, why


def _free(group: Group, reading: Mapping[str, Member], inputs: Mapping[str, int]) -> FreeAxis:
    """Finds the sets of units that may have an order of their own: all together, if not every member has the same sets."""
    near = set.intersection(*[multiplied_with(member.axis, group.leaf) for member in group.members])
    for beside in (tuple(sorted(near, key=lambda leaf: leaf.number)), ()):
        axis = group.members[0].axis
        sets = np.unique(axis_numbers(axis, beside)[layout(axis, group.leaf) >= 0], axis=0)
        if all(_positions(member.axis, group.leaf, beside, sets) is not None for member in group.members):
            break
    free = FreeAxis(group, beside, sets, {})
    for name, member in reading.items():
        taps = np.arange(0, inputs[name], member.axis.size)  # a convolution reads all channels at each
        free.readers[name] = (free.positions(member.axis)[..., None] + taps).reshape(len(sets), group.size, -1)
    return free


def _positions(axis: Axis, leaf: Axis, beside: Sequence[Axis], sets: Indices) -> Indices | None:
    """Returns the positions of each set's units along an axis, `[sets, units, times]`; None if it has others, or not as many."""
    unit_at = layout(axis, leaf)
    positions = np.flatnonzero(unit_at >= 0)
    set_at = match(axis_numbers(axis, beside)[positions], sets)
    key = set_at * leaf.size + unit_at[positions]
    counts = np.bincount(key[set_at >= 0], minlength=len(sets) * leaf.size)
    if (set_at < 0).any() or len(set(counts.tolist())) > 1:
        return None
    return positions[np.argsort(key, kind="stable")].reshape(len(sets), leaf.size, -1)


def _fill_groups_alone(group: Group, reading: Iterable[Member], m: int) -> bool:
    """Tells whether each group of m inputs that has one of the units has no other of them."""
    blocks = [group.index(member).reshape(-1, m) for member in reading]
    return all((block == block[:, :1]).all() for block in blocks)


def _straddle(positions: Indices, m: int) -> bool:
    """Tells whether some group of m inputs does not hold m units that follow one another."""
    _, units, times = positions.shape
    if units % m:
        return True
    groups = positions.reshape(-1, m, times)
    return bool((groups != groups[:, :1] + np.arange(m)[:, None]).any() or (groups[:, 0] % m).any())


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
    row_prices = costs.min(1, initial=np.inf)  # no cost is below the sum of both prices
    column_prices = (costs - row_prices[:, None]).min(0, initial=np.inf)
    row_of, column_of = np.full(size, -1), np.full(size, -1)
    for row in range(size):
        free, came_from = _shortest_path(row, costs, row_prices, column_prices, row_of)
        while free >= 0:  # each row on the path takes the next one's column
            taker = came_from[free]
            row_of[free], column_of[taker], free = taker, free, column_of[taker]
    return column_of


def _shortest_path(row: int, costs: Costs, row_prices: Costs, column_prices: Costs, row_of: Indices) -> tuple[int, Indices]:
    """Finds the cheapest path from a row to a column that is free, and raises prices for that.

    Returns:
        The free column, and for each column that was reached the row from which it was.
    """
    shortest, came_from = np.full(len(costs), np.inf), np.full(len(costs), -1)
    open_costs, settled = np.full(len(costs), np.inf), list[int]()
    at, length = row, 0.0
    closed = np.zeros(len(costs), dtype=bool)
    while True:
        reached = length + costs[at] - row_prices[at] - column_prices
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
    row_prices[row] += length
    row_prices[row_of[settled]] += length - shortest[settled]
    column_prices[settled] -= length - shortest[settled]
    return column, came_from


def kept_sum(columns: Tensor, n: int, m: int) -> float:
    """Sums the n highest of every m consecutive scores of each row: `columns` is `[columns, rows]`, float32.

    >>> kept_sum(torch.tensor([[1.0], [4.0], [3.0], [2.0]]), 2, 4)
    7.0
    """
    highest = _highest(columns.view(-1, m, columns.shape[1]).unbind(1), n)
    return float(sum(scores.sum(dtype=widest_float(columns.device)) for scores in highest))


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
    # dealt out to groups by the sum of their scores, forth and back, so that each gets some of all sizes
    hands = columns.sum(1).argsort(descending=True, stable=True).view(m, -1)
    dealt = torch.stack([hand.flip(0) if number % 2 else hand for number, hand in enumerate(hands)], 1).flatten()
    start = torch.arange(len(columns), device=columns.device)
    order = max(start, dealt, key=lambda order: kept_sum(columns[order], n, m))
    groups, generator = order.view(-1, m).clone(), torch.Generator().manual_seed(0)
    for _ in range(rounds):
        slots = torch.randint(m, (len(groups), 1), generator=generator).to(columns.device)
        _exchange(columns, groups, slots, n)
    return groups.flatten()


def _exchange(columns: Tensor, groups: Tensor, slots: Tensor, n: int) -> None:
    """Takes a column out of each group, and gives it another group's, so that all together gain most.

    A column x adds max(0, x - t) to each row of a group whose n-th highest score is t without it, and the sum over rows of that
    is (|x - t| + x - t) / 2, of which only the first part depends on which column goes where.
    """
    taken = groups.gather(1, slots).squeeze(1)
    others = torch.arange(groups.shape[1] - 1, device=groups.device)
    rest = groups.gather(1, others + (others >= slots))
    threshold = _highest((columns[numbers] for numbers in rest.unbind(1)), n)[-1]
    gains = torch.cdist(columns[taken][None], threshold[None], p=1)[0].cpu().double().numpy()
    new = torch.empty_like(taken)
    new[torch.from_numpy(assign(gains)).to(taken.device)] = taken
    groups.scatter_(1, slots, new[:, None])


def _highest(scores: Iterable[Tensor], n: int) -> list[Tensor]:
    """Returns the highest score at each place of several tensors of one size, the second highest, and so on to the n-th."""
    highest: list[Tensor] = []
    for rest in scores:
        for rank, higher in enumerate(highest):
            highest[rank], rest = torch.maximum(higher, rest), torch.minimum(higher, rest)
        if len(highest) < n:
            highest.append(rest)
    return highest


@dataclass(frozen=True, eq=False)
class ReorderedAxis:
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


class OrderingVisitor(PruningVisitor):
    """A visitor that prunes nothing, and finds orders, by the axis's number.

    Args:
        criterion: How weights are scored.
        free: The axes.
        kept: (N, M).
        walks: See `PruningVisitor`.
        shared: See `PruningVisitor`.
    """

    def __init__(self, criterion: Criterion, free: Sequence[FreeAxis], kept: tuple[int, int], walks: Walks, shared: bool) -> None:
        super().__init__(criterion, {}, f"{kept[0]}:{kept[1]}", None, walks, shared)
        self.free, self.kept = free, kept
        self.ordered: dict[int, ReorderedAxis] = {}
        self._columns: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(free))}

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Scores linears, and orders the axes of which all linears that read them are scored."""
        for name in linears:
            reading = [number for number, axis in enumerate(self.free) if name in axis.readers]
            if not reading:
                continue
            scores = self.scores(name, self.statistics_of(name)).float()
            with prefix_errors(name):
                check_finite(scores, "a score")
            for number in reading:
                self._columns[number][name] = _columns(scores, self.free[number], name)
                if len(self._columns[number]) == len(self.free[number].readers):
                    self._order(number)

    def close(self) -> None:
        """Orders the axes that some linears read which no batch has called."""
        for number in [number for number, columns in self._columns.items() if columns]:
            self._order(number)

    def _order(self, number: int) -> None:
        columns, (n, m), free = torch.cat([*self._columns.pop(number).values()], dim=2), self.kept, self.free[number]
        orders = torch.stack([find_order(columns_of_set, n, m, ROUNDS) for columns_of_set in columns])
        total = max(float(columns.sum(dtype=widest_float(columns.device))), 1e-30)
        before = after = 0.0
        for columns_of_set, order in zip(columns, orders, strict=True):
            before += kept_sum(columns_of_set, n, m)
            after += kept_sum(columns_of_set[order], n, m)
        shares = before / total, after / total
        self.ordered[number] = ReorderedAxis(free.group.kind, free.group.where, (*free.readers,), orders.cpu().numpy(), shares)


def _columns(scores: Tensor, axis: FreeAxis, name: str) -> Tensor:
    """Returns the scores of a linear for each unit, of rows that are spread evenly: `[sets, units, rows]`."""
    positions = torch.from_numpy(axis.readers[name]).to(scores.device)
    share = max(1, ROWS // (len(axis.readers) * positions.shape[2]))
    rows = torch.linspace(0, len(scores) - 1, min(len(scores), share), device=scores.device).round().long()
    columns = scores[rows].t()[positions.flatten()].view(*positions.shape, len(rows))
    return columns.flatten(2).contiguous()
