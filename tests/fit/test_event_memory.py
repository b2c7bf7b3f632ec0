"""How much memory an event takes on one device beside what the fit has; that of FSDP2 is in test_shards_memory.py."""

import pytest

import billhook as bh
from kit import shrinks
from kit.beside import FEW, kept, size
from kit.families import llama
from kit.fits import trainer
from kit.held import Held
from kit.sharding import Own

EVENTS = {
    "channels": lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=1, repair=None, **FEW),
    "KV heads": lambda: bh.KVHeadConversion(1, at=1, measure_batches=0),
    "units, then blocks": lambda: shrinks.Shrinking(
        params=0.6, at=1, repair=None, generations=0, **FEW | {"calibration": FEW["calibration"] * 2}
    ),
}


def beside(folder, name, layers):
    """Bytes at most beside what the fit had, and those of new parameters."""
    lit = Own(lambda: llama(hidden_size=128, intermediate_size=512, num_hidden_layers=layers, num_key_value_heads=4))
    callback, found = EVENTS[name](), []
    happen = callback.run_change

    def run_change(run, *rest):
        module = run.module
        there = set(module.parameters())
        with Held(kept(module, run) + [p.grad for p in module.parameters()]) as held:
            before = held.now()
            event = happen(run, *rest)
        found.extend([held.most - before, size(set(module.parameters()) - there)])
        return event

    callback.run_change = run_change
    trainer(folder, [callback], max_steps=2, limit_val_batches=0).fit(lit)
    return found


@pytest.mark.daily("channels")
@pytest.mark.parametrize("name", EVENTS)
def test_an_event_takes_no_more_than_a_step_has(tmp_path, name):
    """New values, and of what an optimizer keeps one parameter's, take less than gradients that have gone, at any depth."""
    found = [beside(tmp_path, name, layers) for layers in (2, 6)]
    assert all(most <= 0 < new for most, new in found), found
