"""Heads, KV heads and channels of a streamed model: scored, chosen and removed as in memory."""

import pytest
import torch
import transformers

import billhook as bh
from kit.streams import check_the_same, same, written

KINDS = {
    transformers.LlamaForCausalLM: {"kv_heads": 0.5, "channels": 0.25},
    transformers.GPT2LMHeadModel: {"heads": 0.5, "channels": 0.25},  # tied, and queries, keys and values in one
    transformers.Phi3ForCausalLM: {"channels": 0.25},
    transformers.MixtralForCausalLM: {"kv_heads": 0.5},
    transformers.T5ForConditionalGeneration: {"channels": 0.25},
}
IMPORTANCES = [bh.OutputNorm(), bh.OBS(), bh.importance.WeightNorm()]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def folder(tmp_path, request):
    return written(request.param, tmp_path / "dense")


@pytest.mark.daily("LlamaForCausalLM-OBS", "T5*-OutputNorm")
@pytest.mark.parametrize("importance", IMPORTANCES, ids=lambda one: type(one).__name__)
def test_the_same_bytes_without_units(folder, tmp_path, importance):
    check_the_same(folder, tmp_path, importance, **KINDS[type(bh.load(folder))])


@pytest.mark.parametrize(
    "importance", [bh.OBS(), bh.OBS(passes=2), bh.importance.BlockInfluence(), bh.importance.ActivationNorm()], ids=str
)
def test_scores_are_the_same(importance):
    kind = "block" if isinstance(importance, bh.importance.BlockInfluence) else ["head", "channel"]
    batches = [{"input_ids": torch.arange(16)[None] + 16 * number} for number in range(16)]
    models = bh.load("tiny"), bh.stream("tiny")
    dense, streamed = (bh.score(model, bh.find_units(model, kind), importance, batches) for model in models)
    assert all(torch.equal(scores, streamed[name]) for name, scores in dense.items())


def test_new_values_are_taken(tmp_path):
    dense, streamed = bh.load("tiny"), bh.stream("tiny", tmp_path / "out")
    weights = {name: one.detach() * 2 for name, one in dense.named_parameters() if "down_proj" in name or "norm" in name}
    for model in (dense, streamed):
        bh.apply(model, bh.pruning.plan_units(model, {0: [3]}, "channel"), weights=weights)
    bh.save(streamed, tmp_path / "out")
    assert same(tmp_path / "out", dense)
