"""How ranks divide what is solved: the CPU time of the slowest of several ranks, as a share of what one takes for all.

`python benchmarks/ranks.py MODEL TEXT --out ranks.md` writes the table. MODEL's first blocks (`--blocks`) are repaired and pruned
by one process, and by `--ranks` that exchange sums by gloo, on the same windows of TEXT. "Solving" is the time of one thread in
`refit_linear`, which repairs, and in a criterion's `prune`, without what ranks wait for each other.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from measured import Lines
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh
from billhook.repairs import visitor
from billhook.running.ranks import Ranks

KINDS = {
    "a fifth of the channels, `Repair()`": lambda: bh.Repair(),
    "a fifth of the channels, `Repair()`, two sources": lambda: bh.Repair(),
    "50 %, `SparseGPT()`": lambda: bh.SparseGPT(),
    "50 %, `Refit()`": lambda: bh.Refit(),
}


class Clock:
    """Adds up the CPU time of calls, by this thread."""

    def __init__(self, call):
        self.call, self.seconds = call, 0.0

    def __call__(self, *args, **kwargs):
        """Calls, and counts; what is exchanged within is not waited for by this thread's clock."""
        start = time.thread_time()
        try:
            return self.call(*args, **kwargs)
        finally:
            self.seconds += time.thread_time() - start


def work(options, kind, rank, count, reduce):
    """Repairs or prunes on this rank's windows; returns the seconds of solving."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, num_hidden_layers=options.blocks).eval()
    ids = torch.tensor(
        AutoTokenizer.from_pretrained(options.model)(options.text.read_text())["input_ids"][: 512 * options.windows]
    )
    rows = [{"input_ids": row[None], "labels": row[None]} for row in ids.view(-1, 512)][rank::count]
    how = KINDS[kind]()
    if isinstance(how, bh.Repair):
        if "two sources" in kind:
            rows = [bh.running.batches.Batch(row, "ab"[number % 2]) for number, row in enumerate(rows)]
        clock = visitor.refit_linear = Clock(visitor.refit_linear)
        plan = bh.plan(model, bh.WeightNorm(), rows, amount=bh.Amount(channels=0.2))
        bh.repair(model, plan, rows, how, reduce=reduce)
        return clock.seconds
    clock = Clock(how.prune)
    object.__setattr__(how, "prune", clock)
    bh.prune(model, how, rows, sparsity=0.5, reduce=reduce)
    return clock.seconds


def one_of(rank, options, kind, folder):
    """Runs as one of several ranks, and writes its seconds."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=options.ranks)
    seconds = work(options, kind, rank, options.ranks, Ranks(rank, options.ranks, summed))
    Path(folder, f"{rank}").write_text(str(seconds))
    dist.destroy_process_group()


def summed(tensor):
    """Sums over ranks, in place."""
    dist.all_reduce(tensor)
    return tensor


def together(options, kind):
    """Returns the seconds of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(partial(one_of, options=options, kind=kind, folder=folder), nprocs=options.ranks)
        return [float(Path(folder, f"{rank}").read_text()) for rank in range(options.ranks)]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    header = ["what", "one rank, solving, CPU s", f"slowest of {options.ranks}, CPU s", "share", "of all ranks, CPU s"]
    table = Lines(options.out, header)
    for kind in options.only:
        alone, each = work(options, kind, 0, 1, None), together(options, kind)
        table.add([kind, f"{alone:.1f}", f"{max(each):.1f}", f"{max(each) / alone:.2f}", f"{sum(each):.1f}"])


if __name__ == "__main__":
    main()
