"""Has a stand-in for a GPU compute what the CPU computes, block by block, and says where that differs: run as a script."""

import gc
import json
import math
import os
import sys
import traceback
import weakref
from functools import partial
from pathlib import Path

import torch
from torch import nn

import billhook as bh
from billhook.engine.device import DeviceCopies, Prefetcher
from billhook.engine.parts import Parts
from billhook.engine.store import store_of
from billhook.model import surgery
from billhook.report.degradation import perplexity
from kit import prunes, standin
from kit.families import build, llama, tokens
from kit.standin import Registered, is_far

DEVICE = torch.device("privateuseone", 0)  # which has its name from when it is registered
FEW = bh.criteria.BlockMatching(steps=2)


class Watched:
    """What comes to the device and goes from it while blocks compute there."""

    def __init__(self):
        self.sent, self.back, self.most, self._alive = list[tuple[int, ...]](), list[tuple[int, ...]](), 0, []
        self.taken = list[bool]()  # whether each block that came from files had been read by then
        copied, enter, leave, take = standin.copied, DeviceCopies.enter, DeviceCopies.leave, Prefetcher.take

        def seen(source, target, non_blocking=False):
            if is_far(source) != is_far(target):
                (self.back if is_far(source) else self.sent).append(tuple(source.shape))
            return copied(source, target, non_blocking)

        def entered(copies, block):
            enter(copies, block)
            gc.collect()
            if any(block.children()):  # or it is a linear in no block
                self._alive.append([weakref.ref(one) for one in block.parameters()])
            coming = 0 if copies.ahead.pending is None else 1
            self.most = max(self.most, coming + sum(any(ref() is not None for ref in refs) for refs in self._alive))

        def took(ahead, name):
            read = take(ahead, name)
            self.taken += [read is not None] if isinstance(name, str) else []
            return read

        standin.copied, DeviceCopies.enter, DeviceCopies.leave, Prefetcher.take = seen, entered, leave, took


def batches():
    torch.manual_seed(5)
    return [{"input_ids": tokens(2, 16)} for _ in range(3)]


def dense():
    torch.manual_seed(3)
    return llama().eval()


def with_experts():
    torch.manual_seed(3)
    return build("mixtral")


def wrong_numbers(expected, found, most):
    pairs = [(name, value, found[name]) for name, value in expected.items()]
    wrong = [name for name, one, other in pairs if one.shape != other.shape or (one - other).abs().max() > most]
    return f"{wrong} differ" if wrong else ""


def in_memory(watched, most, criterion, make=dense, **how):
    """Prunes on the device and on the CPU; the model's own parameters stay as and where they are until masks are put in place."""
    expected, model = make(), make()
    prunes.prune(expected, criterion, batches(), sparsity=0.5, **how)
    own = {name: (one, one.data_ptr()) for name, one in [*model.named_parameters(), *model.named_buffers()]}
    moved = set[str]()

    def look(*_):
        moved.update(name for name, (one, pointer) in own.items() if is_far(one) or one.data_ptr() != pointer)

    modules = list(model.modules())
    handles = [hook(look) for m in modules for hook in (m.register_forward_pre_hook, m.register_forward_hook)]
    watched.back.clear()
    prunes.prune(model, criterion, batches(), sparsity=0.5, offload=DEVICE, **how, progress=look)
    look()
    for handle in handles:
        handle.remove()
    assert all(model.get_parameter(name) is own[name][0] for name, _ in model.named_parameters())
    weights = {tuple(module.weight.shape) for module in modules if isinstance(module, nn.Linear)}
    copies = [shape for shape in watched.back if shape in weights]
    said = [f"moved: {moved}"] * bool(moved) + [f"copied back: {copies}"] * bool(copies)
    return "; ".join([*said, wrong_numbers(expected.state_dict(), model.state_dict(), most)]).strip("; ")


def changes_go_home(watched, most):
    """Of a block that changes on the device, what has changed is copied back, and nothing else."""
    model = dense()
    store, layer = store_of(model), model.model.layers[0].mlp.up_proj
    before = layer.weight.detach().clone()
    with store.on(DEVICE, list(model.model.layers)), torch.no_grad():
        store.load(model.model.layers[1])
        watched.back.clear()
        with store.changing(layer):
            layer.weight.mul_(2)
        store.release()
    assert torch.equal(layer.weight, 2 * before)
    return "" if watched.back == [tuple(before.shape)] else f"copied back: {watched.back}"


def measured(watched, most):
    """Measures perplexity: each block comes once for all examples, and no weight goes back."""
    model, rows = dense(), [{"input_ids": batch["input_ids"][0].tolist()} for batch in batches()]
    expected = perplexity(model, rows, 3)
    watched.sent.clear()
    with store_of(model).on(DEVICE, list(model.model.layers)):
        found = perplexity(model, rows, 3)
    times = watched.sent.count(tuple(model.model.layers[0].mlp.gate_proj.weight.shape))
    came = 2 * len(model.model.layers) + 2 * DeviceCopies.prefetches(DEVICE)  # gate and up; the first block is on its way again
    right = math.isclose(found, expected, rel_tol=1e-6) and times == came
    return "" if right else f"{found} for {expected}, sent {times} times for {came}"


def measured_in_files(watched, most):
    """Measures perplexity of a streamed model: what is in no block computes on the CPU, except for linears, as at the end."""
    folder, rows = Path(sys.argv[1], "measured"), [{"input_ids": batch["input_ids"][0].tolist()} for batch in batches()]
    dense().save_pretrained(folder)
    expected, model = perplexity(bh.stream(folder), rows, 3), bh.stream(folder, device=DEVICE)
    watched.sent.clear()
    watched.back.clear()
    found, head = perplexity(model, rows, 3), tuple(model.lm_head.weight.shape)
    assert not is_far(model.lm_head.weight)
    right = math.isclose(found, expected, rel_tol=1e-6) and watched.sent.count(head) == 3 and head not in watched.back
    return "" if right else f"{found} for {expected}, sent {watched.sent.count(head)} times"


def changed_in_files(work, source, out, device, stops):
    """Does something to a streamed model; where it `stops`, the first block that is written ends it, and it is done again."""
    write = Parts.write

    def stopping(*given):
        write(*given)
        raise KeyboardInterrupt

    if stops:
        Parts.write = stopping
        try:
            work(bh.stream(source, out, device=device))
        except KeyboardInterrupt:
            pass
        finally:
            Parts.write = write
    model = bh.stream(source, out, device=device)
    work(model)
    assert store_of(model).reused == int(stops)
    bh.save(model, out)
    return bh.load(out).state_dict()


def in_files(watched, most, work, stops=False, ahead=False):
    folder = Path(sys.argv[1], str(len(os.listdir(sys.argv[1]))))
    dense().save_pretrained(folder / "dense")
    expected = changed_in_files(work, folder / "dense", folder / "near", None, stops)
    watched.taken.clear()
    found = changed_in_files(work, folder / "dense", folder / "far", DEVICE, stops)
    if ahead and not sum(watched.taken) > len(watched.taken) / 2:
        return f"of {len(watched.taken)} blocks {sum(watched.taken)} were read ahead"
    return wrong_numbers(expected, found, most)


def offloaded_from_files(watched, most):
    """A model that was streamed to compute on the CPU is pruned on the device."""
    pruned_there = partial(bh.prune, criterion=bh.Wanda(), batches=batches(), sparsity=0.5)
    folder = Path(sys.argv[1], "offloaded")
    dense().save_pretrained(folder / "dense")
    found = []
    for name, how in (("near", {}), ("far", {"offload": DEVICE})):
        model = bh.stream(folder / "dense", folder / name)
        pruned_there(model, **how)
        assert store_of(model).device is None
        bh.save(model, folder / name)
        found.append(bh.load(folder / name).state_dict())
    return wrong_numbers(*found, most)


def pruned(criterion, **how):
    return lambda model: prunes.prune(model, criterion, batches(), sparsity=0.5, **how)


def repaired(model):
    plan = bh.plan(model, bh.importance.WeightNorm(), heads=0.5, channels=0.5)
    bh.apply(model, plan, weights=bh.repair(model, plan, batches()))


def converted(method, **how):
    return lambda model: bh.convert_kv_heads(model, 2, method, batches(), **how)


def removed(importance, **what):
    return lambda model: bh.apply(model, bh.plan(model, importance, batches(), **what))


MEMORY = {
    "Wanda": (partial(in_memory, criterion=bh.Wanda()), 0),
    "Wanda by layer": (partial(in_memory, criterion=bh.Wanda(), sequential="layer"), 0),
    "Wanda of the dense model": (partial(in_memory, criterion=bh.Wanda(), sequential="none"), 0),
    "SparseGPT": (partial(in_memory, criterion=bh.SparseGPT()), 1e-5),
    "match": (partial(in_memory, criterion=bh.Wanda(), match=FEW), 1e-5),
    "experts": (partial(in_memory, criterion=bh.Wanda(), make=with_experts), 1e-6),
    "changes": (changes_go_home, 0),
    "perplexity": (measured, 0),
}
FILES = {
    "Wanda": (pruned(bh.Wanda()), 0),
    "Wanda of the dense model": (pruned(bh.Wanda(), sequential="none"), 0),
    "Magnitude of all": (pruned(bh.Magnitude(compares="global")), 0),
    "SparseGPT": (pruned(bh.SparseGPT()), 1e-5),
    "match": (pruned(bh.Wanda(), match=FEW), 1e-5),
    "repair": (repaired, 1e-5),
    "KV heads by SVD, repaired": (converted("svd", repair=bh.RepairConfig()), 1e-5),
    "KV heads by SVD, matched": (converted("svd", repair=bh.RepairConfig(match=FEW)), 1e-5),
    "KV heads by the best": (converted("auto"), 1e-5),
    "OBS": (removed(bh.OBS(), channels=0.5), 1e-5),
    "OutputNorm": (removed(bh.OutputNorm(), heads=0.5), 0),
    "a block": (removed(bh.importance.BlockInfluence(), blocks=1), 0),
    "hidden dimensions": (removed(bh.importance.WeightNorm(), residual=0.25), 0),
}
STOPPED = ("Wanda", "match", "repair", "KV heads by SVD, repaired")
WORKS = {f"memory: {name}": own for name, own in MEMORY.items()}
WORKS |= {f"memory, sent ahead: {name}": own for name, own in MEMORY.items()}
WORKS |= {f"files: {name}": (partial(in_files, work=work), most) for name, (work, most) in FILES.items()}
WORKS |= {f"files, read ahead: {name}": (partial(in_files, work=FILES[name][0], ahead=True), FILES[name][1]) for name in STOPPED}
WORKS |= {f"files, stopped: {name}": (partial(in_files, work=FILES[name][0], stops=True), FILES[name][1]) for name in STOPPED}
WORKS |= {"files: offload": (offloaded_from_files, 0), "files: perplexity": (measured_in_files, 0)}


def main():
    torch.set_num_threads(1)
    gc.freeze()  # what has been imported by now: so that collecting at each block is cheap
    watched = Watched()
    registered = Registered()
    surgery._move = lambda *_: None  # a tensor may go to another device in its place on torch's own devices alone
    for name in sys.argv[2:]:
        (work, most), ahead = WORKS[name], "ahead" in name
        DeviceCopies.prefetches = staticmethod(lambda _, ahead=ahead: ahead)
        watched.most = 0
        try:
            said = work(watched, most)
        except Exception:
            said = traceback.format_exc()
        if not 1 <= watched.most <= 2 - name.startswith("memory:"):
            said += f"; {watched.most} blocks at a time"
        print(json.dumps([name, said]), flush=True)
    del registered
    os._exit(0)  # at whose usual end autograd's thread for the device would abort


if __name__ == "__main__":
    main()
