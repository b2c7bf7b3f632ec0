"""What billhook makes of each family, in llama.cpp: the logits and greedy tokens of transformers, or a reason."""

import os
from pathlib import Path

import pytest
import torch
import transformers

import billhook as bh
from billhook.adapters.lora import attach
from billhook.assets import model_path
from billhook.serving.check import serve_check
from kit import serving
from kit.serving import FAMILIES, beside, small

pytestmark = serving.pytestmark
EACH = range(3)  # layers
MODELS = str(Path(os.environ.get("BILLHOOK_MODELS", ""), "smollm2"))


def kv_heads(model):
    bh.convert_kv_heads(model, 2)


def heads(model):
    bh.pruning.prune_units(model, {layer: [layer] for layer in EACH})


def channels(model):
    bh.pruning.prune_units(model, {layer: range(0, 96, 3) for layer in EACH}, kind="channel")


def residual(model):
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), residual=0.25))


def blocks(model):
    bh.pruning.prune_units(model, [1], kind="block")


def differ(model):
    bh.pruning.prune_units(model, {1: range(0, 96, 3)}, kind="channel")


def lora(model, groups=2):
    attach(model, bh.training.LoRA(r=2))
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    bh.convert_kv_heads(model, groups)


WAYS = [kv_heads, heads, channels, residual, blocks, differ, lora]


TOKENIZER = "llama.cpp's converter cannot read the tokenizer (FileNotFoundError: "
NO = {
    ("qwen3", differ): "llama.cpp's architecture deci does not compute qwen3",
    ("gemma2", differ): "llama.cpp's architecture deci does not compute gemma2",
    (
        "gemma2",
        heads,
    ): "llama.cpp's architecture deci does not compute gemma2",  # whose config wants heads that divide its width
    ("gemma2", blocks): "from token 17 of 32",  # llama.cpp takes every second layer for one that looks back without limit
}
"""What llama.cpp cannot run."""


@pytest.mark.daily("llama-channels", "phi3-heads", "gemma2-blocks")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_made_is_served(family, way, tmp_path, converter, llama_cpp):
    model = small(family)
    before = model.num_parameters()
    way(model)
    assert model.num_parameters() != before
    bh.save(model, tmp_path / "model")
    found = serve_check(beside(tmp_path / "model"), llama_cpp, converter, tokens=32, new_tokens=8, quantized=())
    reason = NO.get((family, way))
    if reason is not None:
        assert not found.supported
        assert reason in found.reason
        return
    assert found.difference < 1e-3
    assert found.matching_tokens == (8, 8)
    assert found.supported == (family != "gemma2"), found
    assert found.supported or found.reason.startswith(TOKENIZER)  # of Gemma 2, the converter reads SentencePiece alone


@pytest.mark.parametrize("way", [blocks, channels], ids=lambda way: way.__name__)
def test_windows_that_the_row_does_not_reach(way, tmp_path, converter, llama_cpp):
    model = small("gemma2", sliding_window=64)
    way(model)
    bh.save(model, tmp_path / "model")
    found = serve_check(beside(tmp_path / "model"), llama_cpp, converter, tokens=32, new_tokens=8, quantized=())
    assert found.difference < 1e-3
    assert ("valid up to 64 tokens, because the engine uses other attention windows" in found.reason) == (way is blocks)


SHARES = {
    "channels": {"channels": 0.2},
    "heads": {"kv_heads": 0.34},
    "residual": {"residual": 0.125},
    "blocks": {"blocks": 2},
    "differ": {"amount": bh.Amount(channels=0.2, first=1, last=2)},
}
REAL = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not Path(MODELS, "config.json").is_file(), reason="BILLHOOK_MODELS names no folder with smollm2"),
]


@pytest.mark.daily("tiny-kv_heads", "tiny-differ")
@pytest.mark.parametrize("way", ["kv_heads", "lora", *SHARES])
@pytest.mark.parametrize("name", ["tiny", pytest.param(MODELS, marks=REAL, id="smollm2")])
def test_what_is_made_of_trained_models_is_served(name, way, tmp_path, converter, llama_cpp):
    """As users would: one KV head is left, a third of the heads goes, a fifth of the channels, an eighth of the width, ..."""
    model = bh.load(name, "float32")
    if way == "lora":
        lora(model, 1)
    elif way == "kv_heads":
        bh.convert_kv_heads(model, 1)
    else:
        importance = bh.importance.BlockInfluence() if way == "blocks" else bh.importance.WeightNorm()
        batches = [{"input_ids": torch.arange(100, 164)[None]}] if way == "blocks" else None
        bh.apply(model, bh.plan(model, importance, batches, **SHARES[way]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path(name))
    bh.save(model, tmp_path / "model", tokenizer)
    found = serve_check(tmp_path / "model", llama_cpp, converter, tokens=32, new_tokens=16, quantized=())
    assert found.supported, found
