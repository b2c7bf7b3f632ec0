"""Fewer KV heads of models that are unlike others: odd configs, odd layers, odd files."""

import copy
import functools

import pytest
import torch
import transformers
from safetensors.torch import load_file

import billhook as bh
from billhook.kv_heads.config import kv_heads_by_layer, kv_heads_of
from billhook.model.inputs import make_inputs
from billhook.report.summary import summary
from kit.removal import make
from kit.units import other

IDS = [{"input_ids": torch.arange(10, 22).reshape(2, 6)}] * 2
BERT = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


@pytest.mark.skipif("dots3_note_text" not in transformers.CONFIG_MAPPING, reason="this transformers has no dots3_note")
def test_a_config_that_says_another_number_for_each_layer():
    config = transformers.AutoConfig.for_model(
        "dots3_note_text",
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1},
        **{"topk_group": 1, "kv_lora_rank": 18, "q_lora_rank": 20, "qk_rope_head_dim": 8, "v_head_dim": 10, "head_dim": 20},
        **{"qk_nope_head_dim": 12, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2, "max_position_embeddings": 64},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "shared_experts_intermediate_size": 16},
        **{"layer_types": ["indexed_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"]},
        per_layer_config={1: {"num_attention_heads": 2, "num_key_value_heads": 2}},
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="the code of Dots3NoteForCausalLM cannot have fewer KV heads than query heads"):
        bh.convert_kv_heads(model, 1)
    assert (summary(model).query_heads, summary(model).kv_heads) == (None, None)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_matrix_without_entries_is_no_hindrance():
    config = transformers.MobileBertConfig(
        **BERT, hidden_size=32, embedding_size=32, intermediate_size=48, intra_bottleneck_size=16
    )
    model = transformers.MobileBertForMaskedLM(config)
    assert 0 in model.cls.predictions.dense.weight.shape
    assert bh.convert_kv_heads(model, 2).after == 2


@pytest.mark.parametrize("name", ["NomicBertForMaskedLM", "HrmTextForCausalLM"])
def test_keys_that_files_of_the_family_join_with_queries_are_saved_by_themselves(name, tmp_path):
    """Transformers joins them on saving, and cuts the joined tensor in equal parts on loading."""
    model = other(name)
    bh.convert_kv_heads(model, 2)
    with torch.no_grad():
        expected = model(**IDS[0]).logits
        bh.save(model, tmp_path / "few")
        torch.testing.assert_close(bh.load(tmp_path / "few").eval()(**IDS[0]).logits, expected)
    bh.save(other(name), tmp_path / "all")
    file = tmp_path / "all" / "model.safetensors"
    assert any("qkv" in tensor for tensor in load_file(file))


def mean_heads(model, heads):
    """Replaces keys and values by the mean of each two heads next to each other."""

    def mean(rows):
        pairs = rows.unflatten(0, (heads // 2, 2, -1))
        return pairs.mean(1, keepdim=True).expand_as(pairs).flatten(0, 2).clone()

    for name, parameter in model.named_parameters():
        if name.split(".")[-2] in ("k_proj", "v_proj", "key", "value"):
            parameter.data = mean(parameter.data)
    return model


NAMES = ["BertForMaskedLM", "Glm4MoeForCausalLM", "NanoChatForCausalLM", "ViTForImageClassification"]


@pytest.mark.daily("BertForMaskedLM")
@pytest.mark.parametrize("name", NAMES)
def test_heads_are_removed_first(name, tmp_path):
    """What is left is not what the class builds of the config; in memory and reloaded, it is converted alike."""
    model = other(name, num_key_value_heads=6)
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), heads=0.34))
    assert set(kv_heads_by_layer(model).values()) == {4}
    inputs = make_inputs(model)
    bh.save(model, tmp_path / "pruned")
    loaded, expected = bh.load(tmp_path / "pruned").eval(), mean_heads(copy.deepcopy(model), 4)
    bh.convert_kv_heads(model, 2)
    bh.convert_kv_heads(loaded, 2)
    with torch.no_grad():
        for one in (model, loaded):
            torch.testing.assert_close(one(**inputs).logits, expected(**inputs).logits, atol=1e-5, rtol=1e-4)
    bh.save(model, tmp_path / "fewer")
    assert set(kv_heads_by_layer(bh.load(tmp_path / "fewer")).values()) == {2}


def test_heads_are_removed_first_and_a_table_of_angles_follows(tmp_path):
    """Of Phi-3 only a config with another field says both."""
    model = other("Phi3ForCausalLM")
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), heads=0.34))
    bh.save(model, tmp_path / "pruned")
    loaded, inputs = bh.load(tmp_path / "pruned").eval(), make_inputs(model)
    for one in (model, loaded):
        bh.convert_kv_heads(one, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, loaded(**inputs).logits, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_config_with_one_number_for_both_keeps_its_queries():
    config = transformers.VoxtralRealtimeEncoderConfig(
        hidden_size=48, intermediate_size=32, num_hidden_layers=2, num_attention_heads=6, head_dim=8, num_mel_bins=8
    )
    model = transformers.VoxtralRealtimeEncoder(config).eval()
    assert config.num_key_value_heads == config.num_attention_heads
    expected, inputs = mean_heads(copy.deepcopy(model), 6), make_inputs(model)
    bh.convert_kv_heads(model, 3)
    assert model.layers[0].self_attn.q_proj.weight.shape == (48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], expected(**inputs)[0], atol=1e-5, rtol=1e-4)


def test_layers_of_different_numbers_of_heads():
    model = other("BertForMaskedLM", num_hidden_layers=3)
    bh.apply(model, bh.pruning.plan_units(model, {"bert.encoder.layer.2.attention": [0, 5]}, "head"))
    assert list(kv_heads_by_layer(model).values()) == [6, 6, 4]
    bh.convert_kv_heads(model, 2)
    assert set(kv_heads_by_layer(model).values()) == {2}
    model(**make_inputs(model))


@pytest.mark.nightly
def test_layers_that_read_the_keys_and_values_of_another_layer():
    """They lose the same heads as that one, and have fewer KV heads with it."""
    model = other("Gemma3nForCausalLM")
    heads = kv_heads_by_layer(model)
    assert list(heads.values()) == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="the code of Gemma3nForCausalLM does not follow"):
        bh.convert_kv_heads(model, 1, layers=[0])
    plan = bh.plan(model, bh.importance.WeightNorm(), heads=0.34)
    assert [plan.units[name] for name in heads] == [plan.units[name] for name in list(heads)[:2]] * 2
    zeroed = copy.deepcopy(model)
    for name, gone in plan.units.items():
        columns = zeroed.get_submodule(f"{name}.o_proj").weight.data.unflatten(1, (6, -1))
        columns[:, gone] = 0
    inputs = make_inputs(model)
    bh.apply(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, zeroed(**inputs).logits, atol=1e-5, rtol=1e-4)
        expected = mean_heads(copy.deepcopy(model), 2)
        bh.convert_kv_heads(model, 1)
        torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits, atol=1e-5, rtol=1e-4)


def test_a_layer_without_attention_of_the_usual_kind_is_none_of_the_method():
    """Qwen3-Next has layers of linear attention, whose queries no one linear makes."""
    model = other("Qwen3NextForCausalLM")
    (full,) = [name for name in kv_heads_by_layer(model) if name.endswith("self_attn")]
    with pytest.raises(ValueError, match=rf"no change of basis preserves the output of {full} .*a gate"):
        bh.convert_kv_heads(model, 1, "svd", IDS, layers=[full])
    batches = [{"input_ids": torch.randint(10, 60, (8, 12))} for _ in range(3)]
    assert bh.convert_kv_heads(model, 1, "mean", batches, repair=bh.RepairConfig(), layers=[full]).layers == (full,)


def test_attentions_that_have_so_few_heads_stay():
    """Segformer has more heads in each stage."""
    model = other("SegformerForImageClassification")
    dense = kv_heads_by_layer(model)
    assert 1 in dense.values()
    bh.convert_kv_heads(model, 1)
    assert kv_heads_by_layer(model) == dict.fromkeys(dense, 1)
    model(**make_inputs(model))


def test_attention_in_an_encoder_only_is_told():
    """The config of a transducer says no number of KV heads, and what decodes has none."""
    with pytest.raises(ValueError, match="attention only in its encoder. Pass encoder=True"):
        kv_heads_of(make("parakeet_tdt"))


def test_a_token_that_is_never_predicted_is_no_hindrance(monkeypatch):
    forward = transformers.BertForMaskedLM.forward

    @functools.wraps(forward)
    def without_first(*given, **named):
        output = forward(*given, **named)
        output.logits[..., 0] = -torch.inf
        return output

    monkeypatch.setattr(transformers.BertForMaskedLM, "forward", without_first)
    assert bh.convert_kv_heads(other("BertForMaskedLM"), 2).after == 2
