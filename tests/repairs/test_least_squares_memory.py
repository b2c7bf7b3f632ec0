"""How many matrices are in memory at once where least squares are solved, counted by the bytes of live tensors."""

import pytest
import torch

from billhook.cli import streamed
from billhook.repairs.least_squares import refit_linear
from billhook.repairs.residuals import ResidualStatistics
from kit.alive import Alive
from kit.families import llama

pytestmark = pytest.mark.nightly
WIDTH, ROWS = 768, 128
MATRIX = 8 * WIDTH**2
OWED = 8 * ROWS * WIDTH


def inputs():
    torch.manual_seed(0)
    return torch.randn(2 * WIDTH, WIDTH)


def seen(x, owed):
    parts = [ResidualStatistics(ROWS, WIDTH) for _ in range(2)]
    for part, some, due in zip(parts, x.split(WIDTH), owed.split(WIDTH), strict=True):
        part.add(some, due)
    return parts


@pytest.mark.parametrize("bias", [None, torch.zeros(ROWS)], ids=["without a bias", "with one"])
def test_a_refit_takes_one_matrix_beside_the_moments(bias):
    x, weight = inputs(), torch.randn(ROWS, WIDTH)
    parts = seen(x, torch.randn(len(x), ROWS))
    with Alive() as alive:
        refit_linear(weight, bias, parts, [0.01, 0.1])
    assert MATRIX <= alive.most < MATRIX + 3 * OWED


@pytest.mark.parametrize("zeros", [0.0, 0.5], ids=["dense", "pruned"])
def test_a_limit_of_memory_reckons_what_a_refit_takes(zeros):
    x, true, support = inputs(), torch.randn(WIDTH, ROWS), torch.rand(ROWS, WIDTH) >= zeros
    weight = torch.randn(ROWS, WIDTH) * support
    model = llama(hidden_size=ROWS, intermediate_size=WIDTH)
    name = "model.layers.0.mlp.down_proj"
    solved, sums = streamed.refit_bytes(model, 2, {name: WIDTH})
    parts = seen(x, x @ true)
    assert sum(own.nbytes for part in parts for own in part.tensors()) <= 1.01 * sums
    with Alive() as alive:
        left = weight.clone()  # what is left of a weight is a copy
        refit_linear(left, None, parts, [0.01, 0.1], support=support if zeros else None)
    assert solved / 3 < alive.most <= solved
