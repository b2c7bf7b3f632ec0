"""Does on a device without float64 what it does on the CPU, and says where that differs: run as a script."""

import copy
import json
import math
import os
import traceback
from types import SimpleNamespace

import torch

import billhook as bh
from billhook.cli.machine import device_of
from billhook.engine.state import random_state, seeded, set_random_state
from billhook.fit.ranks import sum_over_ranks
from billhook.fit.run import LoggedMetrics
from billhook.model import surgery
from kit import prunes
from kit.families import llama, tokens
from kit.standin import NAME, Registered


def batches(device):
    torch.manual_seed(5)
    return [{"input_ids": own, "labels": own} for own in (tokens(2, 16).to(device) for _ in range(3))]


def pruned(criterion, **how):
    return lambda model, device: prunes.prune(model, criterion, batches(device), sparsity=0.5, **how).sparsity


def repaired(model, device):
    plan = bh.plan(model, bh.importance.WeightNorm(), heads=0.5, channels=0.5)
    bh.apply(model, plan, weights=bh.repair(model, plan, batches(device)))


def converted(model, device):
    bh.convert_kv_heads(model, 2, "svd", batches(device), repair=bh.RepairConfig())


def scored(importance, kind):
    return lambda model, device: bh.score(model, bh.find_units(model, kind), importance, batches(device))


def validated(model, device):
    logged = LoggedMetrics()
    for value, size in ((1.0, 2), (2.5, 6)):
        logged("loss", value, batch_size=size)
        logged("least", torch.tensor(value, device=device), batch_size=size, reduce_fx=min)
    return logged.values(SimpleNamespace(world_size=1, device=device, reduce=lambda tensor, reduction="sum": tensor))


def summed_over_ranks(model, device):
    fit = SimpleNamespace(world_size=1, device=device, reduce=lambda tensor: 2 * tensor)
    return sum_over_ranks(fit, torch.tensor([0.5, 3.0], dtype=torch.float64))


def drawn(model, device):
    """Random numbers of the device come from a seed within, and are as before afterwards; they are kept and put back."""
    before = random_state(device)
    with seeded(7, device):
        inside = random_state(device)
    assert (random_state(device).get(NAME, torch.zeros(1)) == before.get(NAME, torch.zeros(1))).all()
    set_random_state(inside, device)
    found = random_state(device)
    set_random_state(before, device)
    assert device.type == "cpu" or found[NAME].tolist() == [7] * 8
    return found["torch"]


WORKS = {
    "Wanda": (pruned(bh.Wanda()), 0),
    "SparseGPT": (pruned(bh.SparseGPT()), 1e-5),
    "ALPS": (pruned(bh.criteria.ALPS(steps=3)), 0.1),  # as much as another order of the batches makes
    "BlockMatching": (pruned(bh.Wanda(), match=bh.criteria.BlockMatching(steps=1)), 1e-5),
    "RepairConfig": (repaired, 1e-4),
    "SVD": (converted, 1e-5),
    "Taylor": (scored(bh.Taylor("first"), "head"), 1e-5),
    "OBS": (scored(bh.OBS(), "channel"), 1e-5),
    "ActivationNorm": (scored(bh.importance.ActivationNorm(), "head"), 1e-5),
    "WeightNorm": (scored(bh.importance.WeightNorm(), "head"), 1e-5),
    "BlockInfluence": (scored(bh.importance.BlockInfluence(), "block"), 1e-5),
    "validation": (validated, 0),
    "sums": (summed_over_ranks, 0),
    "random numbers": (drawn, 0),
    "auto": (lambda model, device: device_of("auto").type, 0),
}


def flat(found):
    """What was found, as numbers."""
    if isinstance(found, dict):
        return [one for own in found.values() for one in flat(own)]
    if isinstance(found, torch.Tensor):
        return found.detach().cpu().flatten().tolist()
    return list(found) if isinstance(found, list) else [found]


def difference(work, most):
    """What is wrong with what a work gives on the device; nothing where it gives what it does on the CPU."""
    torch.manual_seed(3)
    near = llama()
    device = torch.device(NAME, 0)
    far = copy.deepcopy(near).to(device)
    try:
        expected, found = work(near, torch.device("cpu")), work(far, device)
    except Exception:
        return traceback.format_exc()
    pairs = list(zip(flat(expected), flat(found), strict=True))
    for name, value in near.state_dict().items():
        pairs += zip(flat(value), flat(far.state_dict()[name]), strict=True)
    wrong = [pair for pair in pairs if pair[0] != pair[1] and not math.isclose(*pair, rel_tol=0, abs_tol=most)]
    return f"{len(wrong)} of {len(pairs)} numbers differ: {wrong[:3]}" if wrong else ""


def main():
    torch.set_num_threads(1)
    registered = Registered()
    surgery._move = lambda *_: None  # a tensor may go to another device in its place on torch's own devices alone
    assert torch.accelerator.current_accelerator().type == NAME
    for name, (work, most) in WORKS.items():
        print(json.dumps([name, difference(work, most)]), flush=True)
    del registered
    os._exit(0)  # at whose usual end autograd's thread for the device would abort


if __name__ == "__main__":
    main()
