"""Makes public calls on a stand-in for a GPU, under a default device, and with half-precision attention: run as a script.

It says where that differs from what the CPU computes. Arguments are the place, a folder for files, and the names of calls.
"""

import copy
import io
import json
import math
import os
import sys
import traceback
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import billhook as bh
from billhook.cli.main import main as billhook
from billhook.model import surgery
from kit import prunes, shrinks, standin
from kit.families import llama, tokens
from kit.without_float64 import flat

KERNEL = "half_only"
FEW = bh.criteria.BlockMatching(steps=2)


def batches_on(device):
    torch.manual_seed(5)
    rows = [tokens(2, 16).to(device) for _ in range(4)]
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    rows[1]["attention_mask"][:, 12:] = 0
    return rows


def half_only(module, query, key, value, attention_mask, **options):
    """Attention that takes half precision alone, after the cast that transformers makes for such kernels."""
    dtype = next(layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)).weight.dtype
    query = query.to(dtype) if query.dtype == torch.float32 else query
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("only fp16 and bf16 are supported")
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def pruned(criterion, **how):
    how = how if "pattern" in how else how | {"sparsity": 0.5}
    return lambda model, batches, folder: prunes.prune(model, criterion, batches, **how).sparsity


def planned(importance=None, repair=None, **amounts):
    def work(model, batches, folder):
        plan = bh.plan(model, importance, batches, **amounts)
        weights = None if repair is None else bh.repair(model, plan, batches, repair)
        bh.apply(model, plan, weights=weights)
        return [number for ids in plan.units.values() for number in ids]

    return work


def scored(importance, kind="channel", **how):
    return lambda model, batches, folder: bh.score(model, bh.find_units(model, kind), importance, batches, **how)


def converted(method, **how):
    def work(model, batches, folder):
        bh.convert_kv_heads(model, 2, method, batches, **how)

    return work


def shrunk(model, batches, folder):
    return shrinks.shrink(model, batches, params=0.8, generations=1, candidates=2).left


def held(model, batches, folder):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = bh.prune(model, bh.Magnitude(), sparsity=0.5).masks(model)
    for _ in range(2):  # the second time as a resumed run
        holder = bh.hold_masks(model, optimizer, masks)
        model(**batches[0]).loss.backward()
        optimizer.step()
        masks = holder.state_dict()
        holder.detach()
    return float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean())


def masked(model, batches, folder):
    with bh.mask(model, {0: [1, 2]}), torch.no_grad():
        return model(**batches[0]).logits


def gated(model, batches, folder):
    with bh.gates(model, bh.find_units(model, "head")) as gates:
        model(**batches[0]).loss.backward()
        return {name: gate.grad for name, gate in gates.items()}


def saved(model, batches, folder):
    bh.pruning.prune_units(model, {0: [1]}, per="kv_head")
    bh.save(model, folder / "saved")
    return bh.load(folder / "saved").state_dict()


def streamed(model, batches, folder):
    model.cpu().save_pretrained(folder / "dense")
    stream = bh.stream(folder / "dense", folder / "out")
    bh.prune(stream, bh.Wanda(), batches, sparsity=0.5)
    bh.save(stream, folder / "out")
    return bh.load(folder / "out").state_dict()


def traced(model, batches, folder):
    structure, summary = bh.trace(model), bh.summary(model)
    with redirect_stdout(io.StringIO()) as text:
        billhook(["inspect", "tiny"])
    return [len(structure.groups), summary.params, len(text.getvalue())]


def with_text(work):
    """A call on the embedded model, which has a tokenizer."""

    def on_tiny(model, batches, folder):
        tiny = bh.load("tiny", dtype=str(model.dtype).removeprefix("torch.")).to(model.device)
        tiny.set_attn_implementation(model.config._attn_implementation)
        return work(tiny)

    return on_tiny


def refused(model, batches, folder):
    """Block outputs of a model on a device stay there, so that none would come to the folder."""
    with nullcontext() if model.device.type == "cpu" else pytest.raises(ValueError, match="^activations="):
        bh.prune(model, bh.Wanda(), batches, sparsity=0.5, activations=str(folder), dry_run=True)


def reduced(model, batches, folder):
    def reduce(tensor):
        assert tensor.device.type == model.device.type, "collectives take tensors of the device"
        return tensor

    found = dict(bh.plan(model, None, batches, channels=0.5, reduce=reduce).units)
    for importance, kind in ((bh.OBS(), "channel"), (bh.importance.BlockInfluence(), "block"), (bh.Taylor(), "head")):
        found |= {f"{kind} {name}": one for name, one in scored(importance, kind, reduce=reduce)(model, batches, folder).items()}
    return found


CALLS = {
    "prune Magnitude": (pruned(bh.Magnitude()), 0),
    "prune Magnitude of all": (pruned(bh.Magnitude(compares="global")), 0),
    "prune Wanda": (pruned(bh.Wanda()), 0),
    "prune Wanda 2:4": (pruned(bh.Wanda(), pattern="2:4"), 0),
    "prune RIA": (pruned(bh.criteria.RIA()), 0),
    "prune SparseGPT": (pruned(bh.SparseGPT()), 1e-5),
    "prune ALPS": (pruned(bh.criteria.ALPS(steps=3)), 0.1),
    "prune Refit": (pruned(bh.criteria.Refit(bh.Wanda())), 0.1),
    "prune OWL": (pruned(bh.Wanda(), allocation=bh.criteria.OWL()), 0),
    "prune match": (pruned(bh.Wanda(), match=FEW), 1e-5),
    "prune calibration": (
        with_text(lambda tiny: bh.prune(tiny, bh.Wanda(), bh.Calibration("tiny", tokens=64, length=32), sparsity=0.5).sparsity),
        0,
    ),
    "plan channels": (planned(bh.importance.WeightNorm(), channels=0.5), 0),
    "plan channels by default": (planned(channels=0.5), 0),
    "plan heads": (planned(bh.Taylor("first"), heads=0.5), 0),
    "plan blocks": (planned(blocks=1), 0),
    "plan hidden dimensions": (planned(bh.importance.WeightNorm(), residual=0.25), 0),
    "repair": (planned(bh.importance.WeightNorm(), repair=bh.RepairConfig(), heads=0.5, channels=0.5), 1e-4),
    "repair match": (planned(bh.importance.WeightNorm(), repair=bh.RepairConfig(match=FEW), channels=0.5), 1e-4),
    "score Taylor": (scored(bh.Taylor()), 1e-5),
    "score OBS": (scored(bh.OBS()), 1e-5),
    "score OutputNorm": (scored(bh.OutputNorm(), "head"), 1e-5),
    "score ActivationNorm": (scored(bh.importance.ActivationNorm()), 1e-5),
    "score WeightNorm": (scored(bh.importance.WeightNorm()), 1e-5),
    "score BlockInfluence": (scored(bh.importance.BlockInfluence(), "block"), 1e-5),
    "score GateGradient": (scored(bh.importance.GateGradient(), "head"), 1e-5),
    "score Ablation": (scored(bh.importance.Ablation(), "head"), 1e-5),
    "convert mean": (converted("mean"), 1e-5),
    "convert svd": (converted("svd"), 1e-4),
    "convert aligned": (converted("aligned"), 1e-4),
    "convert auto": (converted("auto"), 1e-4),
    "convert repair": (converted("svd", repair=bh.RepairConfig()), 1e-3),
    "convert match": (converted("svd", repair=bh.RepairConfig(match=FEW)), 1e-3),
    "hold_masks": (held, 1e-5),
    "mask": (masked, 1e-5),
    "gates": (gated, 1e-4),
    "shrink": (shrunk, 1e-3),
    "evaluate": (with_text(lambda tiny: bh.evaluate(tiny, "tiny", length=32, examples=2).perplexity), 1e-2),
    "generated": (with_text(lambda tiny: bh.generated(tiny, examples=2, length=16)[0]), 0),
    "save": (saved, 0),
    "stream": (streamed, 0),
    "trace": (traced, 0),
    "reduce": (reduced, 1e-5),
    "activations": (refused, 0),
}
PLACES = ("on a device", "on the default device", "beside the default device", "half kernel")


def difference(name, place, folder):
    """What is wrong with what a call gives at a place; nothing where it gives what it does on the CPU with sdpa."""
    work, most = CALLS[name]
    torch.manual_seed(3)
    near = llama(num_hidden_layers=3)
    near = near.bfloat16() if place == "half kernel" else near
    device = torch.device(standin.NAME, 0) if place.startswith("on ") else torch.device("cpu")
    far = copy.deepcopy(near).to(device)
    if place == "half kernel":
        far.set_attn_implementation(KERNEL)
    torch.manual_seed(4)
    (folder / "near").mkdir(parents=True)
    (folder / "far").mkdir()
    expected = work(near, batches_on("cpu"), folder / "near")
    batches = batches_on(device)
    torch.manual_seed(4)
    torch.set_default_device(standin.NAME if place.endswith("default device") else None)
    try:
        found = work(far, batches, folder / "far")
    finally:
        torch.set_default_device(None)
    pairs = list(zip(flat(expected), flat(found), strict=True))
    for key, value in near.state_dict().items():
        pairs += zip(flat(value), flat(far.state_dict()[key]), strict=True)
    wrong = [pair for pair in pairs if pair[0] != pair[1] and not math.isclose(*pair, rel_tol=most, abs_tol=most)]
    return f"{len(wrong)} of {len(pairs)} numbers differ: {wrong[:3]}" if wrong else ""


def main():
    place, folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    if place == "half kernel":
        AttentionInterface.register(KERNEL, half_only)
        AttentionMaskInterface.register(KERNEL, sdpa_mask)
    else:
        standin.WIDE = ()  # with float64, as CUDA
        registered = standin.Registered()  # noqa: F841 - for as long as the process lasts
        surgery._move = lambda *_: None  # a tensor may go to another device in its place on torch's own devices alone
    for name in names:
        try:
            said = difference(name, place, Path(folder, place, name))
        except Exception:
            said = traceback.format_exc()
        print(json.dumps([name, said]), flush=True)
    os._exit(0)  # at whose usual end autograd's thread for the device would abort


if __name__ == "__main__":
    main()
