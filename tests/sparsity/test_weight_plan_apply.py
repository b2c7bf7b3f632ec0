"""Masks and new values are put in the place of weights: bit for bit, again after an interrupt, with little beside the model."""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import billhook as bh
from billhook.sparsity import weight_plan as putting
from billhook.sparsity.weight_plan import PrunedLayer
from kit import prunes
from kit.alive import Alive
from kit.families import llama, tokens


def pruned(weight, values):
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    return PrunedLayer.of(weight, torch.where(keep, weight * 2 if values else weight, 0), keep)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 5), (700, 401), (0, 4)])
def test_some_rows_at_a_time_make_the_same(shape, dtype, values):
    straight, across = torch.randn(shape).to(dtype), torch.randn(shape[::-1]).to(dtype).t()
    before = [(weight, pruned(weight, values)) for weight in (straight, across)]
    expected = [one.weight(weight) for weight, one in before]
    for weight, one in before:
        one.put_into(weight)
    assert all(torch.equal(weight, new) for (weight, _), new in zip(before, expected, strict=True))
    assert not (straight == 0).logical_and(straight.signbit()).any()


@pytest.mark.parametrize("at", [2, 12, 30, 45])
@pytest.mark.parametrize(("criterion", "amount"), [
    (bh.Magnitude(), {"sparsity": 0.5}),
    (bh.Magnitude(compares="global"), {"sparsity": 0.7}),
    (bh.Wanda(), {"sparsity": 0.5}),
    (bh.Wanda(), {"pattern": "2:4"}),
])  # fmt: skip
def test_the_same_call_again_finishes_what_an_interrupt_left(monkeypatch, criterion, amount, at):
    model, batches, calls = llama(), [{"input_ids": tokens()}], []
    straight = copy.deepcopy(model)
    prunes.prune(straight, criterion, batches, **amount)
    expected = straight.state_dict()
    put_into, unpack = PrunedLayer.put_into, np.unpackbits

    def interrupting(*args, **options):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return unpack(*args, **options)

    def interrupted(pruned, weight):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np, "unpackbits", interrupting)
            put_into(pruned, weight)

    monkeypatch.setattr(putting, "CPU_BLOCK", 100)
    monkeypatch.setattr(PrunedLayer, "put_into", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prunes.prune(model, criterion, batches, **amount)
    assert any(not torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    prunes.prune(model, criterion, batches, **amount)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("criterion", [bh.Magnitude(), bh.Wanda(), bh.Wanda(compares="layer"), bh.criteria.RIA()])
def test_pruning_takes_no_more_than_a_blocks_work_beside_the_model(criterion):
    config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    with Alive() as alive:
        bh.prune(model, criterion, [{"input_ids": torch.arange(8)[None]}], sparsity=0.5)
    assert 0 < alive.most < 1.5 * block
