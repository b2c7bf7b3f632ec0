"""What a config says of the blocks that remain: how many, a value for each, and numbers of single ones."""

import pytest

import billhook as bh
from kit.families import build, llama
from kit.units import other

TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
DEEP, TWO = {"num_hidden_layers": 4}, {"num_hidden_layers": 2}


def deepseek(first):
    return other("DeepseekV2ForCausalLM", first_k_dense_replace=first, **DEEP)


CASES = {
    "a number": (llama, [0], {"num_hidden_layers": 1}),
    "a list": (lambda: build("gemma3_text", layer_types=TYPES, **DEEP), [0, 3], TWO | {"layer_types": TYPES[1:3]}),
    "numbers": (lambda: build("qwen3_moe", mlp_only_layers=[0, 3], **DEEP), [1, 2], TWO | {"mlp_only_layers": [0, 1]}),
    "a number of first ones": (lambda: deepseek(2), [0, 3], TWO | {"first_k_dense_replace": 1}),
    "none has experts": (lambda: deepseek(4), [0, 1], TWO),
    "stages": (lambda: other("SwinForImageClassification"), {"swin.encoder.layers.2.blocks": [1]}, {"depths": (2, 2, 1, 2)}),
}


@pytest.mark.parametrize("case", CASES)
def test_fields_follow(case):
    make, gone, fields = CASES[case]
    plan = bh.pruning.plan_units(make(), gone, "block")
    assert plan.fields == fields
    if case == "a list":
        places = ["layer_idx", "self_attn.layer_idx"]
        assert plan.attributes == {f"model.layers.{n}.{place}": (n + 1, n) for n in range(2) for place in places}
