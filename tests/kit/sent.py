"""What ranks send each other in events under FSDP2, by the collectives that torch is called with, and what the manual reckons."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import billhook as bh
from kit import prunes
from kit.families import llama
from kit.fits import trainer
from kit.sharding import Own, sharding

READ = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
"""Linears of a block that read the same."""
SUMS, GATHERS, MEETS = "c10d.allreduce_", ("_c10d_functional.all_gather_into_tensor", "c10d._allgather_base_"), "c10d.allgather_"
SCATTERS = "c10d.scatter_"
BYTES = "c10d.allreduce_ of bytes"
"""Of plain data, which goes to all, and of masks."""
OTHERS = {"c10d.barrier", "c10d.broadcast_", "_c10d_functional.all_reduce", "_c10d_functional._wrap_tensor_autograd"}
"""Without data, or of some numbers."""
N = 2
"""Batches of each rank."""
OF_HEADS = 8 * (2 * 2 * (2 * 8) ** 2 + 4 * 8**2) + 24
"""Bytes that are summed for each attention."""
GIVEN = [(one,) for one in torch.randint(3, 60, (2 * N, 2, 12), generator=torch.Generator().manual_seed(5))]
FEW = {"at": 1, "measure_batches": 0, "calibration": GIVEN}


class Sent(TorchDispatchMode):
    """Keeps the bytes of each call of a collective within: of what is summed, was gathered, or is scattered by this rank."""

    def __init__(self):
        super().__init__()
        self.bytes = defaultdict(list)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls collectives by itself
        given = operation(*args, **(kwargs or {}))
        kind, _, name = operation._schema.name.partition("::")
        if "c10d" in kind and name != "wait_tensor":
            moved = given if "gather" in name else args[1] if name == "scatter_" else args
            sent = [one for one in tree_leaves(moved) if isinstance(one, torch.Tensor)]
            key = BYTES if name == "allreduce_" and sent[0].dtype == torch.uint8 else f"{kind}.{name}"
            self.bytes[key].append(sum(one.numel() * one.element_size() for one in sent))
        return given


def model():
    return llama(hidden_size=64, intermediate_size=160)


def linears(model):
    return [(name, linear.weight) for name, linear in model.model.named_modules() if isinstance(linear, torch.nn.Linear)]


def widths(model):
    """Of what linears read that read the same."""
    return [
        getattr(part, names[0]).in_features
        for layer in model.model.layers
        for names in READ
        for part in (layer.self_attn, layer.mlp)
        if hasattr(part, names[0])
    ]


def wanda(model):
    return 4 * sum(widths(model))


def solved(model):
    return sum(4 * width**2 for width in widths(model)) + sum((4 + 1) * weight.numel() for _, weight in linears(model))


def weights(model, *names):
    """Bytes of parameters whose names hold one of these."""
    return sum(4 * own.numel() for name, own in model.named_parameters() if any(one in name for one in names))


@dataclass(frozen=True)
class Event:
    """What happens, and bytes of what is summed and at most gathered: by the model, and what is in no block and in blocks.

    Attributes:
        scores: How many the first rank sends.
    """

    make: Callable[[], Any]
    summed: Callable[[Any], int]
    gathered: Callable[[Any, int, int], int]
    scores: int = 0


def carried_out(model, around, blocks, *names):
    """Bytes that are gathered while tensors of these names are cut, with what AdamW keeps of them."""
    cut = weights(model, *names)
    return around + 3 * blocks + 2 * cut - cut // 2


def pruned(model):
    return weights(model, "_proj.")


def tuned(model):
    """One step of a match for each block, as one of two batches is held out."""
    return wanda(model) + pruned(model)


BITS = 1 / 32
"""Of a weight in float32, which is a bit of a mask."""


def masked(model, around, blocks):
    """Bytes that are gathered to find masks, to share them out, to hold them, and to put them in place."""
    return around + blocks + int(3 * BITS * pruned(model))


def solved_for(model, around, blocks):
    """Bytes that are gathered where kept weights are new."""
    return around + blocks + int((3 * BITS + 2 * 0.5) * pruned(model))


ATTENTION, FORWARD, KV = ".self_attn.", ".mlp.", ("k_proj", "v_proj")
SENT = {
    "Magnitude": Event(lambda: bh.WeightPruning(bh.Magnitude(), 0.5, at=1, measure_batches=0), lambda _: 0, masked),
    "Wanda": Event(lambda: prunes.WeightPruning(bh.Wanda(), 0.5, **FEW), wanda, masked),
    "Wanda, matched": Event(
        lambda: prunes.WeightPruning(bh.Wanda(), 0.5, match=bh.criteria.BlockMatching(), **FEW), tuned, solved_for
    ),
    "SparseGPT": Event(lambda: prunes.WeightPruning(bh.SparseGPT(), 0.5, **FEW), solved, solved_for),
    "channels": Event(
        lambda: bh.StructuredPruning(bh.Amount(channels=0.5), repair=None, **FEW),
        lambda _: 16 * 2 * 160,
        lambda model, a, b: a + (1 + N) * b + carried_out(model, a, b, FORWARD),
        scores=2 * 160,
    ),
    "channels, by gradients": Event(
        lambda: bh.StructuredPruning(bh.Amount(channels=0.5), importance=bh.Taylor(), repair=None, **FEW),
        lambda _: 16 * 2 * 160,
        lambda model, a, b: a + 2 * N * b + carried_out(model, a, b, FORWARD),
        scores=2 * 160,
    ),
    "heads": Event(
        lambda: bh.HeadPruning(0.5, **FEW),
        lambda _: 16 * 2 * 8,
        lambda model, a, b: a + 2 * N * b + carried_out(model, a, b, ATTENTION),
        scores=2 * 8,
    ),
    "blocks": Event(lambda: bh.DepthPruning(1, **FEW), lambda _: 16 * 2, lambda _, a, b: a + (13 + N) * b, scores=2),
    "KV heads": Event(
        lambda: bh.KVHeadConversion(2, at=1, measure_batches=0), lambda _: 0, lambda model, a, b: a + b + 2 * weights(model, *KV)
    ),
    "KV heads, by svd": Event(
        lambda: bh.KVHeadConversion(2, method=bh.kv_methods.SVD(frequencies="fixed"), **FEW),
        lambda _: 2 * OF_HEADS,
        lambda model, a, b: a + 6 * b + 2 * weights(model, ATTENTION) + 2 * weights(model, *KV),
    ),
}
"""Of two blocks, in each 8 heads, of which four pairs share KV heads of width 8, and 160 channels."""


def sent_all(out):
    """What each of two processes runs: the bytes of each collective in an event."""
    for name, event in SENT.items():
        callback, counted = event.make(), Sent()

        def counting(*given, happen=callback.apply_event, counted=counted):
            with counted:
                return happen(*given)

        callback.apply_event = counting
        options = {"devices": 2, "strategy": sharding(2), "use_distributed_sampler": False, "limit_val_batches": 0}
        run = trainer(out, [callback], 2, **options)
        run.fit(Own(model))
        if run.is_global_zero:
            torch.save(dict(counted.bytes), Path(out, f"{name}, sent.pt"))
