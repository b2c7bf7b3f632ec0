"""Masks of a checkpoint: packed until weights are there, then each as its weight lies."""

import weakref

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from billhook.engine.sharding import full_tensor
from billhook.sparsity import enforcement
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


def test_one_mask_at_a_time_is_whole_where_weights_are_sharded(saved, mesh, monkeypatch):
    masks, state = saved
    again, own, unpacked, found, alive = EnforcedMasks(), model(), enforcement._unpacked, [], []

    def watched(*packed):
        alive.append(sum(one() is not None for one in found))
        mask = unpacked(*packed)
        found.append(weakref.ref(mask))
        return mask

    monkeypatch.setattr(enforcement, "_unpacked", watched)
    fully_shard(own, mesh=mesh)
    again.load_state_dict(state)
    again.attach(own, [])
    assert alive == [0, 1, 1, 1, 1]
    assert all(isinstance(mask, DTensor) and torch.equal(full_tensor(mask), masks[name]) for name, mask in again.masks.items())


def test_masks_of_another_model_are_refused(saved):
    again = EnforcedMasks()
    again.load_state_dict(saved[1])
    with pytest.raises(ValueError, match=r"the masks belong to another model: this model has no 4 of shape \[8, 16\]"):
        again.attach(nn.Sequential(*(nn.Linear(16, 16) for _ in range(5))), [])
    assert same(again.masks, saved[0])
