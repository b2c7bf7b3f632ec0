"""Ranks divide the ridges that are tried, and come to what each comes to that tries them all."""

import math
import threading
from collections import Counter

import pytest
import torch

from billhook.repairs import least_squares
from billhook.repairs.least_squares import refit_linear
from billhook.repairs.moments import OwedMoments
from kit.ranks import Ranks

RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def parts_of(number, width=12, rows=6):
    torch.manual_seed(0)
    found = []
    for part in range(number):
        moments = OwedMoments(rows, width)
        x = torch.randn(40, width) @ torch.randn(width, width) + part
        moments.add(x, x @ torch.randn(width, rows) / 9)
        found.append(moments)
    return found


@pytest.fixture
def tried(monkeypatch):
    """How many finite ridges each thread has tried."""
    found, error = Counter(), least_squares._error

    def counted(parts, held_out, centred, ridge):
        found[threading.get_ident()] += ridge < math.inf
        return error(parts, held_out, centred, ridge)

    monkeypatch.setattr(least_squares, "_error", counted)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("held_out", [[1], [0, 1, 2]])
@pytest.mark.parametrize("biased", [False, True])
def test_each_tries_its_share(ranks, held_out, biased, tried):
    parts, weight, bias = parts_of(3), torch.randn(6, 12), torch.randn(6) if biased else None
    folds = [([one for place, one in enumerate(parts) if place != number], parts[number]) for number in held_out]
    alone = refit_linear(weight, bias, folds, parts, RIDGES)
    assert tried.pop(threading.get_ident()) == len(RIDGES) * len(held_out)
    for own in Ranks(ranks).run(lambda _, reduce: refit_linear(weight, bias, folds, parts, RIDGES, reduce)):
        assert torch.equal(own[0], alone[0])
        assert bias is None or torch.equal(own[1], alone[1])
    assert set(tried.values()) == {len(RIDGES) * len(held_out) // ranks}


def test_ranks_that_only_sum_try_all(tried):
    parts, weight = parts_of(2), torch.randn(6, 12)
    alone = refit_linear(weight, None, [([parts[0]], parts[1])], parts, RIDGES)
    tried.clear()
    sums = torch.Tensor.clone  # which would be one of the ranks' own, were anything summed
    assert torch.equal(refit_linear(weight, None, [([parts[0]], parts[1])], parts, RIDGES, sums)[0], alone[0])
    assert set(tried.values()) == {len(RIDGES)}


def test_a_ridge_without_a_solution_has_none_on_any_rank():
    parts, weight = parts_of(2), torch.randn(6, 12)
    for part in parts:  # which rounding has made indefinite
        (products,) = part.products.panels
        products -= 0.2 * torch.diag(products.diagonal())
    folds = [([parts[0]], parts[1])]
    solved = [least_squares._error(*folds[0], False, ridge) is not None for ridge in RIDGES]
    assert 0 < sum(solved) < len(RIDGES)
    alone = refit_linear(weight, None, folds, parts, RIDGES)
    for own in Ranks(3).run(lambda _, reduce: refit_linear(weight, None, folds, parts, RIDGES, reduce)):
        assert torch.equal(own[0], alone[0])
