"""Attributes that are others for a while."""

import pytest
from torch import nn

from billhook.engine.state import overridden


class Own:
    inherited = 1

    def __init__(self):
        self.mine = 2


def test_attributes_are_others_within_and_as_before_afterwards():
    one = Own()
    with overridden(one, inherited=3, mine=4, new=5):
        assert (one.inherited, one.mine, one.new) == (3, 4, 5)
    assert vars(one) == {"mine": 2}
    assert one.inherited == 1


def test_blocks_are_nested_in_any_depth():
    one = Own()
    with overridden(one, inherited=3):
        with overridden(one, inherited=4, mine=5):
            assert (one.inherited, one.mine) == (4, 5)
        assert (one.inherited, one.mine) == (3, 2)
    assert one.inherited == 1


def test_an_error_changes_nothing_about_that():
    one = Own()

    def fail():
        with overridden(one, mine=3, new=4):
            del one.new
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert vars(one) == {"mine": 2}


def test_a_module_registers_nothing():
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    before = list(vars(module))
    with overridden(module, forward=other):
        assert module(other.weight) is not None
        assert list(module.children()) == []
    assert list(vars(module)) == before


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
