"""When two models are alike, and what is remembered of them."""

import copy
import gc
import threading
import weakref
from contextlib import nullcontext
from types import MethodType

import peft
import pytest
import torch
from torch import nn

import billhook as bh
from billhook.model import cache, costs
from billhook.model.cache import cached, clear_cache, signature
from billhook.model.costs import costs_of
from billhook.pruning.block_plan import find_block_plan, remove_blocks
from kit.families import build, llama


@pytest.fixture(autouse=True)
def _nothing_known():
    clear_cache()
    yield
    clear_cache()


def first(model):
    return model.model.layers[0]


def narrow(model):
    first(model).mlp.up_proj.weight = nn.Parameter(torch.zeros(3, first(model).mlp.up_proj.in_features))


def tie(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def lora(model):
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))


def another_class(model):
    mlp = first(model).mlp
    mlp.__class__ = type(type(mlp).__name__, (type(mlp),), {"__module__": type(mlp).__module__})


CHANGES = {
    "width": narrow,
    "tie": tie,
    "dtype": lambda m: m.half(),
    "strides": lambda m: setattr(m.lm_head.weight, "data", m.lm_head.weight.data.t().contiguous().t()),
    "frozen": lambda m: m.lm_head.requires_grad_(False),
    "buffer": lambda m: first(m).register_buffer("mask", torch.ones(2)),
    "block removed": lambda m: m.model.layers.__delitem__(0),
    "blocks swapped": lambda m: m.model.layers.__setitem__(0, nn.Identity()),
    "LoRA": lora,
    "hidden states that were asked for": lambda m: m(torch.tensor([[5]]), output_hidden_states=True),
    "hook of transformers": lambda m: m.enable_input_require_grads(),
    "class of the same name": another_class,
    "number": lambda m: setattr(first(m).self_attn, "scaling", 2.0),
    "whole number as a real one": lambda m: setattr(first(m).self_attn, "head_dim", float(first(m).self_attn.head_dim)),
    "list": lambda m: setattr(first(m), "sizes", [1, 2]),
    "function": lambda m: setattr(first(m).mlp, "bend", torch.relu),
    "config": lambda m: setattr(m.config, "rms_norm_eps", 0.5),
    "attention": lambda m: m.set_attn_implementation("eager"),
    "experts": lambda m: setattr(m.config, "_experts_implementation", "batched_mm"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_may_decide_how_a_model_runs_is_seen(name):
    one, other = llama(num_hidden_layers=2), llama(num_hidden_layers=2)
    assert signature(one) == signature(other) is not None
    CHANGES[name](one)
    assert signature(one) != signature(other)
    assert signature(one) is not None


def test_models_of_which_the_same_was_asked_are_alike():
    models = [llama(), llama(), llama()]
    for model, asked in zip(models, ("output_hidden_states", "output_hidden_states", "output_attentions"), strict=True):
        model(torch.tensor([[5]]), **{asked: True})
    assert signature(models[0]) == signature(models[1]) is not None
    models[1].model.layers[0]._forward_hooks.popitem()
    assert signature(models[0]) != signature(models[1]) is not None


def test_models_without_the_same_block_are_alike():
    models = [llama(num_hidden_layers=3) for _ in range(4)]
    for model, gone in zip(models, ([1], [1], [2], []), strict=True):
        remove_blocks(model, find_block_plan(model, {"model.layers": gone}))
    seen = [signature(model) for model in models]
    assert seen[0] == seen[1] is not None
    assert len(set(seen)) == 3


def test_a_forward_that_is_replaced_in_the_class_is_seen(monkeypatch):
    model = llama()
    before = signature(model)
    monkeypatch.setattr(type(first(model).mlp), "forward", lambda self, x: x)
    assert signature(model) != before


def test_values_modes_gates_and_copies_do_not_count():
    model = llama()
    before = signature(model.eval())
    model.train()
    nn.init.ones_(model.lm_head.weight)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.register_full_backward_hook(lambda *_: None)
    with bh.mask(model, {0: [1]}):
        assert signature(model) == before
    assert signature(copy.deepcopy(model)) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_as_it_was():
    model = llama()
    before = signature(model)
    model.compile()
    assert signature(model) == before


def replaced(model):
    mlp = first(model).mlp
    mlp.forward = mlp.forward


class Held:
    pass


UNSEEN = {
    "object": lambda m: setattr(m, "held", Held()),
    "recurrent layer": lambda m: setattr(m, "own", nn.LSTM(2, 2)),
    "method": lambda m: setattr(first(m), "helper", MethodType(narrow, first(m))),
    "hook": lambda m: m.lm_head.register_forward_hook(lambda *_: None),
    "hook before": lambda m: m.lm_head.register_forward_pre_hook(lambda *_: None),
    "forward": replaced,
    "tensor": lambda m: setattr(m, "table", torch.ones(3)),
    "lock": lambda m: setattr(m, "lock", threading.Lock()),
    "weights of another class": lambda m: setattr(
        m.lm_head, "weight", type("Own", (nn.Parameter,), {})(m.lm_head.weight.detach())
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_of_what_cannot_be_seen_nothing_is_remembered(name):
    model, runs = llama(), []
    UNSEEN[name](model)
    assert signature(model) is None
    for _ in range(2):
        cached(lambda: runs.append(1), model, "runs")
    assert len(runs) == 2


def test_a_hook_on_all_modules_is_seen():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert signature(llama()) is None
    finally:
        handle.remove()


def test_what_is_done_to_a_finding_does_not_reach_the_next():
    model = llama()
    for _ in range(3):
        found = cached(lambda: {"list": [1]}, model, "list")
        assert found == {"list": [1]}
        found["list"].append(2)


def test_what_else_decides_it_and_the_default_dtype_count():
    model, runs = llama(), []
    for given in ("one", "other", "one"):
        cached(lambda: runs.append(1), model, given)
    assert len(runs) == 2
    torch.set_default_dtype(torch.float64)
    try:
        cached(lambda: runs.append(1), model, "one")
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(runs) == 3


def test_neither_a_model_nor_its_class_is_held():
    model = llama()
    another_class(model)
    held = [weakref.ref(model), weakref.ref(type(first(model).mlp))]
    bh.trace(model)
    costs_of(model)
    del model
    gc.collect()
    assert [one() for one in held] == [None, None]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi"])
def test_figures_are_those_of_runs_in_which_each_op_is_done(family, monkeypatch):
    model = build(family)
    found = [costs_of(model), cache._findings.clear() or costs_of(model)]
    cache._findings.clear()
    monkeypatch.setattr(costs, "CachedShapes", nullcontext)
    assert found == [costs_of(model)] * 2
    assert found[0].flops
    assert found[0].kv_cache_bytes
