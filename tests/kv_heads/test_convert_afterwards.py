"""What a model with fewer KV heads goes through afterwards: LoRA, later stages, a teacher, pruning."""

import pytest
import torch

import billhook as bh
from billhook.kv_heads.config import kv_heads_by_layer
from kit.families import tokens
from kit.fits import data, trainer
from kit.kv_zoo import build


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["mean", "svd"])
def test_the_dense_model_teaches_the_converted_one(files, tmp_path, method):
    def fitted(**options):
        torch.manual_seed(0)
        lit = bh.TransformerModule(build("llama", vocab_size=2048), lr=1e-2, warmup=2, **options)
        callback = bh.KVHeadConversion(2, at=2, method=method, calibration=4, measure_batches=0)
        trainer(tmp_path, [callback], max_steps=4).fit(lit, data(files))
        return lit

    taught, alone = fitted(distillation=bh.training.Distillation()), fitted()
    assert set(kv_heads_by_layer(taught).values()) == set(kv_heads_by_layer(alone).values()) == {2}
    teacher = taught.teacher.model
    assert set(kv_heads_by_layer(teacher).values()) == {8}
    assert not torch.equal(taught.model.lm_head.weight, alone.model.lm_head.weight)
    dense = build("llama", vocab_size=2048).state_dict()
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
