"""The search for an order of columns, against all orders of a small axis."""

import itertools

import pytest
import torch

from billhook.sparsity.channel_order import find_order, kept_sum

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4)]


def by_sorting(columns, n, m):
    return float(columns.t().reshape(-1, m).sort(1, descending=True).values[:, :n].double().sum())


def all_orders(columns, m):
    """One order of each way to part 2 m columns into two groups."""
    for others in itertools.combinations(range(1, columns), m - 1):
        yield [0, *others, *(one for one in range(1, columns) if one not in others)]


@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (4, 8), (8, 16)])
def test_what_is_kept(n, m):
    columns = torch.rand(48, 30)
    assert kept_sum(columns, n, m) == pytest.approx(by_sorting(columns, n, m))


def exchanged(order, m):
    """Two groups that have exchanged one column each, in all ways."""
    for one, other in itertools.product(range(m), range(m, 2 * m)):
        swapped = list(order)
        swapped[one], swapped[other] = order[other], order[one]
        yield swapped


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_two_groups_are_parted_so_that_no_exchange_gains_and_often_as_well_as_can_be(n, m):
    reached = 0
    for seed in range(10):
        columns = torch.rand(2 * m, 12, generator=torch.Generator().manual_seed(seed))
        best = max(by_sorting(columns[order], n, m) for order in all_orders(2 * m, m))
        order = find_order(columns, n, m, rounds=60).tolist()
        found = by_sorting(columns[order], n, m)
        assert by_sorting(columns, n, m) - 1e-5 <= found <= best + 1e-5
        assert max(by_sorting(columns[one], n, m) for one in exchanged(order, m)) <= found + 1e-5
        reached += found > best - 1e-5
    assert reached >= 5


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_more_rounds_never_keep_less(n, m):
    columns = torch.rand(96, 200) * torch.rand(96, 1) ** 2
    scores = [by_sorting(columns[find_order(columns, n, m, rounds)], n, m) for rounds in (0, 1, 2, 4, 8, 16)]
    assert scores == sorted(scores)
    assert by_sorting(columns, n, m) <= scores[0] < scores[1] < scores[-1]


def test_each_column_comes_once_and_the_same_whenever_it_is_asked():
    columns = torch.rand(32, 50)
    order = find_order(columns, 2, 4, 8)
    assert sorted(order.tolist()) == list(range(32))
    assert torch.equal(order, find_order(columns, 2, 4, 8))


def test_columns_that_all_keep_the_same_stay():
    assert torch.equal(find_order(torch.ones(16, 5), 2, 4, 0), torch.arange(16))


def test_large_columns_that_stand_together_are_parted():
    columns = torch.tensor([9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0])[:, None].expand(8, 6).contiguous()
    order = find_order(columns, 2, 4, 4)
    assert kept_sum(columns[order], 2, 4) == 4 * 9 * 6
