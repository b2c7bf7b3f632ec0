"""Experts, channels of experts and hidden dimensions of a streamed model: scored, chosen and removed as in memory."""

import pytest
import torch
import transformers

import billhook as bh
from billhook.importance.baselines import RandomUnits
from kit import stopped
from kit.streams import check_the_same, same, written

MIXTURES = [transformers.MixtralForCausalLM, transformers.Qwen2MoeForCausalLM, transformers.Qwen3MoeForCausalLM]
STREAMS = {
    transformers.LlamaForCausalLM: [bh.importance.WeightNorm(), bh.importance.ActivationNorm(), bh.OutputNorm(), bh.OBS()],
    transformers.GPT2LMHeadModel: [bh.importance.ActivationNorm()],  # tied, with positions of its own
    transformers.GemmaForCausalLM: [
        bh.importance.ActivationNorm()
    ],  # tied, and embeddings that make up for a number of the config
    transformers.MixtralForCausalLM: [RandomUnits()],
    transformers.T5ForConditionalGeneration: [bh.importance.WeightNorm()],
    transformers.BertForMaskedLM: [bh.importance.ActivationNorm()],
}


@pytest.mark.daily("experts and channels-Mixtral*")
@pytest.mark.parametrize("kind", MIXTURES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "amounts", [{"experts": 0.5}, {"channels": 0.25}, {"experts": 0.5, "channels": 0.25}], ids=lambda one: " and ".join(one)
)
def test_the_same_bytes_without_experts_and_their_channels(tmp_path, kind, amounts):
    check_the_same(written(kind, tmp_path / "dense"), tmp_path, bh.importance.WeightNorm(), **amounts)


@pytest.mark.daily("T5*")
@pytest.mark.parametrize(
    ("kind", "importance"),
    [(kind, one) for kind, some in STREAMS.items() for one in some],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_the_same_bytes_without_residual_channels(tmp_path, kind, importance):
    check_the_same(written(kind, tmp_path / "dense"), tmp_path, importance, residual=0.25)


@pytest.mark.parametrize("importance", [bh.importance.ActivationNorm(), bh.OutputNorm(), bh.OBS()], ids=str)
def test_residual_channels_have_the_same_scores(importance):
    models = bh.load("tiny"), bh.stream("tiny")
    batches = stopped.batches()
    scores = [bh.score(model, bh.find_units(model, "residual"), importance, batches) for model in models]
    assert all(torch.equal(one, scores[1][name]) for name, one in scores[0].items())


@pytest.mark.nightly
def test_residual_channels_after_others(tmp_path):
    def changed(model):
        for amounts in ({"channels": 0.25}, {"residual": 0.25}, {"kv_heads": 0.5}):
            bh.apply(model, bh.plan(model, bh.importance.WeightNorm(), **amounts))
        return model

    bh.save(changed(bh.stream("tiny", tmp_path / "out")), tmp_path / "out")
    assert same(tmp_path / "out", changed(bh.load("tiny")))
