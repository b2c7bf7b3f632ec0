"""The linear sum assignment problem, solved exactly by shortest augmenting paths.

"A Shortest Augmenting Path Algorithm for Dense and Sparse Linear Assignment Problems" (Jonker & Volgenant, 1987), without its
start.
"""

import numpy as np
from numpy.typing import NDArray

from billhook.model.shapes.handed import Indices

Costs = NDArray[np.float64]


def assign(gains: Costs) -> Indices:
    """Finds for each row a column of its own, so that the sum of their gains is the largest there is.

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
