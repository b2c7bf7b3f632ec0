"""What callbacks cost while nothing happens: the same fit with and without them, step by step.

`OMP_NUM_THREADS=1 python benchmarks/overhead.py MODEL TRAIN.txt --out overhead.md` writes the table.

MODEL is trained in full in float32 with AdamW. Of every two steps one is a bare Trainer's: the callbacks are taken out of the
Trainer, and their hooks out of the optimizer and the modules, and are put back for the next one; which comes first changes from
pair to pair. "In hooks" is the time inside the callbacks' own methods and hooks, as a share of a step of the bare Trainer;
"with / without" is the median ratio within a pair, with its quartiles, which also has what autograd and Lightning do for them,
and the noise of the machine. CPU seconds of one thread. "Idle": attached, and their only event is past the end of the benchmark.
Each row is a fit of its own; the first steps do not count.
"""

import argparse
import time
from pathlib import Path
from statistics import median, quantiles

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh

WARM = 4
LATE = 10**6
HEADER = "callbacks | tokens in a step | step, CPU s | in hooks | with / without (quartiles)"


ROWS = {
    "WeightPruning, idle": lambda: [bh.WeightPruning(bh.Wanda(), sparsity=0.5, at=LATE)],
    "HeadPruning, idle": lambda: [bh.HeadPruning(0.5, at=LATE)],
    "StructuredPruning, idle": lambda: [bh.StructuredPruning(bh.Amount(channels=0.2), at=LATE)],
    "DepthPruning, idle": lambda: [bh.DepthPruning(1, at=LATE)],
    "KVHeadConversion, idle": lambda: [bh.KVHeadConversion(1, at=LATE)],
    "all of them, idle": lambda: [
        bh.HeadPruning(0.5, at=LATE - 4),
        bh.DepthPruning(1, at=LATE - 3),
        bh.KVHeadConversion(1, at=LATE - 2),
        bh.WeightPruning(bh.Wanda(), sparsity=0.5, at=LATE),
    ],
    "WeightPruning, holding masks": lambda: [bh.WeightPruning(bh.Magnitude(), sparsity=0.5, at="start", measure_batches=0)],
    "HeadPruning, holding masks": lambda: [bh.HeadPruning(0.5, at="start", remove="never", measure_batches=0)],
}


class Timed:
    """A function that adds up the time it takes."""

    def __init__(self, inner, switch):
        self.inner, self.switch = inner, switch

    def __call__(self, *args, **kwargs):
        """As the function."""
        start = time.process_time()
        try:
            return self.inner(*args, **kwargs)
        finally:
            self.switch.inside += time.process_time() - start


class Switch(pl.Callback):
    """Takes the callbacks out for one step of every two."""

    def __init__(self, callbacks, steps):
        self.callbacks, self.steps, self.inside, self.start = callbacks, steps, 0.0, 0.0
        self.bare, self.full, self.hooks = [], [], []

    def on_train_start(self, trainer, pl_module):
        """Times the callbacks' methods, and finds their hooks."""
        self.all = list(trainer.callbacks)
        for callback in self.callbacks:
            for name in dir(callback):
                if name.startswith("on_") and getattr(type(callback), name) is not getattr(pl.Callback, name):
                    setattr(callback, name, Timed(getattr(callback, name), self))
        places = [
            *(one._optimizer_step_post_hooks for one in trainer.optimizers),
            *(one._optimizer_step_pre_hooks for one in trainer.optimizers),
            *(d for m in pl_module.modules() for d in (m._forward_hooks, m._forward_pre_hooks)),
        ]
        self.own = [(place, {key: Timed(hook, self) for key, hook in place.items()}) for place in places if place]
        self.attach(trainer, True)

    def attach(self, trainer, on):
        """With the callbacks and their hooks, or without."""
        trainer.callbacks = self.all if on else [one for one in self.all if one not in self.callbacks]
        for place, hooks in self.own:
            place.clear()
            place.update(hooks if on else {})
        self.on, self.inside, self.start = on, 0.0, time.process_time()

    def on_train_batch_end(self, trainer, *_):
        """Notes the step, and switches: with, without, without, with, and so on."""
        spent = time.process_time() - self.start
        (self.full if self.on else self.bare).append(spent)
        if self.on:
            self.hooks.append(self.inside)
        trainer.should_stop = trainer.global_step >= self.steps
        self.attach(trainer, trainer.should_stop or (trainer.global_step + 1) % 4 < 2)


def measure(options, rows):
    """Lines of markdown."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(options.model)(Path(options.train).read_text()[:2_000_000])["input_ids"])
    lines = [f"| {HEADER} |", "|---" + "|---:" * HEADER.count("|") + "|"]
    for name in rows:
        for tokens in options.tokens:
            lines.append(f"| {name} | {' | '.join(row(options, ids, ROWS[name](), tokens))} |")
            print("\n".join(lines if len(lines) == 3 else lines[-1:]), flush=True)
    return lines


def row(options, ids, callbacks, tokens):
    """One fit."""
    steps = WARM + 2 * options.pairs
    blocks = ids[: steps * tokens].view(steps, -1, min(tokens, 512))
    data = [{"input_ids": block, "labels": block} for block in blocks]
    module = bh.TransformerModule(AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), lr=1e-5)
    module.decay = "constant"
    switch = Switch(callbacks, steps)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_steps=2 * LATE, max_epochs=-1, accelerator="cpu", devices=1, callbacks=[*callbacks, switch], **quiet)
    trainer.fit(module, DataLoader(data, batch_size=None))
    full, bare, hooks = (one[WARM // 2 :] for one in (switch.full, switch.bare, switch.hooks))
    ratios = [with_ / without for with_, without in zip(full, bare, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    usual = median(bare)
    return [f"{tokens}", f"{usual:.3f}", f"{median(hooks) / usual:.3%}", f"{median(ratios):.4f} ({low:.4f} to {high:.4f})"]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a language model")
    parser.add_argument("train", help="a text file")
    parser.add_argument("--pairs", type=int, default=20, help="of steps, that count about")
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 2048], help="in a step")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--out", type=Path, help="where the table is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = measure(options, options.only)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
