"""Searches the order of columns in which groups of M keep most of their scores.

"Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models" (Zhang et al., ICLR 2024,
https://openreview.net/forum?id=Tr0lPx9woF): columns are dealt out to groups by the sum of their scores, and then groups exchange
one column each by linear sum assignment. Here they do so again and again, with another column of each group, as groups exchange
pairs of columns in "Channel Permutations for N:M Sparsity" (Pool & Yu, NeurIPS 2021) while something is gained. One assignment is
the best of all exchanges of such columns, of two or of more.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from billhook.linalg import widest_float
from billhook.sparsity.orders.assignment import assign


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
