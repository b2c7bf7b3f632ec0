"""Ridges that are tried on mixtures of many outputs, and short calls that are added together."""

import pytest
import torch

from billhook.repairs.least_squares import choose_ridge, residual_error, solve_ridge
from billhook.repairs.residuals import ResidualStatistics, TokenBuffer

RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)
ROWS, WIDTH = 300, 24


def parts_of(noise, biased=False):
    """Moments of two parts of data that differ by noise."""
    torch.manual_seed(0)
    turn, found = torch.randn(WIDTH, ROWS), []
    for tokens in (30, 400):
        x = torch.randn(tokens, WIDTH) @ torch.randn(WIDTH, WIDTH).tril() + biased
        found.append(ResidualStatistics(ROWS, WIDTH))
        found[-1].add(x, x @ turn / 5 + noise * torch.randn(tokens, ROWS) + biased)
    return found


def error_of(parts, biased, ridge):
    return residual_error(solve_ridge(parts[:1], biased, ridge), parts[:1], parts[1], biased)


def test_few_outputs_stay_as_they_are():
    part, _ = parts_of(1.0)
    assert part.mixed() is part


@pytest.mark.parametrize("biased", [False, True])
def test_mixtures_err_as_all_outputs_do(biased):
    exact = parts_of(1.0, biased)
    mixed = [part.mixed(100) for part in exact]
    assert mixed[0].residual_products.shape == (100, WIDTH)
    for ridge in RIDGES:
        whole, some = (error_of(parts, biased, ridge) for parts in (exact, mixed))
        assert some == pytest.approx(whole, rel=0.25)


def test_mixtures_choose_the_same_ridges():
    chosen = []
    for noise in (0.0, 1.0, 10.0, 100.0):
        parts = parts_of(noise)
        chosen.append(choose_ridge(parts, False, RIDGES))
        assert choose_ridge([part.mixed(100) for part in parts], False, RIDGES) == chosen[-1]
    assert len(set(chosen)) > 2


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("owes", [True, False])
def test_short_calls_are_added_together(weighted, owes):
    torch.manual_seed(0)
    sums, expected = ResidualStatistics(3, 5), ResidualStatistics(3, 5)
    own = TokenBuffer(sums)
    for length in (4, 900, 2, 4001, 1):
        x, d = torch.randn(2, length, 5, dtype=torch.bfloat16), torch.randn(2, length, 3) if owes else None
        keep = torch.rand(2, length) < 0.8 if length % 2 else None
        weights = torch.rand(2, length) if weighted else None
        own.add(x, d, None if keep is None else keep.flatten().nonzero().flatten(), weights)
        expected.add(x, d, keep, weights)
        x.zero_()  # as may happen later in a run
    own.flush()
    own.flush()
    for found, one in zip(sums.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-2)


def test_calls_without_debts_are_not_mixed_with_others():
    sums, expected = ResidualStatistics(3, 5), ResidualStatistics(3, 5)
    own = TokenBuffer(sums)
    for owed in (None, torch.randn(4, 3), None):
        x = torch.randn(4, 5)
        own.add(x, owed, None, None)
        expected.add(x, owed)
    own.flush()
    for found, one in zip(sums.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5)
