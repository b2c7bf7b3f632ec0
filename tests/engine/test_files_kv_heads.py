"""Fewer KV heads in a streamed model: the same bytes as in memory."""

import pytest
import torch
import transformers

import billhook as bh
from kit import stopped
from kit.families import build
from kit.streams import same, written

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


def texts():
    """As many tokens as a refit needs."""
    rows = [torch.cat([batch["input_ids"].roll(7 * place) + place for place in range(4)]) for batch in stopped.batches()]
    return [{"input_ids": ids % 2048} for ids in rows]


@pytest.mark.daily("llama-*", "gemma2-aligned")
@pytest.mark.parametrize("method", ["mean", "first", "random", "aligned", "svd"])
def test_the_same_heads(folder, tmp_path, method):
    dense, streamed = bh.load(folder), bh.stream(folder, tmp_path / "out")
    given = rows() if method == "svd" else None
    plans = [bh.convert_kv_heads(model, 2, method, given) for model in (dense, streamed)]
    assert plans[0].text() == plans[1].text()
    assert streamed.config.num_key_value_heads == 2
    bh.save(streamed, tmp_path / "out")
    assert same(tmp_path / "out", dense)


def test_attentions_that_stay_in_memory(tmp_path):
    """The first block of T5 holds a bias for all others, and does not come and go."""
    found, shown = written(transformers.T5ForConditionalGeneration, tmp_path / "dense"), rows()
    shown = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in shown]
    dense, streamed = bh.load(found), bh.stream(found, tmp_path / "out")
    for model in (dense, streamed):
        bh.convert_kv_heads(model, 1, "svd", shown, encoder=True)
    bh.save(dense, tmp_path / "in memory")
    bh.save(streamed, tmp_path / "out")
    assert same(tmp_path / "out", bh.load(tmp_path / "in memory"))


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

    bh.load("tiny", dtype="float32").save_pretrained(tmp_path / "dense")
    bh.save(both(bh.stream(tmp_path / "dense", tmp_path / "out")), tmp_path / "out")
    assert same(tmp_path / "out", both(bh.load("tiny", dtype="float32")))


@pytest.mark.daily("svd")
@pytest.mark.parametrize("method", ["mean", "aligned", "svd", "auto"])
def test_repaired_with_the_same_bytes(tmp_path, method):
    dense, streamed = bh.load("tiny", dtype="float32"), bh.stream("tiny", tmp_path / "out", dtype="float32")
    for model in (dense, streamed):
        bh.convert_kv_heads(model, 2, method, texts(), repair=bh.RepairConfig())
    bh.save(streamed, tmp_path / "out")
    assert same(tmp_path / "out", dense)


@pytest.mark.daily("phi")
def test_the_best_method_with_the_same_bytes(folder, tmp_path):
    dense, streamed = bh.load(folder), bh.stream(folder, tmp_path / "out")
    for model in (dense, streamed):
        bh.convert_kv_heads(model, 2, "auto", rows(masked=True))
    bh.save(streamed, tmp_path / "out")
    assert same(tmp_path / "out", dense)


def test_refused(tmp_path):
    model = bh.stream("tiny", tmp_path / "out", dtype="float32")
    with pytest.raises(ValueError, match="batches: method='auto' needs at least 2, because some are held out; got 1"):
        bh.convert_kv_heads(model, 2, "auto", stopped.batches()[:1])
    with pytest.raises(ValueError, match="batches: repair needs at least 2, because some are held out; got 1"):
        bh.convert_kv_heads(model, 2, "svd", stopped.batches()[:1], repair=bh.RepairConfig())
    with pytest.raises(ValueError, match=r"has no values \(it is on the meta device\)\. Load all weights first"):
        bh.convert_kv_heads(model, 2, "svd")
    assert not (tmp_path / ".out.parts").exists()
