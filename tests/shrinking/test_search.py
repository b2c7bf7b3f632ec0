"""Evolution within a budget, on losses that do not add up."""

import random

from billhook.shrinking.knapsack import Slot, cost, evolve, mutate

SLOTS = [Slot((f"place {n}",), (4, 3, 2, 1), (40, 30, 20, 10), (0.0, 1.0, 2.0, 3.0)) for n in range(6)]
LIMIT = 150
START = (0, 0, 0, 3, 3, 3)


def test_a_mutation_keeps_the_budget_and_leaves_nothing_of_it():
    chance = random.Random(0)
    found = {mutate(SLOTS, START, LIMIT, chance) for _ in range(200)} - {None}
    assert len(found) > 20
    assert all(cost(SLOTS, levels) == LIMIT for levels in found)


def test_none_where_nothing_else_can_give():
    assert mutate(SLOTS[:1], (3,), 10, random.Random(0)) is None


def measure(levels):
    """Two places that lose much when both are small, which no sum over places says."""
    return sum(levels) + 10 * (levels[3] == levels[4] == 3) + 5 * (levels[5] == 3)


def search(slots, start, limit, measure, generations, seed=0):
    return evolve(start, lambda levels, chance: mutate(slots, levels, limit, chance), measure, generations, 8, seed)


def test_it_finds_what_sums_do_not_say_and_is_decided_by_its_seed():
    found = search(SLOTS, [START], LIMIT, measure, 12)
    assert found == search(SLOTS, [START], LIMIT, measure, 12)
    assert found != search(SLOTS, [START], LIMIT, measure, 12, seed=1)
    assert min(found.values()) == 9 < found[START]
    assert all(cost(SLOTS, levels) <= LIMIT for levels in found)
    assert search(SLOTS, [START, START], LIMIT, measure, 0) == {START: measure(START)}


def test_it_ends_where_there_is_nothing_new():
    assert len(search(SLOTS[:2], [(0, 3)], 50, measure_two, 50)) <= 4


def measure_two(levels):
    return abs(levels[0] - levels[1])
