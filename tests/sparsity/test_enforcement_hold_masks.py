"""In a loop of a user's own, pruned weights stay zero, also after shapes change and after a restart."""

import copy

import pytest
import torch
from accelerate import Accelerator

import billhook as bh
from kit.families import llama, tokens


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
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    model.requires_grad_(False)  # of which the step uses the gradients
    optimizer.step()
    assert all(zeros(model, masks).values())
    model.requires_grad_(True)
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


@pytest.mark.parametrize(("masks", "told"), [
    ({"model.layers.9.mlp.up_proj": torch.ones(2, 2, dtype=torch.bool)}, "no model.layers.9.mlp.up_proj of shape"),
    ({"model.layers.0.mlp.up_proj": torch.ones(2, 2, dtype=torch.bool)}, r"no model.layers.0.mlp.up_proj of shape \[2, 2\]"),
    ("masks", "masks='masks' must be"),
])  # fmt: skip
def test_masks_of_another_model_are_refused(masks, told):
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=told):
        bh.hold_masks(model, sgd(model), masks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class ScheduleFree(torch.optim.SGD):
    """As of the package `schedulefree`: `eval` and `train` mix a copy of each weight into it."""

    @torch.no_grad()
    def step(self):
        for weight in self.param_groups[0]["params"]:
            self.state[weight].setdefault("z", weight.clone()).sub_(0.1 * weight.grad)
            weight.lerp_(self.state[weight]["z"], 0.5)

    @torch.no_grad()
    def eval(self):
        for weight in self.param_groups[0]["params"]:
            weight.lerp_(self.state[weight]["z"], 1 - 1 / 0.9)


@pytest.mark.parametrize("first", [0, 2], ids=["from the start", "in the middle"])
def test_zeros_stay_in_the_copies_of_schedule_free_optimizers(first):
    model = llama().train()
    optimizer = ScheduleFree(model.parameters(), 0.1)
    steps(model, optimizer, first)
    masks = bh.prune(model, bh.Magnitude(), sparsity=0.5).masks(model)
    held = bh.hold_masks(model, optimizer, masks)
    for count in (0, 2):
        steps(model, optimizer, count)
        if first or count:
            optimizer.eval()
            assert all(zeros(model, masks).values())
    held.detach()


def parts_of(model, optimizer=torch.optim.SGD):
    """Two optimizers, of the MLPs and of the rest."""
    mlp = [parameter for name, parameter in model.named_parameters() if "mlp" in name]
    rest = [parameter for name, parameter in model.named_parameters() if "mlp" not in name]
    return [optimizer(parameters, 0.1, weight_decay=0.1) for parameters in (mlp, rest)]


def test_each_masked_weight_has_its_optimizer():
    model = llama().train()
    masks, optimizers = bh.prune(model, bh.Magnitude(), sparsity=0.5).masks(model), parts_of(model)
    with pytest.raises(ValueError, match=r"SGD does not hold the weight of model.layers.0.self_attn.q_proj.* a list of all"):
        bh.hold_masks(model, optimizers[0], masks)
    bh.hold_masks(model, optimizers, masks)
    for optimizer in optimizers:
        steps(model, optimizer)
    assert all(zeros(model, masks).values())


def test_frozen_weights_need_no_optimizer():
    model = llama().train()
    masks = bh.prune(model, bh.Magnitude(), sparsity=0.5).masks(model)
    model.model.requires_grad_(False)
    bh.hold_masks(model, torch.optim.SGD(model.lm_head.parameters(), 0.1), masks)


def test_an_optimizer_made_before_shapes_changed_is_refused():
    model = llama().train()
    optimizer = sgd(model)
    bh.convert_kv_heads(model, 2, "mean")
    masks = bh.prune(model, bh.Magnitude(), sparsity=0.5).masks(model)
    with pytest.raises(ValueError, match="does not hold the weight of model.layers.0.self_attn.k_proj"):
        bh.hold_masks(model, optimizer, masks)


def test_a_shape_that_masks_did_not_follow():
    model = llama().train()
    optimizer = sgd(model)
    bh.hold_masks(model, optimizer, bh.prune(model, bh.Magnitude(), sparsity=0.5).masks(model))
    bh.convert_kv_heads(model, 2, "mean", optimizers=[optimizer])
    with pytest.raises(ValueError, match=r"k_proj has changed its shape since the masks were made. Call follow\(\)"):
        steps(model, optimizer)


def test_masks_that_are_not_bool():
    model = llama()
    masks = {"model.layers.0.mlp.up_proj": torch.ones_like(model.model.layers[0].mlp.up_proj.weight)}
    with pytest.raises(ValueError, match="the mask of model.layers.0.mlp.up_proj has dtype torch.float32. Masks are bool"):
        bh.hold_masks(model, sgd(model), masks)


def test_a_compiled_model_is_the_model_inside():
    model = llama().train()
    optimizer = sgd(model)
    masks = bh.prune(model, bh.Magnitude(), sparsity=0.5).masks(model)
    bh.hold_masks(torch.compile(model, backend="eager"), optimizer, masks)
    steps(model, optimizer)
    assert all(zeros(model, masks).values())
