"""Masks and new values are put in the place of weights: bit for bit, all of them, and with little beside the model."""

import signal

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import billhook as bh
from billhook.sparsity import pruned as putting
from billhook.sparsity.pruned import Pruned, put
from kit.alive import Alive


def pruned(weight, values):
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    return Pruned.of(weight, torch.where(keep, weight * 2 if values else weight, 0), keep)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 13), (33, 40), (0, 4)])
def test_some_rows_at_a_time_make_the_same(monkeypatch, shape, dtype, values):
    monkeypatch.setattr(putting, "CPU_BLOCK", 100)
    straight, across = torch.randn(shape).to(dtype), torch.randn(shape[::-1]).to(dtype).t()
    before = [(weight, pruned(weight, values)) for weight in (straight, across)]
    expected = [one.weight(weight) for weight, one in before]
    put([one.part(weight) for weight, one in before])
    assert all(torch.equal(weight, new) for (weight, _), new in zip(before, expected, strict=True))
    assert not (straight == 0).logical_and(straight.signbit()).any()


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("at", [0, 1, 6])
def test_an_interrupt_is_raised_when_all_rows_are_there(monkeypatch, at, values):
    weight, calls = torch.randn(50, 16), []
    one = pruned(weight, values)
    expected, unpack = one.weight(weight), np.unpackbits

    def interrupted(*given, **named):
        calls.append(given)
        if len(calls) == at + 1:
            signal.raise_signal(signal.SIGINT)
        return unpack(*given, **named)

    monkeypatch.setattr(putting, "CPU_BLOCK", 128)
    monkeypatch.setattr(np, "unpackbits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        put([one.part(weight)])
    assert torch.equal(weight, expected)
    assert len(calls) == 7


@pytest.mark.parametrize("criterion", [bh.Magnitude(), bh.Wanda(), bh.Wanda(compares="layer"), bh.RIA()])
def test_pruning_takes_no_more_than_a_blocks_work_beside_the_model(criterion):
    config = LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    block = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    with Alive() as alive:
        bh.prune(model, criterion, [{"input_ids": torch.arange(8)[None]}], sparsity=0.5)
    assert 0 < alive.most < 1.5 * block


def failing(function, at):
    """A function that fails at some of its calls, as where memory ends."""
    calls = []

    def called(*given, **named):
        calls.append(given)
        if len(calls) in at:
            raise MemoryError("no memory is left")
        return function(*given, **named)

    return called


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("at", [1, 3, 7])
def test_where_memory_ends_half_way_what_was_put_by_is_used(monkeypatch, at, values):
    weight, taken = torch.randn(50, 16), []
    one, reserve = pruned(weight, values), putting._reserve
    expected = one.weight(weight)
    monkeypatch.setattr(putting, "CPU_BLOCK", 128)
    monkeypatch.setattr(putting, "_reserve", lambda *given: taken.append(reserve(*given)) or taken[0])
    monkeypatch.setattr(np, "unpackbits", failing(np.unpackbits, [at]))
    put([one.part(weight)])
    assert torch.equal(weight, expected)
    assert taken == [[]], "it is let go where it is needed"


def test_without_memory_for_a_step_nothing_changes(monkeypatch):
    weight = torch.randn(50, 16)
    one, before = pruned(weight, True), weight.clone()
    monkeypatch.setattr(torch, "empty_like", failing(torch.empty_like, [2]))
    with pytest.raises(MemoryError):
        put([one.part(weight)])
    assert torch.equal(weight, before)


def test_memory_that_does_not_come_back_is_told(monkeypatch):
    weight = torch.randn(50, 16)
    one = pruned(weight, False)
    monkeypatch.setattr(putting, "CPU_BLOCK", 128)
    monkeypatch.setattr(np, "unpackbits", failing(np.unpackbits, range(3, 99)))
    with pytest.raises(MemoryError):
        put([one.part(weight)])
