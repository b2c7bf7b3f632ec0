"""llama.cpp runs what the manual says, and nothing else."""

import pytest
import torch

import billhook as bh
from billhook.serving.check import serve_check
from kit import families, serving
from kit.serving import beside

pytestmark = serving.pytestmark
WIDTH = {"hidden_size": 96}  # which Gemma's config wants the number of heads to divide


def made(family, **changes):
    """A random model, also of families that the kit does not name."""
    families.EXTRA.setdefault(family, {})
    torch.manual_seed(0)
    return families.build(family, **serving.SMALL | serving.FAMILIES.get(family, {}) | changes)


def runs(folder, converter) -> bool:
    """Whether llama.cpp computes the same logits; the embedded tokenizer is not one that it reads for all families."""
    difference = serve_check(beside(folder), converter=converter, tokens=32, quantized=()).difference
    return difference is not None and difference < 1e-3


def three_of_four(family):
    model = made(family, **WIDTH)
    bh.pruning.prune_units(model, {0: [1], 1: [2], 2: [0]})
    return model


@pytest.mark.daily("llama-True", "granite-False")
@pytest.mark.parametrize(
    ("family", "serves"),
    [("llama", True), ("qwen2", True), ("qwen3", True), ("gemma2", True), ("smollm3", True), ("granite", False), ("phi3", True)],
)
def test_where_heads_are_gone(family, serves, tmp_path, converter):
    assert bh.save(three_of_four(family), tmp_path / "model").way in ("plain", "equivalent")
    assert runs(tmp_path / "model", converter) == serves


@pytest.mark.daily("qwen2-channels")
@pytest.mark.parametrize(("family", "what"), [("llama", "kv heads"), ("qwen2", "channels"), ("mistral", "blocks")])
def test_where_others_are_gone(family, what, tmp_path, converter):
    model = made(family)
    if what == "kv heads":
        bh.convert_kv_heads(model, 1)
    elif what == "channels":
        bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), channels=0.25))
    else:
        bh.pruning.prune_units(model, {"model.layers": [1]}, kind="block")
    bh.save(model, tmp_path / "model")
    assert runs(tmp_path / "model", converter)


YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
MIXTURES = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 96, "head_dim": 16, "norm_topk_prob": True},
    "gpt_oss": {
        "num_local_experts": 8, "head_dim": 64, "num_experts_per_tok": 2, "sliding_window": 16, "max_position_embeddings": 131072,
        "rope_parameters": YARN | {"rope_theta": 150000.0, "truncate": True},  # as llama.cpp does
    },
}  # fmt: skip


@pytest.mark.daily("mixtral-channels", "gpt_oss-experts")
@pytest.mark.parametrize("what", ["experts", "channels", "weights"])
@pytest.mark.parametrize("family", list(MIXTURES))
def test_mixtures(family, what, tmp_path, converter):
    model, batches = made(family, **MIXTURES[family]), [{"input_ids": families.tokens(4, 32)} for _ in range(2)]
    if what == "weights":
        bh.prune(model, bh.Wanda(), batches, sparsity=0.5)
    else:
        plan = bh.plan(model, batches=batches, **{what: 0.25})
        bh.apply(model, plan, weights=bh.repair(model, plan, batches))
    bh.save(model, tmp_path / "model")
    result = serve_check(beside(tmp_path / "model"), converter=converter, tokens=32, quantized=())
    assert result.difference < 1e-3
    assert "attention windows" not in str(result)


@pytest.mark.daily("llama*")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_where_residual_channels_are_gone(family, tmp_path, converter):
    model = made(family)
    bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), residual=0.25))
    bh.save(model, tmp_path / "model")
    assert runs(tmp_path / "model", converter)


@pytest.mark.parametrize("family", ["qwen2", "starcoder2"])
def test_a_family_that_computes_the_width_of_heads(family, tmp_path, converter):
    model = made(family, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    model.save_pretrained(tmp_path / "model")
    assert not runs(tmp_path / "model", converter)


def test_layers_that_differ(tmp_path, converter):
    model = made("llama")
    bh.pruning.prune_units(model, {0: [1]})
    bh.save(model, tmp_path / "model")
    assert runs(tmp_path / "model", converter)
