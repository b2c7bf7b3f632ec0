"""What a model with fewer KV heads goes through afterwards: LoRA, later stages, a teacher, pruning."""

import pytest
import torch
from billhook.model.repeat_kv import repeat_layout_of
from peft import LoraConfig

import billhook as bh
from billhook.adapters.lora import LoRA, attach
from billhook.kv_heads.config import kv_heads_by_layer
from kit.families import tokens
from kit.fits import data, trainer
from kit.kv_zoo import build


@pytest.fixture
def opt():
    model = build("opt")
    bh.convert_kv_heads(model, 4)
    return model


def names(model, end=".lora_A"):
    return {name.removesuffix(end) for name, _ in model.named_modules() if name.endswith(end)}


def test_lora_on_all_linears_leaves_them_alone(opt):
    handed = {name for name, module in opt.named_modules() if repeat_layout_of(module)}
    ids = tokens()
    before = opt(ids).logits
    attach(opt, LoRA(dropout=0))
    assert handed
    assert not handed & names(opt)
    assert {name.rpartition(".")[2] for name in names(opt)} == {"q_proj", "out_proj", "fc1", "fc2"}
    assert torch.equal(opt(ids).logits, before)


@pytest.mark.parametrize(
    "lora", [LoRA(target=["k_proj"]), LoraConfig(target_modules="all-linear"), LoraConfig(target_modules=r".*\.v_proj")], ids=str
)
def test_lora_on_them_is_refused(opt, lora):
    with pytest.raises(ValueError, match=r"_proj repeats its KV heads, which PEFT's LoRA does not support"):
        attach(opt, lora)
    assert not names(opt)


@pytest.mark.parametrize("method", ["aligned", "svd"])
def test_a_later_stage_is_exact_where_heads_are_one_another_in_other_bases(opt, method):
    for layer in opt.model.decoder.layers:
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            width = len(linear.weight) // 4
            turn, _ = torch.linalg.qr(torch.randn(width, width))
            for tensor in (linear.weight.data, linear.bias.data):
                tensor[width : 2 * width] = turn @ tensor[:width]
                tensor[3 * width :] = turn @ tensor[2 * width : 3 * width]
    ids, batches = tokens(), [{"input_ids": one} for one in tokens(8).split(4)]
    with torch.no_grad():
        before = opt(ids).logits
        bh.convert_kv_heads(opt, 2, method=method, batches=batches)
        torch.testing.assert_close(opt(ids).logits, before, atol=1e-4, rtol=1e-4)
    assert set(kv_heads_by_layer(opt).values()) == {2}


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["mean", "svd"])
def test_the_dense_model_teaches_the_converted_one(files, tmp_path, method):
    def fitted(**options):
        torch.manual_seed(0)
        lit = bh.TransformerModule(build("opt", vocab_size=2048), lr=1e-2, warmup=2, **options)
        callback = bh.KVHeadConversion(2, at=2, method=method, calibration=4, measure_batches=0)
        trainer(tmp_path, [callback], max_steps=4).fit(lit, data(files))
        return lit

    taught, alone = fitted(distillation=bh.training.Distillation()), fitted()
    assert set(kv_heads_by_layer(taught).values()) == set(kv_heads_by_layer(alone).values()) == {2}
    teacher = taught.teacher.model
    assert set(kv_heads_by_layer(teacher).values()) == {8}
    assert not torch.equal(taught.model.lm_head.weight, alone.model.lm_head.weight)
    dense = build("opt", vocab_size=2048).state_dict()
    assert all(torch.equal(value, dense[name]) for name, value in teacher.state_dict().items())


@pytest.mark.daily("t5-*channels*")
@pytest.mark.parametrize("units", [{"channels": 0.25}, {"heads": 0.5}], ids=str)
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_units_of_one_with_fewer_heads_in_place_are_removed(family, units, tmp_path):
    model = build(family)
    bh.convert_kv_heads(model, 2)
    before = sum(p.numel() for p in model.parameters())
    plan = bh.plan(model, importance=bh.importance.WeightNorm(), amount=bh.Amount(**units))
    bh.apply(model, plan)
    assert sum(p.numel() for p in model.parameters()) == plan.parameters[1] < before
    assert bh.save(model, tmp_path / "cut").way == "shaped"
    inputs = {"input_ids": tokens()}
    inputs |= {"decoder_input_ids": tokens()} if family == "t5" else {}
    with torch.no_grad():
        assert torch.equal(bh.load(tmp_path / "cut").eval()(**inputs).logits, model(**inputs).logits)
