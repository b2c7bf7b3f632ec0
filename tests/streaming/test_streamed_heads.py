"""Fewer KV heads in a streamed model: the same bytes as in memory."""

import pytest
import torch

import billhook as bh
from kit import stopped
from kit.families import build

FAMILIES = {"llama": {}, "qwen2": {}, "gemma2": {}, "mixtral": {}, "phi": {}, "starcoder2": {}}


@pytest.fixture(params=FAMILIES)
def folder(tmp_path, request):
    build(request.param).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def rows(masked=False):
    generator = torch.Generator().manual_seed(0)
    found = [{"input_ids": torch.randint(3, 64, (2, 12), generator=generator)} for _ in range(3)]
    if masked:
        found[1]["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
        found[1]["attention_mask"][1, 9:] = 0
    return found


def same(folder, model):
    found = bh.load(folder).state_dict()
    return found.keys() == model.state_dict().keys() and all(torch.equal(found[n], one) for n, one in model.state_dict().items())


@pytest.mark.parametrize("method", ["mean", "first", "random", "aligned", "svd"])
def test_the_same_heads(folder, tmp_path, method):
    dense, streamed = bh.load(folder), bh.stream(folder, tmp_path / "out")
    given = rows() if method == "svd" else None
    plans = [bh.convert_kv_heads(model, 2, method, given) for model in (dense, streamed)]
    assert plans[0].text() == plans[1].text()
    assert streamed.config.num_key_value_heads == 2
    bh.save(streamed, tmp_path / "out")
    assert same(tmp_path / "out", dense)


def test_which_tokens_count(tmp_path):
    build("llama").save_pretrained(tmp_path / "dense")
    dense, streamed = bh.load(tmp_path / "dense"), bh.stream(tmp_path / "dense", tmp_path / "out")
    for model in (dense, streamed):
        bh.convert_kv_heads(model, 1, "svd", rows(masked=True))
    bh.save(streamed, tmp_path / "out")
    assert same(tmp_path / "out", dense)


def test_then_zeros(tmp_path):
    def both(model):
        bh.convert_kv_heads(model, 2)
        bh.prune(model, bh.Wanda(), stopped.batches(), sparsity=0.5)
        return model

    bh.load("tiny").save_pretrained(tmp_path / "dense")
    bh.save(both(bh.stream(tmp_path / "dense", tmp_path / "out")), tmp_path / "out")
    assert same(tmp_path / "out", both(bh.load("tiny")))


def test_refused(tmp_path):
    model = bh.stream("tiny", tmp_path / "out")
    with pytest.raises(
        ValueError, match="method='auto' compares whole models, and this one is streamed: name one, such as 'svd'"
    ):
        bh.convert_kv_heads(model, 2, "auto", stopped.batches())
    with pytest.raises(ValueError, match="repair: the model is streamed"):
        bh.convert_kv_heads(model, 2, "svd", stopped.batches(), repair=bh.Repair())
    with pytest.raises(ValueError, match="batches: method='svd' needs 1 at least; got 0"):
        bh.convert_kv_heads(model, 2, "svd")
    assert not (tmp_path / ".out.parts").exists()
