"""Ranks divide the ridges that are tried and the outputs that are solved for, and come to what each comes to that does all."""

import math
import threading
from collections import Counter

import pytest
import torch

from billhook.repairs import least_squares
from billhook.repairs.least_squares import refit_linear, solve_ridge
from billhook.repairs.residuals import ResidualStatistics
from kit.ranks import Ranks

RIDGES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def parts_of(number, width=12, rows=6):
    torch.manual_seed(0)
    found = []
    for part in range(number):
        moments = ResidualStatistics(rows, width)
        x = torch.randn(40, width) @ torch.randn(width, width) + part
        moments.add(x, x @ torch.randn(width, rows) / 9)
        found.append(moments)
    return found


@pytest.fixture
def tried(monkeypatch):
    """How many finite ridges each thread has tried."""
    found, solve = Counter(), least_squares.solve_ridge

    def counted(parts, centred, ridge):
        found[threading.get_ident()] += ridge < math.inf
        return solve(parts, centred, ridge)

    monkeypatch.setattr(least_squares, "solve_ridge", counted)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_each_tries_its_share(ranks, biased, tried):
    parts, weight, bias = parts_of(3), torch.randn(6, 12), torch.randn(6) if biased else None
    alone = refit_linear(weight, bias, parts, RIDGES)
    assert tried.pop(threading.get_ident()) == len(RIDGES)
    for own in Ranks(ranks).run(lambda _, reduce: refit_linear(weight, bias, parts, RIDGES, reduce)):
        assert torch.equal(own[0], alone[0])
        assert bias is None or torch.equal(own[1], alone[1])
    assert set(tried.values()) == {len(RIDGES) // ranks}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_each_solves_for_its_outputs(ranks, pruned, biased):
    parts, weight, bias = parts_of(2, rows=8), torch.randn(8, 12), torch.randn(8) if biased else None
    support = torch.rand(8, 12) < 0.7 if pruned else None
    given = weight * (1 if support is None else support), bias, parts, RIDGES
    alone = refit_linear(*given, support=support)
    found = Ranks(ranks).run(lambda _, reduce: refit_linear(*given, reduce, support))
    for own in found:
        torch.testing.assert_close(own[0], alone[0])
        assert torch.equal(own[0], found[0][0])
        if biased:
            torch.testing.assert_close(own[1], alone[1])
            assert torch.equal(own[1], found[0][1])


def test_ranks_have_rows_of_their_own_when_there_are_many():
    parts, weight = parts_of(2, rows=2100), torch.randn(2100, 12)
    given = weight, None, parts, RIDGES
    alone = refit_linear(*given)
    for own in Ranks(2).run(lambda _, reduce: refit_linear(*given, reduce)):
        torch.testing.assert_close(own[0], alone[0])


def test_a_ridge_without_a_solution_has_none_on_any_rank():
    parts, weight = parts_of(2), torch.randn(6, 12)
    for part in parts:  # which rounding has made indefinite
        part.products -= 0.2 * torch.diag(part.products.diagonal())
    solved = [bool(solve_ridge(parts[:1], False, ridge).isfinite().all()) for ridge in RIDGES]
    assert 0 < sum(solved) < len(RIDGES)
    alone = refit_linear(weight, None, parts, RIDGES)
    for own in Ranks(3).run(lambda _, reduce: refit_linear(weight, None, parts, RIDGES, reduce)):
        assert torch.equal(own[0], alone[0])
