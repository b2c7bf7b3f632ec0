"""Least squares with a ridge, and on a support, against dense solutions."""

import math

import pytest
import torch

from billhook.linalg import cholesky_, conjugate_gradients, damp_, ridge_solver
from kit.alive import Alive


def drawn(size, tokens=60):
    torch.manual_seed(0)
    x = torch.randn(tokens, size, dtype=torch.float64)
    return x.t() @ x / tokens, torch.randn(5, size, dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 6, 23])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_it_solves_as_a_dense_solution_does(size, ridge):
    inner, owed = drawn(size)
    expected, given = owed @ (inner + ridge * inner.diagonal().diag()).inverse(), owed.clone()
    solve, exists = ridge_solver(inner, ridge)
    found = solve(given)
    assert exists
    assert found is given
    torch.testing.assert_close(found, expected)


def test_it_solves_some_rows_as_all():
    inner, owed = drawn(23)
    solve, _ = ridge_solver(inner, 0.1)
    torch.testing.assert_close(torch.cat([solve(some.clone()) for some in owed.split(2)]), solve(owed.clone()))


def test_what_has_no_inverse_is_told():
    inner, owed = drawn(23)
    inner -= 1.01 * torch.linalg.eigvalsh(inner)[9] * torch.eye(23)
    solve, exists = ridge_solver(inner, 0.0)
    assert not exists
    assert solve(owed).isnan().all()


@pytest.mark.parametrize(("inner", "ridge"), [(torch.eye(3, dtype=torch.float64), math.inf), (torch.zeros(3, 3).double(), 0.1)])
def test_an_infinite_ridge_leaves_everything_and_so_do_inputs_that_are_zero(inner, ridge):
    solve, exists = ridge_solver(inner.clone(), ridge)
    assert exists
    assert not solve(torch.ones(2, 3, dtype=torch.float64)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_takes_the_place_of_its_matrix(dtype):
    inner, _ = drawn(40)
    inner = inner.to(dtype)
    memory, before = inner.data_ptr(), inner.clone()
    with Alive() as alive:
        factor, failed = cholesky_(inner)
    assert not failed
    assert factor.data_ptr() == memory
    assert alive.most < inner.nbytes
    torch.testing.assert_close(factor.tril() @ factor.tril().t(), before)


def test_damping_makes_any_moments_positive():
    for h in (torch.zeros(4, 4), torch.ones(4, 4), drawn(4)[0].float()):
        before, mean = h.clone(), h.diagonal().mean()
        assert (damp_(h, 0.1).diagonal() > before.diagonal()).all()
        torch.testing.assert_close(h, before + 0.1 * mean * torch.eye(4))
        assert not cholesky_(h)[1]


@pytest.mark.parametrize("steps", [1, 60])
def test_conjugate_gradients_come_to_least_squares_on_each_rows_support(steps):
    h, weight = drawn(23)
    keep = torch.rand(weight.shape) < 0.5
    start = weight * keep
    found = conjugate_gradients(start.clone(), ((weight - start) @ h).mul_(keep), h, keep, steps)
    error, before = (((weight - v) @ h * (weight - v)).sum(1) for v in (found, start))
    assert (error < before).all()
    assert not found[~keep].any()
    for row, own in enumerate(keep if steps > 1 else ()):
        torch.testing.assert_close(found[row, own], torch.linalg.solve(h[own][:, own], (weight[row] @ h)[own]))
