"""Ranks, in threads, that sum, take what one decides, and number their batches as one process has them."""

import pytest
import torch

from billhook.engine import comm as module
from billhook.engine.comm import SINGLE_PROCESS, Comm
from kit.ranks import Ranks

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
    for rank, numbers in enumerate(places):
        assert Comm(rank=rank, size=len(counts), shared=shared).batch_numbers(counts) == (total, numbers)
    assert SINGLE_PROCESS.batch_numbers(counts[:1]) == (counts[0], list(range(counts[0])))


def summed(sent):
    def sums(tensor):
        sent.append(tensor.numel() * tensor.element_size())
        return tensor.mul_(2)

    return Comm(sums, size=2)


@pytest.mark.parametrize("lists", [[[7, 8], [], [9]], [[], []], [list(range(1000)), [1], ["a" * 3000]]])
def test_every_rank_gathers_what_all_have(lists):
    assert Ranks(len(lists)).run(lambda rank, comm: comm.gather(lists[rank])) == [lists] * len(lists)
    assert SINGLE_PROCESS.gather(lists[0]) == lists[:1]


@pytest.mark.parametrize("made", [None, 3.5, {"a": torch.rand(2, 3)}, torch.rand(1000)])
def test_all_get_what_the_first_rank_decides(made):
    """What others would have made is not asked for."""
    for found in [SINGLE_PROCESS.decide(lambda: made), *Ranks(3).run(lambda rank, comm: comm.decide(lambda: [made][rank]))]:
        torch.testing.assert_close(found, made, rtol=0, atol=0)


def test_ranks_that_know_only_how_to_sum_number_themselves(monkeypatch):
    draws = iter([3, 3, 3, 9, 4, 3])  # at first all alike, then none
    monkeypatch.setattr(module.secrets, "randbelow", lambda _: next(draws))

    def numbered(_, comm):
        found = Comm.of(lambda tensor: comm(tensor))
        return found.rank, found.size

    assert sorted(Ranks(3).run(numbered)) == [(0, 3), (1, 3), (2, 3)]


def test_ranks_of_a_fit_are_those_of_the_fit():
    given = Comm(rank=1, size=2)
    assert Comm.of(given) is given


@pytest.mark.parametrize(("reduce", "why"), [
    (lambda tensor: None, "reduce must return the summed tensor, but returned None"),
    (lambda tensor: tensor.div_(2, rounding_mode="floor"), "reduce must sum over ranks, but turned 1 on this rank into 0"),
])  # fmt: skip
def test_a_function_that_does_not_sum_is_refused(reduce, why):
    with pytest.raises(ValueError, match=why):
        Comm.of(reduce)
