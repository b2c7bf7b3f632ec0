"""Heads become narrower where one KV head is more than the cache may keep, and the class computes the same with them."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import billhook as bh
from billhook.kv_heads.plan import plan_kv_heads
from billhook.model.plan import ModelPlan
from billhook.model.shape import Shape, set_shape, shape_of
from kit.families import build, llama, tokens

SVD = bh.kv_methods.SVD
WIDTH = 16
HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": WIDTH, "vocab_size": 128}


def batches():
    return [{"input_ids": tokens(4, 24)} for _ in range(3)]


@torch.no_grad()
def with_few_dimensions(model):
    """Four heads with one pair of a key and two numbers of a value each, which eight dimensions of one head hold."""
    for layer in model.model.layers:
        keys, values = (linear.weight.view(4, WIDTH, -1) for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj))
        keys[:, [n for n in range(WIDTH) if n % (WIDTH // 2) != 3]] = 0
        values[:, 2:] = 0
    return model


@pytest.mark.daily("llama")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "granite"])
def test_what_fits_into_fewer_dimensions_computes_the_same(family, tmp_path):
    model, ids = with_few_dimensions(build(family, **HEADS)), tokens()
    if family == "qwen2":  # its keys and values have biases, which are dimensions too
        for layer in model.model.layers:
            for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                torch.nn.init.zeros_(linear.bias)
    before = model(ids).logits
    plan = bh.convert_kv_heads(model, 1, SVD(head_dim=8, tolerance=0), batches())
    assert (model.config.head_dim, model.config.num_key_value_heads) == (8, 1)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 64)
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-4)
    bh.save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    other = build(family, **HEADS)
    same = ModelPlan.from_json(plan.to_json(), other)
    assert (same.parameters, same.shape, same.keys) == (plan.parameters, plan.shape, plan.keys)
    set_shape(other, Shape.from_dict(shape_of(model).to_dict()))  # as a resumed fit does
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("share", "heads", "width"), [(0.5, 2, 16), (0.3, 1, 16), (0.17, 1, 8), (0.125, 1, 8)])
def test_a_share_of_the_cache(share, heads, width):
    model = llama(**HEADS)
    cache = bh.summary(model).kv_cache_bytes
    bh.convert_kv_heads(model, batches=batches(), kv_cache_bytes=share)
    assert (model.config.num_key_value_heads, model.config.head_dim) == (heads, width)
    assert bh.summary(model).kv_cache_bytes == cache * heads * width // (4 * WIDTH) <= share * cache


def test_repaired_it_is_nearer():
    dense, ids = llama(**HEADS), tokens(8, 24)
    far = {}
    for repair in (None, bh.RepairConfig()):
        model = copy.deepcopy(dense)
        bh.convert_kv_heads(model, 1, SVD(head_dim=8), [{"input_ids": ids[n : n + 2]} for n in range(0, 8, 2)], repair=repair)
        with torch.no_grad():
            far[repair] = float((model(ids).logits - dense(ids).logits).norm())
    assert far[bh.RepairConfig()] < far[None]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {}, "head_dim=8: rotary frequencies stay, because its keys pass a norm"),
        ("phi", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}, "keys rotate in part"),
    ],
)
def test_where_a_class_cannot_say_it_nothing_changes(family, changes, message):
    model = build(family, **changes)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        bh.convert_kv_heads(model, 1, SVD(head_dim=8), batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_refused():
    for options, message in (
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"head_dim": 8, "frequencies": "fixed"}, "needs frequencies='free'"),
    ):
        with pytest.raises(ValueError, match=message):
            SVD(**options)
    for arguments, message in (
        ({"method": SVD(head_dim=32), "num_key_value_heads": 1}, "head_dim=32 must be at most 16, the width of a head"),
        (
            {"kv_cache_bytes": 0.1},
            "kv_cache_bytes=0.1 must be at least 0.250, one of 4 KV heads, or 8 dimensions of it with 'svd'",
        ),
        ({"kv_cache_bytes": 0.2, "method": "mean"}, "kv_cache_bytes=0.2 must be at least 0.250"),
        ({"kv_cache_bytes": 17}, "kv_cache_bytes=17 must be in"),
        ({}, "num_key_value_heads=None, kv_cache_bytes=None: pass the number of KV heads"),
        ({"kv_cache_bytes": 0.2, "num_key_value_heads": 1}, "num_key_value_heads=1, kv_cache_bytes=0.2: pass"),
    ):
        with pytest.raises(ValueError, match=message):
            bh.convert_kv_heads(llama(**HEADS), batches=batches(), **arguments)


def test_a_class_that_computes_otherwise_is_refused(monkeypatch):
    """Its scores have a scale of their own, which the width of a head does not tell."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    made = LlamaAttention.__init__

    def scaled(self, config, layer_idx):
        made(self, config, layer_idx)
        self.scale, self.scaling = self.scaling, 1.0

    forward = LlamaAttention.forward

    def otherwise(self, *args, **kwargs):
        self.scaling = self.scale
        try:
            return forward(self, *args, **kwargs)
        finally:
            self.scaling = 1.0

    monkeypatch.setattr(LlamaAttention, "__init__", scaled)
    monkeypatch.setattr(LlamaAttention, "forward", otherwise)
    model = llama(**HEADS | {"vocab_size": 131})  # of another config, as what a class derives from one is remembered
    assert plan_kv_heads(model, 1).after == 1
    with pytest.raises(ValueError, match="head_dim=8: the code of LlamaForCausalLM does not follow with narrower heads"):
        bh.convert_kv_heads(model, 1, SVD(head_dim=8), batches())
