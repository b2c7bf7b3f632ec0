import copy
import json

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook.model.repeat_kv import (
    RepeatedHeadsConv1D,
    RepeatedHeadsLinear,
    RepeatLayout,
    find_repeat_layout,
    repeat_layout_of,
    set_repeat_layout,
)

HANDING = RepeatLayout(2, ((0, 2, 1, 3), (6, 1, 2, 3)))  # two queries, and one KV head of width 3, by head


def test_what_is_handed_out():
    stored = torch.arange(9.0)
    assert HANDING.repeat(stored).tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5, 6, 7, 8]
    assert HANDING.index().tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5, 6, 7, 8]
    assert (HANDING.stored, HANDING.returned, HANDING.heads) == (9, 12, 1)
    assert HANDING.repeat(stored.expand(2, 5, 9)).shape == (2, 5, 12)
    assert torch.equal(HANDING.undo_repeat(HANDING.repeat(stored)), stored)


def test_fewer_heads():
    four = RepeatLayout(1, ((0, 4, 1, 2), (8, 4, 2, 2)))
    assert four.pooled(2) == RepeatLayout(1, ((0, 4, 1, 2), (8, 2, 4, 2)))


@pytest.mark.parametrize("linear", [nn.Linear(4, 9), nn.Linear(4, 9, bias=False), Conv1D(9, 4)], ids=str)
def test_a_linear_hands_out_its_outputs_and_is_itself_again(linear):
    kind, inputs = type(linear), torch.randn(3, 4)
    plain = linear(inputs)
    names = [name for name, _ in linear.named_parameters()]
    set_repeat_layout(linear, HANDING)
    assert isinstance(linear, (RepeatedHeadsLinear, RepeatedHeadsConv1D))
    assert isinstance(linear, kind)
    assert repeat_layout_of(linear) == HANDING
    assert torch.equal(linear(inputs), plain[:, HANDING.index()])
    assert torch.equal(copy.deepcopy(linear)(inputs), linear(inputs))
    linear(inputs).sum().backward()
    expected = torch.tensor([1.0] * 6 + [2.0] * 3)  # what is handed out twice has twice the gradient
    gradient = linear.weight.grad.T if kind is Conv1D else linear.weight.grad
    torch.testing.assert_close(gradient, expected[:, None] * inputs.sum(0))
    assert [name for name, _ in linear.named_parameters()] == names
    set_repeat_layout(linear, None)
    assert type(linear) is kind
    assert repeat_layout_of(linear) is None
    assert torch.equal(linear(inputs), plain)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_regular_layout_is_found(blocks):
    """Four heads of width 2: queries, keys and values in so many blocks."""
    keys = [
        (kind, head, place)
        for block in range(blocks)
        for kind in (1, 2, 4)
        for head in range(block * 4 // blocks, (block + 1) * 4 // blocks)
        for place in range(2)
    ]
    handing = find_repeat_layout(keys, [kind > 1 for kind, _, _ in keys], 2)
    assert json.loads(json.dumps(handing.to_list())) == handing.to_list()
    assert handing == RepeatLayout(blocks, ((0, 4, 1, 2), (8, 2, 2, 2), (12, 2, 2, 2)))
    stored = [(1, h, r) for h in range(4) for r in range(2)] + [(k, h, r) for k in (2, 4) for h in range(2) for r in range(2)]
    assert [stored[i] for i in handing.index()] == [(k, h if k == 1 else h // 2, r) for k, h, r in keys]


def test_an_irregular_one_is_not():
    keys = [(2, 1, 0), (2, 0, 0)]
    assert find_repeat_layout(keys, [True, True], 1) is not None  # one head for both, wherever they are
    assert find_repeat_layout([(2, 2, 0), (2, 0, 0), (2, 1, 0), (2, 3, 0)], [True] * 4, 2) is None


def test_plain_data():
    assert RepeatLayout.from_list(HANDING.to_list()) == HANDING


@pytest.mark.parametrize(
    "plain",
    [
        None,
        "text",
        [],
        [1],
        [1, []],
        [0, [[0, 1, 1, 1]]],
        [1, [[0, 1, 1]]],
        [1, [[1, 1, 1, 1]]],
        [1, [[0, 0, 1, 1]]],
        [1, [[0, -1, 1, 1]]],
        [1, [[0, 1.5, 1, 1]]],
        [1, [[0, True, 1, 1]]],
        [1, [[0, 2**40, 1, 1]]],
        [2, [[0, 1, 1, 1]]],
        [1, [[0, 1, 1, 1]] * 9],
    ],
)
def test_other_data_is_refused(plain):
    with pytest.raises(ValueError, match="is not a valid layout of repeated heads"):
        RepeatLayout.from_list(plain)
