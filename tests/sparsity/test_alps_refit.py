"""The refit of what a mask keeps, against the least-squares solution of every row in float64."""

import numpy as np
import pytest
import torch

from billhook import Magnitude, SparseGPT, Wanda
from billhook.criteria import Refit
from billhook.engine.statistics import InputGram, InputNorms


def problem(rows=12, columns=40, tokens=300, dead=0):
    torch.manual_seed(0)
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns) / columns**0.5
    inputs = torch.randn(tokens, columns) @ mix
    inputs[:, :dead] = 0
    statistics = InputGram(columns)
    statistics.add(inputs)
    return torch.randn(rows, columns), inputs, statistics


def exactly(weight, keep, products, damping):
    """Row by row: (H on the support)^-1 (H W on the support)."""
    h = products.double().numpy()
    h = h + damping * h.diagonal().mean() * np.eye(len(h))
    solution = np.zeros(weight.shape)
    for row, kept in enumerate(keep.numpy()):
        solution[row, kept] = np.linalg.solve(h[np.ix_(kept, kept)], (h @ weight[row].double().numpy())[kept])
    return torch.from_numpy(solution).float()


def error(weight, solution, inputs):
    return float(((weight - solution) @ inputs.t()).norm())


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_enough_steps_reach_the_least_squares_solution(damping):
    weight, _, statistics = problem()
    found, keep = Refit(steps=60, damping=damping).prune(weight, statistics, 0.5)
    torch.testing.assert_close(found, exactly(weight, keep, statistics.products, damping), atol=2e-4, rtol=1e-3)
    assert torch.equal(found != 0, keep)


def test_every_step_lowers_the_error():
    weight, inputs, statistics = problem()
    errors = [error(weight, Wanda().prune(weight, statistics, 0.5)[0], inputs)]
    errors += [error(weight, Refit(steps=steps, damping=0).prune(weight, statistics, 0.5)[0], inputs) for steps in range(1, 8)]
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("inner", [Wanda(), Magnitude(), SparseGPT()])
@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, "unstructured"), (None, "2:4")])
def test_the_mask_is_the_other_criterions_and_the_outputs_are_closer(inner, sparsity, pattern):
    weight, inputs, statistics = problem()
    before, mask = inner.prune(weight, statistics, sparsity, pattern)
    after, keep = Refit(inner, steps=20).prune(weight, statistics, sparsity, pattern)
    assert torch.equal(keep, mask)
    assert torch.equal(after.masked_fill(keep, 0), torch.zeros_like(after))
    assert error(weight, after, inputs) < error(weight, before, inputs)


def test_dead_inputs_and_weights_of_low_precision():
    weight, _, statistics = problem(dead=8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        new, keep = Refit(Wanda(compares="layer")).prune(weight.to(dtype), statistics, 0.1)
        assert new.dtype == dtype
        assert new.isfinite().all()
        assert (~keep).sum() == int(0.1 * weight.numel())
    empty = InputGram(40)
    empty.add(torch.zeros(5, 40))
    new, keep = Refit().prune(weight, empty, 0.5)
    assert torch.equal(new, weight * keep)


def test_refusals_name_what_came():
    with pytest.raises(ValueError, match="steps=0 must be a whole number"):
        Refit(steps=0)
    with pytest.raises(ValueError, match="damping=-1 must be a number of at least 0"):
        Refit(damping=-1)
    with pytest.raises(ValueError, match="Refit needs InputGram .* got InputNorms"):
        Refit().prune(torch.ones(2, 4), InputNorms(4), 0.5)
    assert repr(Refit()) == "Refit(criterion=Wanda(compares='row'), steps=10, damping=0.01)"
    assert Refit(Magnitude()).compares == "layer"
