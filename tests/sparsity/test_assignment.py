"""The linear sum assignment, against all assignments there are."""

import itertools

import numpy as np
import pytest

from billhook.sparsity.channel_order import assign


@pytest.mark.parametrize("size", range(1, 7))
@pytest.mark.parametrize("kind", ["any", "ties", "negative"])
def test_it_is_the_best_of_all(size, kind):
    rng = np.random.default_rng(size)
    for _ in range(10):
        gains = rng.integers(0, 3, (size, size)).astype(float) if kind == "ties" else rng.random((size, size))
        gains -= 0.7 if kind == "negative" else 0
        found = assign(gains)
        best = max(gains[range(size), order].sum() for order in map(list, itertools.permutations(range(size))))
        assert sorted(found) == list(range(size))
        assert gains[range(size), found].sum() == pytest.approx(best)


def test_no_two_rows_of_a_larger_one_would_gain_by_an_exchange():
    gains = np.random.default_rng(0).random((60, 60))
    found = assign(gains)
    given = gains[:, found]  # column j: what each row would gain by that of row j
    assert sorted(found) == list(range(60))
    assert (given + given.T <= given.diagonal() + given.diagonal()[:, None] + 1e-12).all()


def test_an_order_that_is_known_is_found_again():
    order = np.random.default_rng(1).permutation(40)
    assert np.array_equal(assign(np.eye(40)[order]), order)


def test_nothing():
    assert len(assign(np.zeros((0, 0)))) == 0
