"""How ranks divide what is solved: the CPU time of the slowest of several ranks, as a share of what one takes for all.

`python benchmarks/ranks.py MODEL TEXT --out ranks.md` writes the table. MODEL's first blocks (`--blocks`) are repaired and pruned
by one process, and by `--ranks` that exchange sums by gloo, on the same windows of TEXT: by functions, and by callbacks in a fit
under `strategy="ddp"`. "Solving" is the time of one thread in `refit_linear`, which repairs, and in a criterion's `prune`,
without what it takes to exchange sums, and to wait for them.
"""

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from measured import Lines
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh
from billhook.engine.batches import Batch
from billhook.engine.comm import Comm
from billhook.repairs import visitor
from billhook.repairs.least_squares import refit_linear

KINDS = {
    "a fifth of the channels, `RepairConfig()`": bh.RepairConfig,
    "a fifth of the channels, `RepairConfig()`, two sources": bh.RepairConfig,
    "50 %, `SparseGPT()`": bh.SparseGPT,
    "50 %, `Refit()`": bh.criteria.Refit,
    "a fifth of the channels, `RepairConfig()`, in a fit under DDP": bh.RepairConfig,
    "50 %, `SparseGPT()`, in a fit under DDP": bh.SparseGPT,
}


class Clock:
    """Adds up the CPU time of calls, by this thread, without what another clock counts within."""

    def __init__(self, call, without=None):
        self.call, self.without, self.seconds = call, without, 0.0

    def __call__(self, *args, **kwargs):
        """Calls, and counts."""
        start, other = time.thread_time(), self.without.seconds if self.without else 0.0
        try:
            return self.call(*args, **kwargs)
        finally:
            self.seconds += time.thread_time() - start
            self.seconds -= self.without.seconds - other if self.without else 0.0


def clock_of(how):
    """Has a clock count all solving of a repair or a criterion, and returns it."""
    exchange = Clock(Comm.sum_)
    Comm.sum_ = lambda *given: exchange(*given)
    if isinstance(how, bh.RepairConfig):
        visitor.refit_linear = Clock(refit_linear, exchange)
        return visitor.refit_linear
    clock = Clock(how.prune, exchange)
    object.__setattr__(how, "prune", clock)
    return clock


def work(options, kind, rank, count, reduce):
    """Repairs or prunes on this rank's windows; returns the seconds of solving."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, num_hidden_layers=options.blocks).eval()
    ids = torch.tensor(
        AutoTokenizer.from_pretrained(options.model)(options.text.read_text())["input_ids"][: 512 * options.windows]
    )
    rows = [{"input_ids": row[None], "labels": row[None]} for row in ids.view(-1, 512)]
    how = KINDS[kind]()
    clock = clock_of(how)
    if "DDP" in kind:
        fit(Small(model, rows[0]), how, rows, count)
    elif isinstance(how, bh.RepairConfig):
        if "two sources" in kind:
            rows = [Batch(row, "ab"[number // count % 2]) for number, row in enumerate(rows)]
        plan = bh.plan(model, bh.importance.WeightNorm(), rows[rank::count], amount=bh.Amount(channels=0.2))
        bh.repair(model, plan, rows[rank::count], how, reduce=reduce)
    else:
        bh.prune(model, how, rows[rank::count], sparsity=0.5, reduce=reduce)
    return clock.seconds


class Small(pl.LightningModule):
    """A model in a fit whose only step changes nothing."""

    def __init__(self, model, row):
        super().__init__()
        self.model, self.row = model, row

    def train_dataloader(self):
        """The same window for every rank."""
        return DataLoader([{name: own[0, :16] for name, own in self.row.items()}] * 4)

    def training_step(self, batch, _):
        """The model's own loss."""
        return self.model(**batch).loss

    def configure_optimizers(self):
        """One that does not move."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(module, how, rows, count):
    """Fits one step under DDP, after which a callback prunes or repairs."""
    given = {"at": 1, "calibration": rows, "measure_batches": 0}
    if isinstance(how, bh.RepairConfig):
        callback = bh.StructuredPruning(bh.Amount(channels=0.2), importance=bh.importance.WeightNorm(), repair=how, **given)
    else:
        callback = bh.WeightPruning(how, sparsity=0.5, **given)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(max_steps=2, accelerator="cpu", devices=count, strategy="ddp", callbacks=[callback], **quiet).fit(module)
    assert len(callback.events) == 1


def one_of(rank, options, kind, folder, port):
    """Runs as one of several ranks, and writes its seconds."""
    if "DDP" in kind:  # which meets by itself
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    else:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=options.ranks)
    seconds = work(options, kind, rank, options.ranks, Comm(summed, rank, options.ranks))
    Path(folder, f"{rank}").write_text(str(seconds))
    dist.destroy_process_group()


def summed(tensor):
    """Sums over ranks, in place."""
    dist.all_reduce(tensor)
    return tensor


def together(options, kind):
    """Returns the seconds of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"options": options, "kind": kind, "folder": folder, "port": find_free_network_port()}
        processes.spawn(partial(one_of, **given), nprocs=options.ranks)
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
        torch.distributed.is_initialized() and dist.destroy_process_group()  # of one, that a fit has left
        alone, each = work(options, kind, 0, 1, None), together(options, kind)
        table.add([kind, f"{alone:.1f}", f"{max(each):.1f}", f"{max(each) / alone:.2f}", f"{sum(each):.1f}"])


if __name__ == "__main__":
    main()
