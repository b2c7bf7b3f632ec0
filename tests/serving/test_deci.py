"""Layers that differ, as GGUF of the architecture `deci`."""

import gguf
import pytest
import torch

import billhook as bh
from billhook.serving.check import serve_check
from billhook.serving.written import write_gguf
from kit import serving
from kit.serving import beside, longrope, small
from kit.shaped import keep

pytestmark = serving.pytestmark
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def narrowed(family, **changes):
    """A model whose second layer has 40 channels of 96, and of which the first layer of most families has half of its heads."""
    model = small(family, **changes)
    first, mlp = model.model.layers[0].self_attn, model.model.layers[1].mlp
    own = torch.arange(40)
    if family == "phi3":
        keep(mlp.gate_up_proj, torch.cat([own, own + 96]), 0, "out_features")
        mlp.gate_up_proj.out_features = 80
    else:
        bh.pruning.prune_units(model, {0: [1, 2]})
        assert len(first.q_proj.weight) == 32
        for linear in (mlp.gate_proj, mlp.up_proj):
            keep(linear, own, 0, "out_features")
    keep(mlp.down_proj, own, 1, "in_features")
    return model


@pytest.mark.daily("llama-*")
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"rope_parameters": longrope()}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("seed_oss", {"head_dim": 16}),
        ("phi3", {"num_key_value_heads": 2}),
    ],
)
def test_layers_that_differ_are_served(family, changes, tmp_path, converter):
    if changes.get("num_key_value_heads") == 2 and family == "llama":
        model = small(family, **changes)
        bh.pruning.prune_units(model, {1: [0, 2]})
        assert [len(layer.self_attn.q_proj.weight) for layer in model.model.layers] == [64, 32, 64]
    else:
        model = narrowed(family, **changes)
    assert bh.save(model, tmp_path / "model").way == "shaped"
    found = serve_check(beside(tmp_path / "model"), converter=converter, tokens=48, quantized=())
    assert found.supported, found
    assert found.difference < 1e-4
    assert found.reason.startswith("converted by billhook as architecture deci, with sizes per layer, text split as in gpt-2")


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_the_file_says_each_layer_and_keeps_the_bits(dtype, tmp_path, converter):
    model = narrowed("mistral").to({"f16": torch.float16, "bf16": torch.bfloat16}[dtype])
    bh.save(model, tmp_path / "model")
    write_gguf(str(beside(tmp_path / "model")), tmp_path / "out.gguf", converter, dtype)
    read = gguf.GGUFReader(tmp_path / "out.gguf")
    said = {key.removeprefix("deci."): field.contents() for key, field in read.fields.items()}
    assert said["general.architecture"] == "deci"
    assert said["attention.head_count"] == said["attention.head_count_kv"] == [2, 4, 4]
    assert said["feed_forward_length"] == [96, 40, 96]
    assert (said["block_count"], said["embedding_length"], said["attention.key_length"]) == (3, 64, 16)
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert len(said["tokenizer.ggml.tokens"]) == 2048
    held = {one.name: torch.tensor(gguf.quants.dequantize(one.data, one.tensor_type)) for one in read.tensors}
    layer = model.model.layers[1]
    assert torch.equal(held["blk.1.ffn_down.weight"], layer.mlp.down_proj.weight.float())
    assert torch.equal(held["blk.1.attn_v.weight"], layer.self_attn.v_proj.weight.float())
    keys, width = layer.self_attn.k_proj.weight.float(), 16
    for row, own in enumerate(held["blk.1.attn_k.weight"]):
        head, place = divmod(row, width)
        assert torch.equal(own, keys[head * width + place // 2 + place % 2 * width // 2])  # halves become pairs
