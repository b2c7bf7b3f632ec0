"""Masks of a checkpoint: packed until weights are there, then each as its weight lies."""

import pytest
import torch
from torch import nn

from billhook.sparsity.enforcement import EnforcedMasks
from kit.fits import same


def model():
    return nn.Sequential(*(nn.Linear(16, 8 + 8 * (number < 4)) for number in range(5)))


@pytest.fixture
def saved():
    held, own = EnforcedMasks(), model()
    held.attach(own, [])
    held.hold({f"{number}": torch.rand(own[number].weight.shape) < 0.5 for number in range(5)})
    return held.masks, held.state_dict()


def test_what_was_saved_is_the_same_before_and_after_there_are_weights(saved):
    masks, state = saved
    again, own = EnforcedMasks(), model()
    again.load_state_dict(state)
    assert same(again.masks, masks)
    assert same(
        {name: one["bits"] for name, one in again.state_dict().items()}, {name: one["bits"] for name, one in state.items()}
    )
    again.attach(own, [])
    assert same(again.masks, masks)
    assert not any(own[int(name)].weight[~mask].any() for name, mask in masks.items())
    again.clear()
    assert not again.masks
    assert not again.state_dict()


def test_masks_of_another_model_are_refused(saved):
    again = EnforcedMasks()
    again.load_state_dict(saved[1])
    with pytest.raises(ValueError, match=r"the masks belong to another model: this model has no 4 of shape \[8, 16\]"):
        again.attach(nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))), [])
    assert same(again.masks, saved[0])
