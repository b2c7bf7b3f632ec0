import pytest
import torch

from billhook.kv_heads.methods import drawing, std_of
from billhook.kv_heads.pooling import Pooled, first, mean, pooling

POOLED = Pooled(1, (0, 2, 1, 2, 2))


def test_positions_that_share_one_are_pooled():
    tensor = torch.tensor([[1.0, 2, 3, 4, 9], [0, 1, 0, 1, 1]])
    assert POOLED.pool(tensor).tolist() == [[1, 3, 5], [0, 0, 1]]
    assert POOLED.pool(tensor, first).tolist() == [[1, 3, 2], [0, 0, 1]]
    assert POOLED.spread(POOLED.pool(tensor)).tolist() == [[1, 5, 3, 5, 5], [0, 1, 0, 1, 1]]


def test_heads_one_after_the_other_are_the_usual_case():
    tensor = torch.randn(12, 5)
    expected = tensor.view(3, 2, 2, 5).mean(1).reshape(6, 5)
    index = tuple(2 * (place // 4) + place % 2 for place in range(12))
    torch.testing.assert_close(Pooled(0, index).pool(tensor), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype):
    assert POOLED.pool(torch.ones(2, 5, dtype=dtype)).dtype == dtype


def test_second_moments_grow_where_heads_are_pooled():
    change = pooling(POOLED, mean)
    moments = torch.ones(2, 5)
    assert change.state("exp_avg", moments).tolist() == [[1, 1, 1]] * 2
    assert change.state("exp_avg_sq", moments).tolist() == [[1, 1, 9]] * 2
    assert change.state("exp_inf", moments).tolist() == [[1, 1, 3]] * 2


def test_what_is_not_pooled_is_not_drawn():
    change = drawing(POOLED, (2, 3), 0.5, torch.Generator().manual_seed(0))
    new = change.weight(torch.ones(2, 5))
    assert new[:, :2].tolist() == [[1, 1]] * 2
    assert (new[:, 2] != 1).all()
    assert change.state("exp_avg", torch.ones(2, 5)).tolist() == [[1, 1, 0]] * 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({"initializer_range": 0.3}, 0.3), ({"init_std": 0.2}, 0.2), ({"initializer_factor": 2.0}, 1.0), ({}, 0.5)],
)
def test_the_deviation_that_a_config_says(fields, expected):
    assert std_of(type("Config", (), fields)(), (8, 4), 0) == expected
