"""What calibration computes, in floating-point operations: each block once without its last linear, and once as it becomes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import billhook as bh
from kit import prunes
from kit.families import llama

BATCHES = 12


def operations(call):
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        call()
    return counted.get_total_flops()


@pytest.mark.parametrize("sequential", ["block", "layer", "none"])
def test_no_block_is_computed_once_more_than_its_linears_need(sequential):
    model = llama()
    batches = [{"input_ids": torch.randint(3, 60, (2, 16))} for _ in range(BATCHES)]
    every, body = operations(lambda: model(**batches[0])), operations(lambda: model.model(**batches[0]))
    block = body - operations(lambda: llama(num_hidden_layers=len(model.model.layers) - 1).model(**batches[0]))
    last = [operations(lambda own=layer.mlp.down_proj: own(torch.zeros(2, 16, own.in_features))) for layer in model.model.layers]
    # one run goes to the end everywhere, as only then is it known that each linear is called once; no other passes the last block
    straight = every + (BATCHES - 1) * (body - last[-1])
    seen = BATCHES * (body - sum(last)) + sum(last)
    twice = seen + len(last) * block + every - body + (BATCHES - 1) * (len(last) - 1) * block
    needed = {"block": twice, "layer": straight, "none": straight}
    counted = operations(lambda: prunes.prune(model, bh.Wanda(), batches, sparsity=0.5, sequential=sequential))
    assert counted == needed[sequential]
