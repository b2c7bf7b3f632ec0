"""In a loop of a user's own, pruned weights stay zero, also after shapes change and after a restart."""

import copy

import pytest
import torch
from accelerate import Accelerator

import billhook as bh
from kit.families import llama


def steps(model, optimizer, count=3):
    ids = torch.arange(3, 27).view(2, 12)
    for _ in range(count):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sgd(model):
    """Momentum and weight decay move zeros, if nothing holds them."""
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)


def zeros(model, masks):
    return {name: bool((model.get_submodule(name).weight[~mask] == 0).all()) for name, mask in masks.items()}


@pytest.mark.parametrize("wrapped", [False, True], ids=["torch's", "accelerate's"])
def test_zeros_stay(wrapped):
    model = llama().train()
    optimizer = sgd(model)
    masks = bh.prune(model, bh.Magnitude(), sparsity=0.5).masks(model)
    held = bh.hold_masks(model, Accelerator(cpu=True).prepare(optimizer) if wrapped else optimizer, masks)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    steps(model, optimizer)
    assert all(zeros(model, masks).values())
    assert not torch.equal(before, model.model.layers[0].mlp.up_proj.weight)
    held.detach()
    steps(model, optimizer)
    assert not any(zeros(model, masks).values())


def test_masks_follow_shapes():
    model = llama().train()
    optimizer = sgd(model)
    held = bh.hold_masks(model, optimizer, bh.prune(model, bh.Magnitude(), sparsity=0.5).masks(model))
    bh.apply(model, bh.plan(model, importance=bh.importance.WeightNorm(), amount=bh.Amount(channels=0.5)), optimizers=[optimizer])
    held.follow()
    steps(model, optimizer)
    up = model.model.layers[0].mlp.up_proj.weight
    assert held.masks["model.layers.0.mlp.up_proj"].shape == up.shape
    assert all(zeros(model, held.masks).values())
    assert 0.2 < float((up == 0).float().mean()) < 0.8


def test_a_restarted_loop_ends_as_the_straight_one():
    straight = llama().train()
    masks = bh.prune(straight, bh.Magnitude(), sparsity=0.5).masks(straight)
    optimizer = sgd(straight)
    held = bh.hold_masks(straight, optimizer, masks)
    steps(straight, optimizer)
    saved = copy.deepcopy({"model": straight.state_dict(), "optimizer": optimizer.state_dict(), "masks": held.state_dict()})
    again = llama().train()
    again.load_state_dict(saved["model"])
    other = sgd(again)
    other.load_state_dict(saved["optimizer"])
    held_again = bh.hold_masks(again, other, saved["masks"])
    steps(straight, optimizer)
    steps(again, other)
    assert all(torch.equal(mask, held_again.masks[name]) for name, mask in held.masks.items())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in straight.state_dict().items())


@pytest.mark.parametrize(
    ("masks", "told"),
    [
        ({"model.layers.9.mlp.up_proj": torch.ones(2, 2, dtype=torch.bool)}, "no model.layers.9.mlp.up_proj of shape"),
        ({"model.layers.0.mlp.up_proj": torch.ones(2, 2, dtype=torch.bool)}, r"no model.layers.0.mlp.up_proj of shape \[2, 2\]"),
        ("masks", "masks='masks' must be"),
    ],
)
def test_masks_of_another_model_are_refused(masks, told):
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=told):
        bh.hold_masks(model, sgd(model), masks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
