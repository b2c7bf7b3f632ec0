"""Sums over tokens against float64."""

import pytest
import torch

from billhook.engine.statistics import InputGram, InputNorms

KINDS = [InputNorms, InputGram]


def expected(kind, tokens):
    """The sums in float64 of tokens `[tokens, in_features]`."""
    tokens = tokens.double()
    return tokens.square().sum(0) if kind is InputNorms else tokens.T @ tokens


def sums(statistics):
    return statistics.tensors()[0]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_in_float32_whatever_the_dtype(kind, dtype, monkeypatch):
    monkeypatch.setattr(kind, "chunk", (64, 64))  # five tokens at a time
    inputs = torch.randn(3, 7, 12).to(dtype)
    statistics = kind(12)
    statistics.add(inputs)
    torch.testing.assert_close(sums(statistics).double(), expected(kind, inputs.view(-1, 12)), rtol=1e-5, atol=1e-5)
    assert sums(statistics).dtype == torch.float32
    assert statistics.tokens == 21


def test_autocast_changes_nothing(kind):
    inputs, plain, cast = torch.randn(50, 12), kind(12), kind(12)
    plain.add(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast.add(inputs)
    assert sums(cast).equal(sums(plain))


def test_padding_does_not_count_whatever_it_holds(kind, monkeypatch):
    monkeypatch.setattr(kind, "chunk", (40, 40))
    inputs, keep = torch.randn(2, 9, 8), torch.rand(2, 9) > 0.5
    padded, only = kind(8), kind(8)
    padded.add(inputs.masked_fill(~keep[..., None], torch.nan), keep)
    only.add(inputs[keep])
    torch.testing.assert_close(sums(padded), sums(only))
    assert padded.tokens == only.tokens == keep.sum()
    padded.check()


def test_many_additions_lose_little(kind):
    statistics, inputs = kind(2), torch.full((300, 2), 0.1)
    for _ in range(2000):
        statistics.add(inputs)
    assert torch.allclose(sums(statistics).double(), torch.tensor(600_000 * 0.1**2, dtype=torch.float64), rtol=1e-4)


def test_inputs_are_left_as_they_are(kind):
    inputs = torch.randn(2, 3, 4, requires_grad=True)
    before = inputs.detach().clone()
    statistics = kind(4)
    statistics.add(inputs, torch.tensor([[True, False, True], [False, False, False]]))
    assert inputs.equal(before)
    assert not sums(statistics).requires_grad


def broken(kind, value, feature):
    inputs = torch.ones(4, 3)
    inputs[2, feature] = value
    statistics = kind(3)
    statistics.add(inputs)
    return statistics


def test_squares_that_all_underflow_are_refused(kind):
    statistics = kind(3)
    statistics.add(torch.full((2, 4, 3), 1e-25), keep=torch.arange(4).lt(3).expand(2, 4))
    with pytest.raises(ValueError, match=r"inputs are 1e-25 at most, so that their squares underflow in float32"):
        statistics.check()
    statistics.add(torch.ones(1, 3))
    statistics.check()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_what_is_not_finite_is_named(kind, value):
    with pytest.raises(ValueError, match=r"NaN, infinite or overflowing inputs in 1 of 3 input features, the first in feature 1"):
        broken(kind, value, 1).check()


@pytest.mark.parametrize(("act", "message"), [
    (lambda s: s.check(), "no inputs were seen: the layer did not run, or every token was padding"),
    (lambda s: s.add(torch.ones(2, 5)), r"inputs of shape \[2, 5\] must end with 4 input features"),
    (
        lambda s: s.add(torch.ones(2, 4), torch.ones(2)),
        r"keep must be bool of shape \[2\] .* got torch.float32 of shape \[2\]",
    ),
    (
        lambda s: s.add(torch.ones(2, 4), torch.ones(2, 1, dtype=torch.bool)),
        r"keep must be bool .* got torch.bool of shape \[2, 1\]",
    ),
])  # fmt: skip
def test_what_is_refused(kind, act, message):
    with pytest.raises(ValueError, match=message):
        act(kind(4))
