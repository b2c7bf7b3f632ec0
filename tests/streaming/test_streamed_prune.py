"""Streamed models: the same logits, and the same bytes after pruning, as in memory."""

import pytest
import torch
import transformers
from small_configs import small_config

import billhook as bh
from billhook.model.runs.inputs import make_inputs
from billhook.streaming.load import stream

FAMILIES = [
    "Llama",
    "GPT2LMHead",
    "T5ForConditionalGeneration",
    "Mixtral",
    "Phi3",
    "Qwen2Moe",
    "BertForMaskedLM",
    "OPT",
    "BartForConditionalGeneration",
    "Gemma2",
]


def class_of(family):
    return next(found for end in ("", "ForCausalLM", "Model") if (found := getattr(transformers, family + end, None)))


@pytest.fixture(params=FAMILIES)
def folder(tmp_path, request):
    kind = class_of(request.param)
    torch.manual_seed(0)
    model = kind(small_config(kind.config_class)).eval()
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def shown(model, count=3):
    batches = []
    for seed in range(count):
        torch.manual_seed(seed)
        batches.append(make_inputs(model, 2, 12))
    return batches


def test_the_same_logits(folder):
    dense, streamed = bh.load(folder), stream(folder)
    inputs = shown(dense, 1)[0]
    with torch.no_grad():
        assert torch.equal(dense(**inputs)[0], streamed(**inputs)[0])


@pytest.mark.filterwarnings("ignore:these hold several matrices")
@pytest.mark.parametrize("criterion", [bh.Magnitude(), bh.Wanda(), bh.SparseGPT()])
def test_the_same_bytes(folder, tmp_path, criterion):
    dense, streamed = bh.load(folder), stream(folder, tmp_path / "out")
    plans = [bh.prune(model, criterion, shown(dense), sparsity=0.5) for model in (dense, streamed)]
    assert plans[0].text() == plans[1].text()
    bh.save(streamed, tmp_path / "out")
    bh.save(dense, tmp_path / "in memory")
    one, other = (bh.load(tmp_path / name).state_dict() for name in ("in memory", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
