"""Fewer KV heads of a model with LoRA attached."""

import copy

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import billhook as bh
from billhook.adapters.lora import LoRA, attach
from billhook.kv_heads.config import kv_heads_by_layer
from kit import prunes
from kit.families import llama, tokens
from kit.fits import data, same, trainer, weights
from kit.kv_zoo import build


def adapted(family, lora=None):
    model = build(family)
    attach(model, lora or LoRA(r=2, dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.daily("llama-*", "gpt_bigcode-mean", "t5-first")
@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize("family", ["llama", "phi3", "bert", "t5", "gpt_bigcode"])
def test_converted_and_merged_is_merged_and_converted(family, method):
    model = adapted(family)
    merged = bh.training.merge(copy.deepcopy(model)).model
    heads = 1 if family == "gpt_bigcode" else 2
    bh.convert_kv_heads(model, heads, method)
    bh.convert_kv_heads(merged, heads, method)
    assert kv_heads_by_layer(model) == kv_heads_by_layer(merged)
    ids = tokens()
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if family == "t5" else {})
    with torch.no_grad():
        expected = merged.eval()(**inputs).logits
        torch.testing.assert_close(model.eval()(**inputs).logits, expected, atol=3e-4, rtol=1e-3)
        torch.testing.assert_close(bh.training.merge(model).model.eval()(**inputs).logits, expected, atol=3e-4, rtol=1e-3)


@pytest.mark.parametrize(("family", "lora", "method", "match"), [
    ("llama", None, "random", "method='random' does not pool adapters like weights"),
    (
        "llama",
        None,
        "svd",
        "with LoRA attached to model.layers.0.self_attn.q_proj, heads stay in their bases.*: or convert the model first",
    ),
    ("llama", peft.LoraConfig(target_modules=["k_proj"], use_dora=True), "mean", "adapters that are not plain LoRA"),
])  # fmt: skip
def test_what_cannot_be_pooled_is_refused(family, lora, method, match):
    model = adapted(family, lora)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        bh.convert_kv_heads(model, 2, method, batches=[{"input_ids": tokens()}])
    assert same(dict(model.state_dict()), before)


@pytest.mark.nightly
def test_adapters_on_feed_forwards_alone_are_not_in_the_way():
    batches, mlp = [{"input_ids": tokens(4, 16)} for _ in range(2)], {"target_modules": ["up_proj", "down_proj"]}
    model = adapted("llama", peft.LoraConfig(r=2, **mlp))
    merged = bh.training.merge(copy.deepcopy(model)).model
    with pytest.raises(ValueError, match=r"repair refits weights, and model.layers.0.mlp.up_proj has adapters: leave it out, or"):
        bh.convert_kv_heads(model, 2, "svd", batches=batches, repair=bh.RepairConfig())
    for one in (model, merged):
        bh.convert_kv_heads(one, 2, "svd", batches=batches)
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, merged.eval()(ids).logits, atol=3e-4, rtol=1e-3)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.slow
def test_heads_then_weights_then_kv_heads_under_lora_resume(files, tmp_path):
    def fit(seed, folder, ckpt_path=None):
        torch.manual_seed(seed)
        lit = bh.TransformerModule(llama(vocab_size=2048), lr=1e-2, warmup=2, lora=bh.training.LoRA(r=2, dropout=0.2))
        few = {"measure_batches": 0, "calibration": 4}
        callbacks = [
            bh.HeadPruning(0.5, at=2, **few),
            prunes.WeightPruning(bh.Wanda(), bh.schedules.MultiStep([0.25, 0.5], [3, 6]), **few),
            bh.KVHeadConversion(1, at=5, measure_batches=0),
            ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"),
        ]
        trainer(folder, callbacks, max_steps=7).fit(lit, data(files), ckpt_path=ckpt_path)
        return lit, callbacks

    straight, callbacks = fit(0, tmp_path / "all")
    assert set(kv_heads_by_layer(straight).values()) == {1}
    moved = [name for name, p in straight.named_parameters() if "k_proj.lora_B" in name and p.abs().sum() > 0]
    assert len(moved) == 2
    for name, mask in callbacks[1].masks.items():
        assert not straight.model.get_submodule(name).weight[~mask].any()
    for stop in (2, 4, 5, 6):
        resumed, again = fit(1, tmp_path / str(stop), tmp_path / "all" / f"step={stop}.ckpt")
        assert same(weights(resumed), weights(straight)), stop
        assert same(again[1].masks, callbacks[1].masks)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_inside_what_peft_wraps(family):
    names = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}[family]
    model = peft.get_peft_model(build(family), peft.LoraConfig(target_modules=names))
    state = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=(ids := tokens()), labels=ids).loss.backward()
    state.step()
    bh.convert_kv_heads(model, 2, optimizers=state)
    assert set(kv_heads_by_layer(model).values()) == {2}
    held = {id(p) for group in state.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    state.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    state.step()
