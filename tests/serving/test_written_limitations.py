"""What llama.cpp's converter misreads, and what its architecture `deci` computes."""

import pytest
import torch
import transformers

from billhook.serving.written import deci_limitation, misread
from kit.serving import longrope

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"model_type": "granite"},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}},
    ],
    ids=["hidden_act", "model_type", "rope_type", "partial_rotary_factor"],
)
def test_what_deci_does_not_compute(change):
    config = transformers.LlamaConfig(num_hidden_layers=2)
    assert deci_limitation(config) is None
    for name, value in change.items():
        setattr(config, name, value)
    assert deci_limitation(config)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("LlamaForCausalLM", {}, ""),
        ("Phi3ForCausalLM", {}, ""),
        ("Qwen3ForCausalLM", {}, "drops longrope factors"),
        ("LlamaForCausalLM", {"attention_factor": 2.0}, "drops longrope factors"),
    ],
)
def test_factors_of_rotary_frequencies(kind, changes, reason):
    config = getattr(transformers, kind).config_class(
        **SIZES, max_position_embeddings=128, pad_token_id=0, rope_parameters=longrope() | changes
    )
    assert reason in misread(kind, config)
    assert bool(reason) == bool(misread(kind, config))


def test_a_phi3_whose_heads_do_not_add_up_to_the_hidden_size():
    config = transformers.Phi3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
    assert not misread("Phi3ForCausalLM", config)
    config.num_attention_heads, config.head_dim = 3, 16
    assert "assumes a head dimension of hidden size / heads" in misread("Phi3ForCausalLM", config)


def test_no_plain_llama_is_built_of_a_config_for_each_layer():
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**small, per_layer_config={1: {"intermediate_size": 16}})
    with torch.device("meta"):
        with pytest.raises(RuntimeError, match="intermediate_size"):
            transformers.LlamaForCausalLM(config)
        config.allow_global_per_layer_attribute_access = True
        model = transformers.LlamaForCausalLM(config)
    assert [len(layer.mlp.up_proj.weight) for layer in model.model.layers] == [48, 48], "save may write per_layer_config now"
