"""A model that accelerate has spread over devices is refused by name wherever sums would be, or weights would not come back."""

import copy

import pytest
import torch
from accelerate import dispatch_model

import billhook as bh
from kit import prunes, shrinks
from kit.families import llama, tokens


def batches():
    return [{"input_ids": tokens(2, 16)} for _ in range(3)]


WORKS = {
    "prune": lambda model: bh.prune(model, bh.Wanda(), batches(), sparsity=0.5),
    "match": lambda model: prunes.prune(model, bh.Wanda(), batches(), sparsity=0.5, match=bh.criteria.BlockMatching()),
    "score": lambda model: bh.score(model, bh.find_units(model, "head"), bh.OutputNorm(), batches()),
    "plan": lambda model: bh.plan(model, bh.importance.WeightNorm(), heads=0.5),
    "convert": lambda model: bh.convert_kv_heads(model, 2, "svd", batches()),
    "shrink": lambda model: shrinks.shrink(model, batches(), params=0.8),
}


@pytest.mark.parametrize("name", WORKS)
def test_several_devices_are_refused_by_name(name):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    with pytest.raises(ValueError, match="model: device_map has distributed it over 0, 1, but it must be on one device"):
        WORKS[name](model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_repair_with_a_plan_of_before_is_refused():
    model = llama()
    plan = bh.pruning.plan_units(model, {0: [0, 1]})
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="model: device_map has distributed it over 0, 1"):
        bh.repair(model, plan, batches())


def test_what_needs_no_data_and_no_units_is_done_on_several_devices():
    model = llama()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    assert bh.prune(model, bh.Magnitude(), sparsity=0.5).sparsity == 0.5


def test_one_device_is_as_none():
    model = llama()
    model.hf_device_map = {"": 0}
    assert bh.prune(model, bh.Wanda(), batches(), sparsity=0.5).sparsity == 0.5


def test_weights_on_disk_are_refused_and_stay_there(tmp_path):
    parts = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0", "model.layers.1")
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    model = dispatch_model(llama(), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    ids = tokens()
    expected = model(ids).logits
    for name, work in WORKS.items():
        why = "has no values" if name in ("prune", "match", "shrink") else "has distributed it over cpu, disk"
        with pytest.raises(ValueError, match=why):
            work(model)
    assert all(parameter.is_meta for parameter in model.model.layers[1].parameters())
    assert torch.equal(model(ids).logits, expected)
