"""The knapsack against all choices there are, and budgets that are used up."""

from itertools import product

import numpy as np
import pytest

from billhook.shrinking.knapsack import Frontier, Slot, cost, fill_budget, interpolated_loss, join_slots, loss, sizes_at_limit


def slots_of(random, count, levels=4):
    """Slots of random costs and losses."""
    found = []
    for number in range(count):
        kept = tuple(sorted(random.choice(50, levels, replace=False).tolist(), reverse=True))
        each = int(random.integers(1, 9))
        losses = (0.0, *np.cumsum(random.random(levels - 1)).tolist())
        found.append(Slot((f"place {number}",), tuple(one + 1 for one in kept), tuple((one + 1) * each for one in kept), losses))
    return found


def priced(allowed, each):
    return {kept: kept * each for kept in allowed}


@pytest.mark.parametrize("seed", range(10))
def test_the_knapsack_loses_least_of_all_choices(seed):
    random = np.random.default_rng(seed)
    slots = slots_of(random, 4)
    frontier = Frontier(slots)
    every = list(product(*(range(len(slot.kept)) for slot in slots)))
    for limit in random.integers(1, cost(slots, (0,) * 4) + 1, 20).tolist():
        within = [levels for levels in every if cost(slots, levels) <= limit]
        found = frontier.within(limit)
        if not within:
            assert found is None
        else:
            assert cost(slots, found) <= limit
            assert loss(slots, found) == pytest.approx(min(loss(slots, levels) for levels in within))


def test_levels_that_lose_no_more_than_smaller_ones_are_not_taken():
    frontier = Frontier([Slot(("a",), (3, 2, 1), (30, 20, 10), (0.0, 0.5, 0.25))])
    assert [frontier.levels(number) for number in range(len(frontier.costs))] == [(2,), (0,)]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_left_of_a_budget_is_used_up_between_levels(seed):
    random = np.random.default_rng(seed)
    slots = slots_of(random, 5)
    limit = cost(slots, (0,) * 5) * 3 // 4
    levels, each = Frontier(slots).within(limit), [slot.costs[0] // slot.kept[0] for slot in slots]
    kept = fill_budget(
        slots, levels, limit, [priced(range(slot.kept[0], 0, -1), one) for slot, one in zip(slots, each, strict=True)]
    )
    total = sum(one * units for one, units in zip(each, kept, strict=True))
    assert total <= limit
    for slot, one, units in zip(slots, each, kept, strict=True):
        assert units == slot.kept[0] or total + one > limit
    assert sum(interpolated_loss(slot, units) for slot, units in zip(slots, kept, strict=True)) <= loss(slots, levels) + 1e-12


def test_units_stay_multiples_where_the_budget_is_used_up():
    slot = Slot(("a",), (100, 40), (100, 40), (0.0, 1.0))
    assert fill_budget([slot], (1,), 75, [priced((100, 96, 64, 40, 32), 1)]) == [64]


def test_what_is_left_is_used_up_where_units_do_not_all_cost_the_same():
    slot, costs = Slot(("a",), (8, 2), (100, 10), (0.0, 1.0)), {8: 100, 7: 50, 6: 45, 5: 40, 4: 12, 3: 11, 2: 10}
    assert [fill_budget([slot], (1,), limit, [costs]) for limit in (99, 49, 39, 11, 10)] == [[7], [6], [4], [3], [2]]


def test_widths_that_just_fit_next_to_each_number_of_heads():
    found = sizes_at_limit([(4, 3, 2, 1), (64, 32)], [priced(range(4, 0, -1), 10), priced(range(64, 0, -8), 1)], 60)
    assert found == {1: {16, 24, 40, 48}}
    assert sizes_at_limit([range(20, 0, -1)] * 3, [priced(range(20, 0, -1), each) for each in (10, 10, 1)], 60) == {}


def test_places_that_take_one_level_add_up():
    both = join_slots([Slot(("a",), (4, 1), (8, 2), (0.0, 0.1)), Slot(("b",), (4, 1), (12, 3), (0.0, 0.2))])
    assert (both.names, both.costs) == (("a", "b"), (20, 5))
    assert both.losses == pytest.approx((0.0, 0.3))
