"""Mutations within a budget."""

import random

from billhook.shrinking.knapsack import Slot, cost, mutate

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
