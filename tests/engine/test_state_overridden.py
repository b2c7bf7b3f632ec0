"""Attributes that are others for a while."""

import pytest
from torch import nn

from billhook.engine.state import overridden


class Own:
    inherited = 1

    def __init__(self):
        self.mine = 2


def test_an_error_changes_nothing_about_that():
    one = Own()

    def fail():
        with overridden(one, mine=3, new=4):
            del one.new
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert vars(one) == {"mine": 2}


def test_blocks_that_end_in_another_order_than_they_began():
    model = nn.Linear(2, 2)
    model.own = 0
    first, second, third = (overridden(model, own=number, forward=number) for number in (1, 2, 3))
    for block in (first, second, third):
        block.__enter__()
    second.__exit__(None, None, None)
    assert (model.own, model.forward) == (3, 3)
    third.__exit__(None, None, None)
    assert (model.own, model.forward) == (1, 1)
    first.__exit__(None, None, None)
    assert model.own == 0
    assert vars(model).keys() - vars(nn.Linear(2, 2)).keys() == {"own"}
