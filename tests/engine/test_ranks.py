"""Batches of ranks are numbered as one process has them."""

import pytest
from torch import Tensor

from billhook.engine.ranks import Ranks, dealt, lists_of
from kit import ranks as threads

DEALT = {
    "as many": ([2, 2], False, (4, [[0, 2], [1, 3]])),
    "one more": ([3, 2], False, (5, [[0, 2, 4], [1, 3]])),
    "one has none": ([0, 3], False, (3, [[], [0, 1, 2]])),
    "none has any": ([0, 0], False, (0, [[], []])),
    "shared": ([2, 2], True, (2, [[0, 1], [0, 1]])),
    "shared, the last by one alone": ([2, 1], True, (2, [[0, 1], [0]])),
    "shared, one of each": ([1, 1], True, (2, [[0], [1]])),
}


@pytest.mark.parametrize("name", DEALT)
def test_batches_are_numbered(name):
    counts, shared, (total, places) = DEALT[name]
    for rank, own in enumerate(places):
        assert dealt(counts, Ranks(rank, len(counts), Tensor.add_, shared)) == (total, own)
    assert dealt(counts[:1], None) == dealt(counts[:1], Tensor.add_) == (counts[0], list(range(counts[0])))


@pytest.mark.parametrize("lists", [[[7, 8], [], [9]], [[], []]])
def test_every_rank_lists_what_all_have(lists):
    assert threads.Ranks(len(lists)).run(lambda rank, reduce: lists_of(lists[rank], reduce)) == [lists] * len(lists)
    assert lists_of(lists[0], None) == lists_of(lists[0], Tensor.add_) == lists[:1]
