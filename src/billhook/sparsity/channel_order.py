"""Finds the channel order for N:M pruning: which channels can move, and the best order."""

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
"""Rounds of channel exchange between groups."""
ROWS = 2**14
"""Most rows of scores that determine the order of an axis, split evenly over its consumer layers."""


@dataclass(frozen=True, eq=False)
class FreeAxis:
    """Units whose order does not change the model.

    Attributes:
        group: The units, and all parameters that contain them.
        beside: Axes that are next to the units in every parameter, such as KV heads for value dimensions. Each of their
            positions may have its own order.
        sets: Sets of units with their own order, as positions along `beside`: int64, `[sets, leaves]`.
        readers: Positions of the units among the inputs of each consumer layer: int64, `[sets, units, times]`.
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
    """Finds units that can be reordered and whose consumer layers are pruned in groups of m.

    Units that fill whole groups, such as heads, are left out: their order does not change any group.

    Returns:
        The axes that can be reordered, and the reasons for all others, by kind and module.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inputs = dict[tuple[str, int], str]()  # (weight, dimension of its inputs) -> layer
    for name, linear in linears.items():
        if not is_convolution(linear) or linear.groups == 1:  # other groups do not share input channels
            inputs[names.get(id(linear.get_parameter("weight")), ""), 0 if isinstance(linear, Conv1D) else 1] = name
    saved, free, reasons = model.state_dict(keep_vars=True).keys(), list[FreeAxis](), dict[str, str]()
    for group in structure.groups:
        consumers, reason = dict[str, Member](), group.reason
        for member in group.members:
            if (member.name, member.dim) in inputs:
                consumers[inputs[member.name, member.dim]] = member
            if member.buffer and member.name not in saved:
                reason = reason or f"the buffer {member.name} contains them and is not saved in checkpoints"
        if not consumers or _fill_groups_alone(group, consumers.values(), m):
            continue
        units = _free(group, consumers, linears)
        if not reason and any(_straddle(positions, m) for positions in units.readers.values()):
            reason = f"they share groups of {m} with other units"
        if reason:
            reasons[f"{group.kind} in {group.where or 'the model'}"] = reason
        else:
            free.append(units)
    return free, reasons


def _free(group: Group, consumers: Mapping[str, Member], linears: Mapping[str, nn.Module]) -> FreeAxis:
    """Finds the sets of units with their own order; a single set if members differ."""
    shared_axes = set.intersection(*[multiplied_with(member.axis, group.leaf) for member in group.members])
    for beside in (tuple(sorted(shared_axes, key=lambda leaf: leaf.number)), ()):
        axis = group.members[0].axis
        sets = np.unique(axis_numbers(axis, beside)[layout(axis, group.leaf) >= 0], axis=0)
        if all(_positions(member.axis, group.leaf, beside, sets) is not None for member in group.members):
            break
    free = FreeAxis(group, beside, sets, {})
    for name, member in consumers.items():
        kernel_offsets = np.arange(0, weight_of(linears[name]).shape[1], member.axis.size)  # all channels at each kernel position
        free.readers[name] = (free.positions(member.axis)[..., None] + kernel_offsets).reshape(len(sets), group.size, -1)
    return free


def _positions(axis: Axis, leaf: Axis, beside: Sequence[Axis], sets: Indices) -> Indices | None:
    """Returns the positions of each set's units along an axis, or None if they do not fit.

    The positions are `[sets, units, times]`; all units need the same number of them.
    """
    unit_at = layout(axis, leaf)
    positions = np.flatnonzero(unit_at >= 0)
    set_at = match(axis_numbers(axis, beside)[positions], sets)
    key = set_at * leaf.size + unit_at[positions]
    counts = np.bincount(key[set_at >= 0], minlength=len(sets) * leaf.size)
    if (set_at < 0).any() or len(set(counts.tolist())) > 1:
        return None
    return positions[np.argsort(key, kind="stable")].reshape(len(sets), leaf.size, -1)


def _fill_groups_alone(group: Group, consumers: Iterable[Member], m: int) -> bool:
    """Returns True if no group of m inputs contains two different units."""
    blocks = [group.index(member).reshape(-1, m) for member in consumers]
    return all((block == block[:, :1]).all() for block in blocks)


def _straddle(positions: Indices, m: int) -> bool:
    """Returns True if a group of m inputs does not consist of m consecutive units."""
    _, units, times = positions.shape
    if units % m:
        return True
    groups = positions.reshape(-1, m, times)
    return bool((groups != groups[:, :1] + np.arange(m)[:, None]).any() or (groups[:, 0] % m).any())


def assign(gains: Costs) -> Indices:
    """Assigns a different column to each row, with the largest possible sum of gains.

    Uses shortest augmenting paths: "A Shortest Augmenting Path Algorithm for Dense and Sparse Linear Assignment Problems"
    (Jonker & Volgenant, 1987), without its start.

    Args:
        gains: Finite, `[n, n]`.

    Returns:
        The column of each row: int64, `[n]`.

    >>> assign(np.array([[3.0, 2.0], [2.0, 0.0]])).tolist()
    [1, 0]
    """
    costs = gains.max(initial=0) - gains
    size = len(costs)
    row_prices = costs.min(1, initial=np.inf)  # each cost is at least the sum of both prices
    column_prices = (costs - row_prices[:, None]).min(0, initial=np.inf)
    row_of, column_of = np.full(size, -1), np.full(size, -1)
    for row in range(size):
        free, came_from = _shortest_path(row, costs, row_prices, column_prices, row_of)
        while free >= 0:  # each row on the path takes the next one's column
            taker = came_from[free]
            row_of[free], column_of[taker], free = taker, free, column_of[taker]
    return column_of


def _shortest_path(row: int, costs: Costs, row_prices: Costs, column_prices: Costs, row_of: Indices) -> tuple[int, Indices]:
    """Finds the cheapest path from a row to a free column, and raises the prices along it.

    Returns:
        The free column, and the predecessor row of each column that was reached.
    """
    shortest, came_from = np.full(len(costs), np.inf), np.full(len(costs), -1)
    open_costs, visited = np.full(len(costs), np.inf), list[int]()
    current, length = row, 0.0
    closed = np.zeros(len(costs), dtype=bool)
    while True:
        reached = length + costs[current] - row_prices[current] - column_prices
        nearer = (reached < shortest) & ~closed
        shortest[nearer] = open_costs[nearer] = reached[nearer]
        came_from[nearer] = current
        column = int(open_costs.argmin())
        length = float(shortest[column])
        if row_of[column] < 0:
            break
        closed[column], open_costs[column] = True, np.inf
        visited.append(column)
        current = int(row_of[column])
    row_prices[row] += length
    row_prices[row_of[visited]] += length - shortest[visited]
    column_prices[visited] -= length - shortest[visited]
    return column, came_from


def kept_sum(columns: Tensor, n: int, m: int) -> float:
    """Sums the n highest of every m consecutive scores of each row of `[columns, rows]`.

    >>> kept_sum(torch.tensor([[1.0], [4.0], [3.0], [2.0]]), 2, 4)
    7.0
    """
    highest = _highest(columns.view(-1, m, columns.shape[1]).unbind(1), n)
    return float(sum(scores.sum(dtype=widest_float(columns.device)) for scores in highest))


def find_order(columns: Tensor, n: int, m: int, rounds: int) -> Tensor:
    """Finds the column order with the largest sum of the n highest of every m scores per row.

    Args:
        columns: Scores of at least 0, float32, `[columns, rows]`.
        n: Number of kept scores per group.
        m: Group size.
        rounds: Rounds of exchange between groups.

    Returns:
        The column at each position, int64, `[columns]`; the old order if no better order is found.
    """
    # dealt to groups in alternating order of the sums, so that each group gets columns of all sizes
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
    """Takes a column out of each group, and reassigns the columns to gain most in total.

    A column x adds max(0, x - t) to each row of a group whose n-th highest score is t without it, and the sum over rows of that
    is (|x - t| + x - t) / 2, of which only the first part depends on which column goes where.
    """
    taken = groups.gather(1, slots).squeeze(1)
    others = torch.arange(groups.shape[1] - 1, device=groups.device)
    others_in_group = groups.gather(1, others + (others >= slots))
    threshold = _highest((columns[numbers] for numbers in others_in_group.unbind(1)), n)[-1]
    gains = torch.cdist(columns[taken][None], threshold[None], p=1)[0].cpu().double().numpy()
    new = torch.empty_like(taken)
    new[torch.from_numpy(assign(gains)).to(taken.device)] = taken
    groups.scatter_(1, slots, new[:, None])


def _highest(scores: Iterable[Tensor], n: int) -> list[Tensor]:
    """Returns the n highest values at each position of several tensors, in descending order."""
    highest: list[Tensor] = []
    for values in scores:
        for rank, higher in enumerate(highest):
            highest[rank], values = torch.maximum(higher, values), torch.minimum(higher, values)
        if len(highest) < n:
            highest.append(values)
    return highest


@dataclass(frozen=True, eq=False)
class ReorderedAxis:
    """A new order of the units of an axis.

    Attributes:
        kind: Kind of unit.
        where: Innermost module that contains the units.
        readers: Consumer layers of the units.
        orders: The unit at each position, int64, `[sets, units]`. Value dimensions have a set for each KV head.
        kept: Share of the scores that groups keep, before and after. For an axis with many consumer layers, computed on some of
            their rows.
    """

    kind: Kind
    where: str
    readers: tuple[str, ...]
    orders: Indices
    kept: tuple[float, float]


class OrderingVisitor(PruningVisitor):
    """A visitor that finds orders, by index of the axis, and prunes nothing.

    Args:
        criterion: Scores the weights.
        free: Axes to reorder.
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
        """Scores linear layers, and orders the axes whose consumer layers are all scored."""
        for name in linears:
            axes = [number for number, axis in enumerate(self.free) if name in axis.readers]
            if not axes:
                continue
            scores = self.scores(name, self.statistics_of(name)).float()
            with prefix_errors(name):
                check_finite(scores, "a score")
            for number in axes:
                self._columns[number][name] = _columns(scores, self.free[number], name)
                if len(self._columns[number]) == len(self.free[number].readers):
                    self._order(number)

    def close(self) -> None:
        """Orders the axes with a consumer layer that no batch has called."""
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
    """Returns a layer's scores for each unit, `[sets, units, rows]`, on evenly spaced rows."""
    positions = torch.from_numpy(axis.readers[name]).to(scores.device)
    share = max(1, ROWS // (len(axis.readers) * positions.shape[2]))
    rows = torch.linspace(0, len(scores) - 1, min(len(scores), share), device=scores.device).round().long()
    columns = scores[rows].t()[positions.flatten()].view(*positions.shape, len(rows))
    return columns.flatten(2).contiguous()
