"""What holding masks costs: how much of a training step goes to them, bytes a weight, and keys in the state dict.

`OMP_NUM_THREADS=1 python benchmarks/holding.py MODEL TRAIN.txt --out holding.md` writes the table.

MODEL is trained in full in float32 with AdamW, in a fit in which `WeightPruning` has emptied half of every linear at the start
and holds it. Batches of two sizes take turns. Hooks of the optimizer right before and right after the callback's own say what
holding takes of a step, in CPU seconds on one thread; a step is all from the batch's start to its end, holding included. The
first two steps of a size do not count, as they make gradients and the optimizer's state. Shown are medians, and the largest
share of all. Below: other ways to do the same to the same weights, in turns, after the fit.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh
from billhook.model.layers import prunable

SIZES = ((4, 512), (4, 128))
WARM = 2
HEADER = "tokens in a step | step, CPU s | holding masks, CPU s | share | largest share"


class Steps(pl.Callback):
    """Notes the CPU seconds of each training step, and the keys of the module's state dict after it."""

    def __init__(self):
        self.seconds, self.start, self.keys = [], 0.0, set()

    def on_train_batch_start(self, *_):
        """A step begins."""
        self.start = time.process_time()

    def on_train_batch_end(self, trainer, pl_module, *_):
        """A step has ended."""
        self.seconds.append(time.process_time() - self.start)
        self.keys = set(pl_module.state_dict())


class Moments(pl.Callback):
    """Notes when its turn comes among the hooks after each step of the optimizer; the turns are in the order of callbacks."""

    def __init__(self):
        self.times = []

    def on_train_start(self, trainer, pl_module):
        """Takes a place behind the hooks that are there."""
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.times.append(time.process_time()))


def batches(model, train, count):
    """So many batches of each size in turn, from the text's beginning."""
    ids = iter(AutoTokenizer.from_pretrained(model)(Path(train).read_text(), add_special_tokens=False)["input_ids"])
    for rows, width in SIZES * count:
        block = torch.tensor([next(ids) for _ in range(rows * width)]).view(rows, width)
        yield {"input_ids": block, "labels": block}


def measure(model, train, steps):
    """Lines of markdown."""
    data = list(batches(model, train, WARM + steps))
    module = bh.TransformerModule(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), lr=1e-5)
    keys = set(module.state_dict())
    watch, before, pruning, after = Steps(), Moments(), bh.WeightPruning(bh.Magnitude(), sparsity=0.5), Moments()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=len(data), accelerator="cpu", devices=1, callbacks=[watch, before, pruning, after], **quiet)
    trainer.fit(module, DataLoader(data, batch_size=None))
    holding = [late - early for early, late in zip(before.times, after.times, strict=True)]
    masks = pruning.masks
    size = sum(mask.untyped_storage().nbytes() for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    linears = prunable(module.model)
    return [
        *shares(watch.seconds, holding),
        f"\nMasks: {size:g} bytes a weight. Keys that they add to the state dict: {len(watch.keys - keys)}.\n",
        *others([linears[name].weight.data for name in masks], list(masks.values())),
    ]


def shares(seconds, holding):
    """A table, by size of the batch."""
    lines = [f"| {HEADER} |", "|---" + "|---:" * HEADER.count("|") + "|"]
    for place, (rows, width) in enumerate(SIZES):
        counted = slice(WARM * len(SIZES) + place, None, len(SIZES))
        step, held = seconds[counted], holding[counted]
        share = [one / whole for one, whole in zip(held, step, strict=True)]
        shown = [f"{rows} x {width}", f"{median(step):.2f}", f"{median(held):.4f}", f"{median(share):.2%}", f"{max(share):.2%}"]
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def others(weights, masks):
    """A table of ways to do it, and of adding 0, which is no more than reading and writing the weights."""
    small, drop = [mask.view(torch.uint8) for mask in masks], [~mask for mask in masks]
    large = [mask.to(weight.dtype) for weight, mask in zip(weights, masks, strict=True)]
    ways = {
        "multiply by bool": (1, lambda: torch._foreach_mul_(weights, masks)),
        "multiply by the same bytes, read as uint8": (1, lambda: torch._foreach_mul_(weights, small)),
        "multiply by float32": (4, lambda: torch._foreach_mul_(weights, large)),
        "masked_fill_ by bool": (1, lambda: [weight.masked_fill_(one, 0) for weight, one in zip(weights, drop, strict=True)]),
        "add 0": (0, lambda: torch._foreach_add_(weights, 0)),
    }
    seconds = {name: [] for name in ways}
    for _ in range(6):
        for name, (_, way) in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    lines = [f"| {sum(mask.numel() for mask in masks):,} weights | bytes a weight | CPU s |", "|---|---:|---:|"]
    return lines + [f"| {name} | {size} | {median(seconds[name][1:]):.4f} |" for name, (size, _) in ways.items()]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a language model")
    parser.add_argument("train", help="a text file")
    parser.add_argument("--steps", type=int, default=5, help="of each size, that count")
    parser.add_argument("--out", type=Path, help="where the table is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = measure(options.model, options.train, options.steps)
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
