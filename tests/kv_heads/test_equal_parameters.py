import copy

import pytest
import transformers

from billhook.kv_heads.equal_parameters import equal_parameters
from kit.families import EXTRA, SMALL

MODULE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PAPER = {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}


def config_of(family, **changes):
    return transformers.AutoConfig.for_model(family, **SMALL | EXTRA[family] | changes)


def parameters_of(config):
    """Of a model with weights, which the function never builds."""
    return transformers.AutoModelForCausalLM.from_config(config).num_parameters()


@pytest.mark.parametrize(
    ("family", "matrices", "bias"),
    [("llama", 3, 0), ("qwen2", 3, 0), ("gemma2", 3, 0), ("phi", 2, 1), ("starcoder2", 2, 1), ("nemotron", 2, 0)],
)
@pytest.mark.parametrize("heads", [1, 2])
def test_as_many_parameters_as_before(family, matrices, bias, heads):
    config = config_of(family)
    before = copy.deepcopy(config)
    found = equal_parameters(config, heads)
    assert config == before
    assert type(found) is type(config)
    assert found.num_key_value_heads == heads
    channel = config.num_hidden_layers * (matrices * config.hidden_size + bias)
    assert abs(parameters_of(found) - parameters_of(config)) <= channel / 2
    assert found.intermediate_size > config.intermediate_size
    kept = found.to_dict() | {"num_key_value_heads": 4, "intermediate_size": 48}
    assert kept == config.to_dict()


def test_the_papers_translation_model():
    """6 + 6 layers, d 1024, 8 heads of 128: d_ff from 4096 to 5440 (1911.02150, section 4.1), and what it is with a gate."""
    one_attention = 2 * 7 * 128 * 1024  # keys and values of 7 heads
    saved = one_attention * (6 + 6 + 6)  # encoder, decoder, and the decoder's to the encoder
    assert 4096 + saved // (12 * 2 * 1024) == 5440
    part = MODULE | PAPER | {"intermediate_size": 4096}
    config = transformers.T5GemmaConfig(encoder=dict(part), decoder=dict(part), vocab_size=64)
    found = equal_parameters(config, 1)
    wanted = 4096 + saved // (12 * 3 * 1024)
    assert [(one.num_key_value_heads, one.intermediate_size) for one in (found.encoder, found.decoder)] == [(1, wanted)] * 2


def test_a_decoder_as_the_paper_builds_it():
    """Two matrices without biases: each attention gives its layer's feed-forward 2 * 7 * 128 * d / (2 d) = 896 channels."""
    config = transformers.NemotronConfig(**MODULE | PAPER | {"intermediate_size": 8192})
    assert equal_parameters(config, 1).intermediate_size == 8192 + 896
    assert equal_parameters(config, 4).intermediate_size == 8192 + 512


@pytest.mark.parametrize("multiple", [1, 5, 16, 64])
def test_the_closest_multiple(multiple):
    config = config_of("qwen2")  # exact would be 55.75
    width = equal_parameters(config, 1, multiple_of=multiple).intermediate_size
    legal = [w for w in range(48, 67) if w % multiple == 0]
    changed = {w: parameters_of(config_of("qwen2", num_key_value_heads=1, intermediate_size=w)) for w in legal}
    assert width == min(legal, key=lambda w: abs(changed[w] - parameters_of(config)))


@pytest.mark.parametrize(("family", "field"), [("mixtral", "intermediate_size"), ("qwen3_moe", "moe_intermediate_size")])
def test_all_experts_become_wider(family, field):
    config = config_of(family)
    found = equal_parameters(config, 1)
    assert getattr(found, field) > getattr(config, field)
    assert abs(parameters_of(found) - parameters_of(config)) <= 2 * 4 * 3 * config.hidden_size / 2
    assert {**found.to_dict(), "num_key_value_heads": 4, field: getattr(config, field)} == config.to_dict()


@pytest.mark.parametrize(
    ("config", "arguments", "match"),
    [
        (transformers.T5Config(), (1,), "T5Config has no num_key_value_heads"),
        (config_of("llama"), (4,), r"num_key_value_heads=4 must be fewer than num_key_value_heads=4 .* legal is 1, 2$"),
        (config_of("llama"), (3,), "divide the 8 query heads: legal is 1, 2"),
        (config_of("llama"), (True,), "num_key_value_heads=True"),
        (config_of("llama", num_key_value_heads=1), (1,), "legal is nothing, one KV head is all there is"),
        (config_of("llama"), (1, 0), "multiple_of=0 must be a whole number"),
        (config_of("llama", billhook={"shape": {}}), (1,), "its layers have widths of their own"),
        ("llama", (1,), "config: a transformers config is required, got str"),
        (
            transformers.Qwen2MoeConfig(
                **SMALL, moe_intermediate_size=16, shared_expert_intermediate_size=24, num_experts=4, num_experts_per_tok=2
            ),
            (1,),
            "has widths 16, 24: it must be one",
        ),
    ],
    ids=["no field", "not fewer", "no divisor", "a bool", "one already", "multiple", "uneven", "a name", "shared expert"],
)
def test_refused(config, arguments, match):
    with pytest.raises(ValueError, match=match):
        equal_parameters(config, *arguments)
