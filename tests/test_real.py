"""On real models: `python get_models.py DIR` puts them into the folder that BILLHOOK_MODELS names."""

import copy
import os
from pathlib import Path

import pytest
import torch
from oracle import answer, check
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from billhook import convert_kv_heads, load, save, summary, trace
from billhook.kv_heads.config import kv_heads_of
from billhook.tracing.show import fold_groups

MODELS = os.environ.get("BILLHOOK_MODELS", "")
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(MODELS, "smollm2", "config.json").is_file(), reason="BILLHOOK_MODELS names no folder with smollm2"
    ),
]


@pytest.fixture(scope="module")
def smollm2():
    return AutoModelForCausalLM.from_pretrained(Path(MODELS, "smollm2"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def batch():
    text = "A billhook is a traditional cutting tool used widely in agriculture and forestry for cutting smaller woody material."
    return AutoTokenizer.from_pretrained(Path(MODELS, "smollm2"))(text, return_tensors="pt")


@torch.no_grad()
def test_smollm2_to_multi_query_equals_pooled_heads_repeated_and_survives_a_round_trip(smollm2, batch, tmp_path):
    dense = smollm2(**batch).logits
    reference, converted = copy.deepcopy(smollm2), copy.deepcopy(smollm2)
    for layer in reference.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight.copy_(projection.weight.unflatten(0, (3, -1)).mean(0).repeat(3, 1))
    convert_kv_heads(converted, 1)
    logits = converted(**batch).logits
    torch.testing.assert_close(logits, reference(**batch).logits, atol=5e-4, rtol=1e-4)
    assert (logits - dense).abs().max() > 1  # mean-pooling does degradation
    assert summary(converted).kv_cache_bytes * 3 == summary(smollm2).kv_cache_bytes == 2 * 30 * 3 * 64 * 4
    saved = save(converted, tmp_path / "mqa")
    assert saved.difference == 0
    assert torch.equal(load(tmp_path / "mqa")(**batch).logits, logits)


def test_minilm_is_converted_in_place_and_loads_again(tmp_path):
    model = AutoModel.from_pretrained(Path(MODELS, "minilm")).eval()
    assert summary(model).params == 22_713_216
    plan = convert_kv_heads(model, 1)
    assert (plan.before, kv_heads_of(model), summary(model).kv_heads) == (12, 1, 1)
    assert summary(model).params == 22_713_216 - 6 * 2 * (384 + 1) * 11 * 32
    ids = torch.arange(1000, 1012)[None]
    expected = model(ids).last_hidden_state
    assert save(model, tmp_path / "mqa").difference == 0
    assert torch.equal(load(tmp_path / "mqa")(ids).last_hidden_state, expected)


@pytest.mark.daily("minilm*")
@pytest.mark.parametrize(
    ("name", "cls", "kinds"),
    [
        ("smollm2", AutoModelForCausalLM, {"kv_head", "query_head", "channel", "residual", "value"}),
        ("minilm", AutoModel, {"head", "channel", "query_key", "value"}),
    ],
)
def test_units_change_places_and_the_answer_stays(name, cls, kinds):
    model = cls.from_pretrained(Path(MODELS, name), dtype=torch.float64, num_hidden_layers=4).eval()  # whose layers are alike
    ids = AutoTokenizer.from_pretrained(Path(MODELS, name))("A billhook is a traditional cutting tool.", return_tensors="pt")
    structure = trace(model)
    groups = [own[0] for own in fold_groups([group for group in structure.groups if not group.reason])]
    assert {group.kind for group in groups} == kinds
    findings = list(
        check(model, structure, lambda: answer(model(**ids)), groups, necessity=9)
    )  # the residual stream has hundreds
    assert len(findings) == len(groups)
    for finding in findings:
        assert finding.holds, f"{finding.group.kind}: {finding.error:.1e}"
        assert {member.name for member in finding.needless} <= set(finding.group.idle)
