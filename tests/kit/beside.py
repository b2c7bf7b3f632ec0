"""How much memory an event under FSDP2 takes beside what the fit has, by the bytes of live tensors."""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import billhook as bh
from kit import prunes
from kit.families import llama
from kit.fits import trainer
from kit.held import Held
from kit.sharding import Own, sharding

LAYERS, WIDTH = 4, 256
FEW = {"calibration": [(torch.tensor([[5, 6, 7]]),)] * 2, "measure_batches": 0}
MORE = {"calibration": [(torch.arange(3, 27).view(8, 3),)] * 4, "measure_batches": 0}
"""Tokens enough to repair what reads a tenth of the channels, and little that is computed of them."""
EVENTS = {
    "masks, by gates": lambda: bh.HeadPruning(0.5, at=1, remove="never", **FEW),
    "heads": lambda: bh.HeadPruning(0.5, at=1, **FEW),
    "channels": lambda: bh.StructuredPruning(bh.Amount(channels=0.5), at=1, repair=None, **FEW),
    "channels, repaired": lambda: bh.StructuredPruning(bh.Amount(channels=0.9), at=1, repair=bh.RepairConfig(), **MORE),
    "hidden dimensions": lambda: bh.StructuredPruning(bh.Amount(residual=0.5), at=1, repair=None, **FEW),
    "hidden dimensions, by gradients": lambda: bh.StructuredPruning(
        bh.Amount(residual=0.5), at=1, importance=bh.Taylor(), repair=None, **FEW
    ),
    "KV heads": lambda: bh.KVHeadConversion(2, at=1, measure_batches=0),
    "KV heads, with data": lambda: bh.KVHeadConversion(2, at=1, method="svd", **FEW),
    "blocks": lambda: bh.DepthPruning(2, at=1, **FEW),
}
ASIDE = {"channels, repaired": 1, "KV heads, with data": 3}
"""Of how many weights of WIDTH x WIDTH in each block new values wait, as shards, until tensors are cut."""
HALF = {"sparsity": 0.5, "at": 1, "measure_batches": 0, "calibration": FEW["calibration"] * 2}
ZEROS = {
    "zeros, all linears together": lambda: prunes.WeightPruning(bh.Magnitude(compares="global"), **HALF),
    "zeros, Wanda": lambda: prunes.WeightPruning(bh.Wanda(), **HALF),
    "zeros, OWL": lambda: prunes.WeightPruning(bh.Wanda(), allocation=bh.criteria.OWL(), **HALF),
    "zeros, SparseGPT": lambda: prunes.WeightPruning(bh.SparseGPT(), **HALF),
    "zeros, Refit": lambda: prunes.WeightPruning(bh.criteria.Refit(), **HALF),
    "zeros, ALPS": lambda: prunes.WeightPruning(bh.criteria.ALPS(steps=4), **HALF),
    "zeros, matched": lambda: prunes.WeightPruning(bh.Wanda(), match=bh.criteria.BlockMatching(), **HALF),
}
EVENTS |= ZEROS
ON_TWO = ["channels, repaired", "KV heads, with data", "hidden dimensions, by gradients", *ZEROS]
"""Events that each of two ranks measures: those whose new values wait or whose masks stay, and one that needs gradients."""
SOLVED = "zeros, SparseGPT", "zeros, Refit", "zeros, ALPS", "zeros, matched"
"""Those of which half of the weights are new, and wait as shards until all are put, beside a byte for each weight's mask."""

HEADS, SHARED, HEAD = 4, 2, 32
"""KV heads, how many become one, and how wide each is."""
OF_HEADS = 2 * 8 * (2 * HEADS // SHARED * (SHARED * HEAD) ** 2 + HEADS * HEAD**2) + 8 * 3 * WIDTH**2
MOMENTS = {"KV heads, with data": OF_HEADS}
MOMENTS |= dict.fromkeys(SOLVED, 4 * 4 * WIDTH**2) | {"zeros, ALPS": 4 * (4 + bh.criteria.ALPS.copies) * WIDTH**2}
"""Bytes of second moments: of the heads of an attention, as sums and as means, and its weights in float64; of what one linear
reads, or all of a block, and of what is computed of them."""
TUNED = {"zeros, matched": 5}
"""How many blocks are there besides while one is tuned: what Adam tunes, its moments and gradients, what was best, and masks."""


def model(layers=LAYERS):
    """Its blocks are large beside the rest, and beside what it computes of a few tokens."""
    return llama(hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=layers)


@dataclass(frozen=True)
class Beside:
    """Bytes that an event took at most on this rank, beside what the fit had; and those of a block, and of what is in none."""

    most: int
    block: int
    rest: int
    moments: int
    shards: int  # of what has changed, twice, as it was and as it is, and of what waited, on this rank
    tuned: int  # what tuning a block takes besides
    what: str  # happened

    @property
    def allowed(self):
        """Two blocks, what is in none, shards, and second moments; and what Adam has while it tunes a block."""
        return 2 * self.block + self.rest + self.shards + self.moments + self.tuned


def kept(lit, run):
    """The fit's own tensors: its shards, and what the optimizer keeps of them."""
    states = [state for optimizer in run.optimizers for state in optimizer.state.values()]
    return [*lit.parameters(), *(one for state in states for one in state.values())]


def size(parameters):
    return sum(one.numel() * one.element_size() for one in parameters)


def zeroed(name, layers):
    """Bytes of the masks of all linears, and of what half of their weights become."""
    linears = sum(part.weight.numel() for part in layers.modules() if isinstance(part, torch.nn.Linear))
    return linears * ((name in ZEROS) + 4 * (name in SOLVED) // 2)


def beside(folder, name, strategy, ranks=1, layers=LAYERS):
    """Fits, and measures an event."""
    callback, lit, found = EVENTS[name](), Own(partial(model, layers)), []
    block, zeros = size(lit.net.model.layers[0].parameters()), zeroed(name, lit.net.model.layers)
    rest = size(lit.parameters()) - layers * block
    happen, there = callback.apply_event, set()

    def apply_event(run, moment):
        module = run.module
        for part in (module.net, *module.net.model.layers):
            part.reshard()
        there.update(module.parameters())
        with Held(kept(module, run)) as held:
            before = held.now()
            happen(run, moment)
        found.append(held.most - before)

    callback.apply_event = apply_event
    options = {"devices": ranks, "use_distributed_sampler": False} if ranks > 1 else {}
    trainer(folder, [callback], max_steps=2, strategy=strategy, limit_val_batches=0, **options).fit(lit)
    (most,), (event,) = found, callback.events
    shards = size(set(lit.net.model.layers.parameters()) - there) + ASIDE.get(name, 0) * 4 * layers * WIDTH**2 + zeros
    moments, tuned = MOMENTS.get(name, 4 * WIDTH**2), TUNED.get(name, 0) * block
    return Beside(most, block, rest, moments, shards // ranks, tuned, event["what"])


def measure_all():
    """What each of two processes runs, after other fits."""
    _, out, names = json.loads(sys.argv[1])
    measure([name for name in ON_TWO if name in names], out)
    measure([name for name in ZEROS if name in names], out, 2 * LAYERS)


def measure(names, out, layers=LAYERS):
    """Measures events on both of two ranks."""
    for name in names:
        own, gathered = beside(out, name, sharding(2), ranks=2, layers=layers), [None, None]
        torch.distributed.all_gather_object(gathered, (own.most, own.allowed, own.shards))
        torch.save([True, gathered], Path(out, f"{name}, beside {layers}.pt"))
