"""SparseGPT against optimal brain surgery written out, and what it does where that has no solution."""

import pytest
import torch

from billhook.engine.statistics import InputGram
from billhook.sparsity.criteria import Magnitude, Wanda
from billhook.sparsity.masks import pruned_count
from billhook.sparsity.sparsegpt import SparseGPT, inverse_factor
from kit.sparsity import IN, OUT, make_inputs, seen, stable_sort_layer, stable_sort_rows


def obs(weight, products, sparsity, kept, block_size, damping=0.01):
    """SparseGPT as the paper derives it, in float64: each column in turn, with the inverse Hessian of those not settled yet."""
    weight, hessian = weight.double().clone(), products.double().clone()
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0
    mean = hessian.diagonal()[~dead].mean()
    hessian.diagonal()[dead] = mean
    hessian += damping * mean * torch.eye(len(hessian), dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(len(hessian))]
    variances = torch.stack([inverse[0, 0] for inverse in inverses])
    keep = torch.ones(weight.shape, dtype=torch.bool)
    for j in range(len(hessian)):
        if kept is None and j % block_size == 0:
            part = slice(j, j + block_size)
            losses = weight[:, part] ** 2 / variances[part]
            keep[:, part] = stable_sort_layer(losses, pruned_count(losses.numel(), sparsity))
        if kept is not None and j % kept[1] == 0:
            part = slice(j, j + kept[1])
            keep[:, part] = stable_sort_rows(weight[:, part] ** 2 / variances[part], kept[1] - kept[0])
        for i in range(len(weight)):
            if not keep[i, j]:
                weight[i, j:] -= weight[i, j] / inverses[j][0, 0] * inverses[j][0]
                weight[i, j] = 0
    return weight, keep


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, "unstructured"), (0.7, "unstructured"), (None, "2:4"), (None, "1:4")])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("block_size", [16, 20, 128])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(sparsity, pattern, dead, block_size):
    weight, inputs = torch.randn(10, 48), make_inputs(48)
    if dead:
        inputs[:, [1, 2, 30]] = 0
    statistics = seen(SparseGPT(), inputs)
    kept = None if pattern == "unstructured" else tuple(int(number) for number in pattern.split(":"))
    pruned, keep = SparseGPT(block_size=block_size).prune(weight, statistics, sparsity, pattern)
    expected, mask = obs(weight, statistics.products, sparsity, kept, block_size)
    assert keep.equal(mask)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)


def test_sparsegpt_makes_up_for_what_it_prunes():
    weight, inputs = torch.randn(OUT, IN), make_inputs(tokens=1000)
    errors = {}
    for criterion in (SparseGPT(), Wanda(), Magnitude()):
        pruned, _ = criterion.prune(weight, seen(criterion, inputs), 0.6)
        errors[type(criterion)] = float((inputs @ (pruned - weight).T).norm())
    assert errors[SparseGPT] < 0.95 * errors[Wanda] < errors[Magnitude]


def test_sparsegpt_raises_its_damping_where_it_must():
    statistics = InputGram(2)
    statistics.products.copy_(torch.tensor([[1.0, 1.05], [1.05, 1.0]]))
    statistics.tokens.fill_(2)
    with pytest.warns(UserWarning, match="not positive definite: damping was raised from 0.01 to 0.1"):
        pruned, _ = SparseGPT().prune(torch.ones(3, 2), statistics, 0.5)
    assert torch.isfinite(pruned).all()
    statistics.products.copy_(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))
    with pytest.raises(ValueError, match="not positive definite even with damping=1.0"):
        SparseGPT().prune(torch.ones(3, 2), statistics, 0.5)


@pytest.mark.parametrize("width", [1, 128, 129, 400])
def test_the_factor_is_that_of_the_inverse(width):
    torch.manual_seed(0)
    x = torch.randn(2 * width, width)
    products = x.t() @ x
    factor = inverse_factor(products, 0.01)
    assert torch.equal(factor, factor.triu())
    damped = products.double() + 0.01 * products.diagonal().mean() * torch.eye(width)
    torch.testing.assert_close((factor.t() @ factor).double(), damped.inverse(), rtol=1e-3, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inverse_factor(products, 0.01), factor)
