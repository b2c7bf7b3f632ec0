"""Whole blocks of a streamed model: scored, chosen and removed as in memory."""

import pytest
import torch
import transformers

import billhook as bh
from billhook.engine.store import store_of
from kit import stopped
from kit.streams import same, written

KINDS = [transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel, transformers.T5ForConditionalGeneration]


def given(kind):
    batches = [{"input_ids": batch["input_ids"][:, :12] % 99} for batch in stopped.batches()]
    return [batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches] if kind is KINDS[2] else batches


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def folder(tmp_path, request):
    return written(request.param, tmp_path / "dense")


@pytest.mark.daily("LlamaForCausalLM", "T5ForConditionalGeneration")
def test_the_same_bytes_without_the_least_important_block(folder, tmp_path):
    dense, streamed = bh.load(folder), bh.stream(folder, tmp_path / "out")
    amount = bh.Amount(blocks=1, first=1)  # the first block of T5 has a bias for all
    plans = [bh.plan(model, batches=given(type(model)), amount=amount) for model in (dense, streamed)]
    assert plans[0].scores == plans[1].scores
    for model, plan in zip((dense, streamed), plans, strict=True):
        bh.apply(model, plan)
    bh.save(streamed, tmp_path / "out")
    assert same(tmp_path / "out", dense)


def test_then_and_before_zeros(tmp_path):
    def changed(model):
        bh.prune(model, bh.Wanda(), stopped.batches(), sparsity=0.25)
        bh.pruning.prune_units(model, [1], kind="block")
        bh.prune(model, bh.Wanda(), stopped.batches(), sparsity=0.5)
        return model

    bh.save(changed(bh.stream("tiny", tmp_path / "out")), tmp_path / "out")
    assert same(tmp_path / "out", changed(bh.load("tiny")))


def test_what_was_done_without_other_blocks_is_not_taken(tmp_path, monkeypatch):
    def work(gone):
        model = bh.stream("tiny", tmp_path / "out")
        bh.pruning.prune_units(model, [gone], kind="block")
        bh.prune(model, bh.Magnitude(), sparsity=0.5)
        bh.save(model, tmp_path / "out")

    written, go_on = stopped.stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        work(1)
    go_on()
    work(2)
    assert written == [f"model.layers.{number}" for number in (0, 1, 0, 1, 2, 0, 1, 2)]
    dense = bh.load("tiny")
    bh.pruning.prune_units(dense, [2], kind="block")
    bh.prune(dense, bh.Magnitude(), sparsity=0.5)
    assert same(tmp_path / "out", dense)


@torch.no_grad()
def test_other_values_are_computed_with_whenever_their_blocks_come():
    dense, streamed, ids = bh.load("tiny"), bh.stream("tiny"), torch.arange(16)[None]
    names = ["model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight", "model.norm.weight"]
    new, before = {name: 1.5 * dense.get_parameter(name) for name in names}, dense(ids).logits
    with store_of(dense).computing_with(new):
        expected = dense(ids).logits
    with store_of(streamed).computing_with(new):
        assert torch.equal(streamed(ids).logits, expected)
        with store_of(streamed).computing_with({names[0]: dense.get_parameter(names[0])}):  # the inner one counts
            assert not torch.equal(streamed(ids).logits, expected)
        assert torch.equal(streamed(ids).logits, expected)
    assert not torch.equal(expected, before)
    assert torch.equal(streamed(ids).logits, before)
