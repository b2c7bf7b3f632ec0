"""FSDP2 in one process: how much memory events take beside what the fit has, by the bytes of live tensors."""

import pytest
import torch

import billhook as bh
from kit.families import llama
from kit.fits import trainer
from kit.held import Held
from kit.sharding import Own

pytestmark = pytest.mark.slow
LAYERS, WIDTH = 6, 256
MOMENTS = 4 * WIDTH**2
"""Bytes of second moments of what a linear reads."""
FEW = {"calibration": [(torch.tensor([[5, 6, 7]]),)], "measure_batches": 0}
TWO = {"calibration": [(torch.randint(3, 60, (8, 3)),) for _ in range(2)], "measure_batches": 0}
"""Tokens enough to repair what reads a tenth of the channels, and little that is computed of them."""
EVENTS = {
    "masks, by gates": lambda: bh.HeadPruning(0.5, at=1, remove="never", **FEW),
    "heads": lambda: bh.HeadPruning(0.5, at=1, **FEW),
    "channels": lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=1, repair=None, **FEW),
    "channels, repaired": lambda: bh.StructuredPruning(bh.Amount(channels=0.9), at=1, repair=bh.Repair(), **TWO),
    "residual channels, by gradients": lambda: bh.StructuredPruning(bh.Amount(residual=0.5), at=1, repair=None, **FEW),
    "blocks": lambda: bh.DepthPruning(2, at=1, **FEW),
}
ASIDE = {"channels, repaired": 4 * LAYERS * WIDTH**2}
"""Bytes of weights that wait until tensors are cut: shards of what is refitted."""


def model():
    """Its blocks are large beside the rest, and beside what it computes of three tokens."""
    return llama(hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS)


def kept(lit, run):
    """The fit's own tensors: its shards, and what the optimizer keeps of them."""
    states = [state for optimizer in run.optimizers for state in optimizer.state.values()]
    return [*lit.parameters(), *(one for state in states for one in state.values())]


def size(parameters):
    return sum(one.numel() * one.element_size() for one in parameters)


@pytest.mark.parametrize("name", EVENTS)
def test_two_blocks_at_most_are_there_beside_what_the_fit_has(tmp_path, alone, name):
    callback, lit, found = EVENTS[name](), Own(model), []
    block = size(lit.net.model.layers[0].parameters())
    rest = size(lit.parameters()) - LAYERS * block
    happen, there = callback.carry_out, set()

    def carry_out(run, module, moment):
        for part in (module.net, *module.net.model.layers):
            part.reshard()
        there.update(module.parameters())
        with Held(kept(module, run)) as held:
            before = held.now()
            happen(run, module, moment)
        found.append(held.most - before)

    callback.carry_out = carry_out
    trainer(tmp_path, [callback], max_steps=2, strategy=alone, limit_val_batches=0).fit(lit)
    anew = size(set(lit.net.model.layers.parameters()) - there)  # what has changed is there twice, as it was and as it is
    assert len(callback.events) == len(found) == 1
    assert found[0] <= 2 * block + rest + anew + MOMENTS + ASIDE.get(name, 0), (found[0] / block, anew / block)
    assert "not repaired" not in callback.events[0]["what"]
