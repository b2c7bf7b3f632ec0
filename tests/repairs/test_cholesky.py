"""Least squares with a ridge by factors in panels, against dense solutions."""

import math

import pytest
import torch

from billhook.repairs import triangle
from billhook.repairs.cholesky import solver
from billhook.repairs.triangle import Triangle


def drawn(size, tokens=60):
    torch.manual_seed(0)
    x = torch.randn(tokens, size, dtype=torch.float64)
    return x.t() @ x / tokens, torch.randn(5, size, dtype=torch.float64)


@pytest.mark.parametrize(("size", "rows"), [(1, 7), (6, 7), (7, 7), (8, 7), (23, 7), (23, 1)])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_it_solves_as_a_dense_solution_does(monkeypatch, size, rows, ridge):
    monkeypatch.setattr(triangle, "ROWS", rows)
    inner, owed = drawn(size)
    given = owed.clone()
    solve, exists = solver(Triangle.of(inner), ridge)
    found = solve(given)
    assert exists
    assert found is given
    torch.testing.assert_close(found @ (inner + ridge * inner.diagonal().diag()), owed)


def test_it_solves_some_rows_as_all(monkeypatch):
    monkeypatch.setattr(triangle, "ROWS", 7)
    inner, owed = drawn(23)
    solve, _ = solver(Triangle.of(inner), 0.1)
    torch.testing.assert_close(torch.cat([solve(some.clone()) for some in owed.split(2)]), solve(owed.clone()))


@pytest.mark.parametrize("rows", [7, 64])
def test_what_has_no_inverse_is_told(monkeypatch, rows):
    monkeypatch.setattr(triangle, "ROWS", rows)
    inner, owed = drawn(23)
    inner -= 1.01 * torch.linalg.eigvalsh(inner)[9] * torch.eye(23)
    solve, exists = solver(Triangle.of(inner), 0.0)
    assert not exists
    assert solve(owed).isnan().all()


@pytest.mark.parametrize(("inner", "ridge"), [(torch.eye(3, dtype=torch.float64), math.inf), (torch.zeros(3, 3).double(), 0.1)])
def test_an_infinite_ridge_leaves_everything_and_so_do_inputs_that_are_zero(inner, ridge):
    solve, exists = solver(Triangle.of(inner), ridge)
    assert exists
    assert not solve(torch.ones(2, 3, dtype=torch.float64)).any()
