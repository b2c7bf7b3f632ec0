"""Masks against a full stable sort, in every comparison group."""

from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.sparsity import masks
from billhook.sparsity.masks import (
    RemovalThreshold,
    check_amount,
    check_width,
    keep_layer,
    keep_n_of_m,
    keep_rows,
    parse_pattern,
    pruned_count,
    sparsity_of,
    where_kept,
)

SIZES = st.sampled_from([60, 2**18])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 6), (5, 16), (16, 32)]


def keep_global(scores, sparsity):
    """The keep-masks of matrices that compete, one after the other."""
    lowest = RemovalThreshold.of(lambda: scores, pruned_count(sum(matrix.numel() for matrix in scores), sparsity))
    return [lowest.keep(matrix) for matrix in scores]


def by_sort(scores, count):
    """The keep-mask of a full stable ascending sort of each row, as the papers have it."""
    order = np.argsort(scores.detach().cpu().float().numpy(), axis=1, kind="stable")
    keep = np.ones(order.shape, dtype=bool)
    np.put_along_axis(keep, order[:, :count], values=False, axis=1)
    return torch.from_numpy(keep)


@st.composite
def matrices(draw, multiple=1):
    """Matrices with many ties, infinities and both zeros, some transposed in memory."""
    rows, columns, seed = draw(st.integers(1, 9)), draw(st.integers(1, 40 // multiple)), draw(st.integers(0, 2**31))
    columns *= multiple
    generator = np.random.default_rng(seed)
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    values = generator.integers(-levels, levels, (rows, columns)).astype(np.float32) * draw(st.sampled_from([1.0, 1e-3, 1e-42]))
    extremes = draw(st.lists(st.sampled_from([np.inf, -np.inf, -0.0, 0.0]), max_size=4))
    for extreme in extremes:
        values[generator.integers(rows), generator.integers(columns)] = extreme
    scores = torch.from_numpy(values).to(draw(st.sampled_from(DTYPES)))
    return scores.t().contiguous().t() if draw(st.booleans()) else scores


def blocks_of(size):
    """However the blocks fall."""
    return mock.patch.object(masks, "CPU_BLOCK", size)


def on_device():
    """As on an accelerator, where NumPy cannot select."""
    return mock.patch.object(masks, "HOST", "none")


def chosen_there(keep, *given):
    """A mask as it is chosen on an accelerator."""
    with on_device():
        return keep(*given)


@given(scores=matrices(), sparsity=st.floats(0, 0.999), size=SIZES)
@settings(max_examples=50, deadline=None)
def test_rows(scores, sparsity, size):
    expected = by_sort(scores, pruned_count(scores.shape[1], sparsity))
    with blocks_of(size):
        assert keep_rows(scores, sparsity).equal(expected)
        assert chosen_there(keep_rows, scores, sparsity).equal(expected)


@given(scores=matrices(), sparsity=st.floats(0, 0.999), size=SIZES)
@settings(max_examples=50, deadline=None)
def test_layer(scores, sparsity, size):
    expected = by_sort(scores.reshape(1, -1), pruned_count(scores.numel(), sparsity)).view(scores.shape)
    with blocks_of(size):
        assert keep_layer(scores, sparsity).equal(expected)
        assert chosen_there(keep_layer, scores, sparsity).equal(expected)


@given(scores=st.lists(matrices(), min_size=1, max_size=4), sparsity=st.floats(0, 0.999), size=SIZES)
@settings(max_examples=50, deadline=None)
def test_global(scores, sparsity, size):
    flat = torch.cat([s.float().flatten() for s in scores])
    expected = by_sort(flat[None], pruned_count(len(flat), sparsity))[0].split([s.numel() for s in scores])
    with blocks_of(size):
        found = keep_global(scores, sparsity)
    assert all(f.equal(e.view(f.shape)) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_n_of_m(n, m, data):
    scores = data.draw(matrices(multiple=m))
    with blocks_of(data.draw(SIZES)):
        keep = keep_n_of_m(scores, n, m)
        assert chosen_there(keep_n_of_m, scores, n, m).equal(keep)
    assert keep.equal(by_sort(scores.reshape(-1, m), m - n).view(scores.shape))
    assert keep.view(-1, m).sum(1).eq(n).all()


def test_of_equal_scores_the_lower_column_goes():
    assert keep_rows(torch.ones(2, 5), 0.4).tolist() == [[False, False, True, True, True]] * 2
    assert keep_layer(torch.ones(2, 2), 0.75).tolist() == [[False, False], [False, True]]
    assert [k.tolist() for k in keep_global([torch.ones(2), torch.ones(2)], 0.75)] == [[False, False], [False, True]]
    assert keep_n_of_m(torch.zeros(1, 4), 1, 4).tolist() == [[False, False, False, True]]
    assert keep_rows(torch.tensor([[0.0, -0.0, 0.0, -0.0]]), 0.5).tolist() == [[False, False, True, True]]
    assert keep_layer(torch.tensor([[0.0, -0.0, 0.0, -0.0]]), 0.5).tolist() == [[False, False, True, True]]


def test_nothing_of_nothing():
    assert keep_rows(torch.ones(0, 4), 0.5).shape == (0, 4)
    assert keep_layer(torch.ones(4, 0), 0.5).shape == (4, 0)
    assert keep_global([], 0.5) == []
    assert [k.tolist() for k in keep_global([torch.ones(0), torch.ones(2)], 0.5)] == [[], [False, True]]


def test_scores_are_left_as_they_are():
    scores = torch.randn(6, 8, requires_grad=True)
    before = scores.detach().clone()
    for keep in (keep_rows(scores, 0.5), keep_layer(scores, 0.5), keep_n_of_m(scores, 2, 4), keep_n_of_m(scores, 4, 8)):
        assert not keep.requires_grad
    assert scores.equal(before)


@given(size=st.integers(1, 10**9), hundredths=st.integers(0, 99))
@settings(deadline=None)
def test_counts_are_those_of_exact_fractions(size, hundredths):
    assert pruned_count(size, hundredths / 100) == size * hundredths // 100


@given(size=st.integers(1, 10**4), m=st.integers(2, 64), data=st.data())
@settings(deadline=None)
def test_counts_of_patterns_are_whole(size, m, data):
    n = data.draw(st.integers(1, m - 1))
    assert pruned_count(size * m, check_amount(None, f"{n}:{m}")) == size * (m - n)


@given(size=st.integers(1, 10**9), sparsity=st.floats(0, 1, exclude_max=True))
@settings(deadline=None)
def test_something_is_always_left(size, sparsity):
    assert 0 <= pruned_count(size, sparsity) < size


def test_zero_takes_the_place_of_all_that_is_not_kept():
    values, keep = torch.tensor([1.0, -2.0, torch.nan, -0.0]).bfloat16(), torch.tensor([True, False, False, False])
    for way in (nullcontext(), on_device()):
        with way:
            assert where_kept(values, keep).view(torch.int16).tolist() == [0x3F80, 0, 0, 0]


def test_sparsity_of():
    assert sparsity_of([torch.tensor([[0.0, 2.0]]), torch.tensor([0.0, -0.0])]) == 0.75
    assert sparsity_of([keep_rows(torch.randn(4, 8), 0.25)]) == 0.25
    assert sparsity_of([]) == 0.0
    assert sparsity_of([torch.ones(0)]) == 0.0


def test_amounts():
    assert (parse_pattern("unstructured"), parse_pattern("2:4"), parse_pattern("1:16")) == (None, (2, 4), (1, 16))
    amounts = [check_amount(0), check_amount(0.5, "2:4"), check_amount(None, "1:4"), check_amount(0.333, "2:3")]
    assert amounts == [0, 0.5, 0.75, 1 / 3]


@pytest.mark.parametrize(("make", "message"), [
    (lambda: parse_pattern("4:2"), "pattern='4:2' must be 'unstructured' or 'N:M' with 1 <= N < M"),
    (lambda: parse_pattern("4:4"), "pattern='4:4' must be"),
    (lambda: parse_pattern("structured"), "pattern='structured' must be"),
    (lambda: check_amount(None), "sparsity=None requires an N:M pattern. Pass a fraction"),
    (lambda: check_amount(1.0), r"sparsity=1.0 must be a fraction of the weights in \[0, 1\)"),
    (lambda: check_amount(float("nan")), "sparsity=nan must be"),
    (lambda: check_amount(True), "sparsity=True must be"),
    (lambda: check_amount(0.6, "2:4"), "sparsity=0.6 contradicts pattern='2:4', a sparsity of 0.5"),
    (lambda: keep_n_of_m(torch.ones(2, 10), 2, 4), "pattern='2:4' needs a multiple of 4 input features, got 10"),
    (lambda: check_width(10, "2"), "pattern='2' must be"),
    (lambda: keep_rows(torch.tensor([[1.0, 2.0], [torch.nan, 1.0]]), 0.5), "a score is NaN .the first in row 1."),
    (lambda: keep_layer(torch.tensor([1.0, torch.nan]), 0.5), "a score is NaN"),
    (lambda: keep_global([torch.ones(2), torch.full((1, 2), torch.nan)], 0.5), "a score is NaN"),
    (lambda: keep_n_of_m(torch.full((1, 4), torch.nan), 2, 4), "a score is NaN"),
])  # fmt: skip
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
