"""What training brings back after pruning: perplexity before, right after pruning, and after the same few steps.

`OMP_NUM_THREADS=1 python benchmarks/recovery.py MODEL TRAIN.txt TEST.txt --out recovery.md` writes the table; `--only` takes rows
by name, `--steps` and the other options change the budget.

Calibration is the first 32 windows of 512 tokens of TRAIN, perplexity that of the first 64 windows of TEST, 511 predictions
each, in float32, summed in float64. Every row is a fresh process and trains on the same batches of TRAIN in the same order,
with AdamW, a warm-up of 10 % of the steps and cosine decay, all weights at one learning rate and adapters at another
(LLM-Pruner's: r = 8, alpha = 16, dropout 0.05, on all linears). Gradual: Wanda in six rounds along a cubic schedule, over the
first 60 % of the steps. The learning rates are customary ones,
not tuned; to tune them, cut TRAIN in two and give its parts as TRAIN and TEST.
Masked adapters are the same before and after they are merged, but for rounding (the largest difference of logits on the first
window is printed), so only what is merged is measured. CPU seconds are those of one thread.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh
from billhook.model.layers import prunable
from billhook.sparsity.masks import sparsity_of

HALF, PAIRS, LAYER = {"sparsity": 0.5}, {"pattern": "2:4"}, {"options": bh.PruneOptions(sequential="layer")}
ROWS = {  # how it is pruned, and what is trained
    "dense": (None, "all weights"),
    "dense, LoRA": (None, "adapters"),
    "Wanda, 50 %": ((bh.Wanda(), HALF), "all weights"),
    "Wanda, to 50 % gradually": ((bh.Wanda(), None), "all weights"),
    "Wanda, 2:4": ((bh.Wanda(), PAIRS), "all weights"),
    "Refit, 50 %": ((bh.criteria.Refit(), HALF | LAYER), "all weights"),
    "Refit, 50 %, LoRA masked": ((bh.criteria.Refit(), HALF | LAYER), "masked adapters"),
    "Refit, 50 %, LoRA": ((bh.criteria.Refit(), HALF | LAYER), "adapters"),
    "Refit, 2:4": ((bh.criteria.Refit(), PAIRS | LAYER), "all weights"),
    "Refit, 2:4, LoRA masked": ((bh.criteria.Refit(), PAIRS | LAYER), "masked adapters"),
}
HEADER = "perplexity | trained | before training | after training | adapters merged | sparsity | CPU s a step | CPU min in all"


def windows(tokenizer, path, count):
    """The first windows of 512 tokens of a text."""
    ids = tokenizer(Path(path).read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * 512]).view(-1, 1, 512)


@torch.no_grad()
def perplexity(model, rows):
    """Exp of the mean over all predictions, summed in float64."""
    total, mode = 0.0, model.training
    model.eval()
    for ids in rows:
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += float(cross_entropy(logits, ids[0, 1:], reduction="none").double().sum())
    model.train(mode)
    return math.exp(total / (511 * len(rows)))


def known_perplexity(model, rows, known):
    """The same; of weights that another row has had too, bit for bit, what that row has measured."""
    key = 0
    for tensor in model.state_dict().values():
        key = zlib.crc32(tensor.numpy(), key)
    found = json.loads(known.read_text()) if known.exists() else {}
    if str(key) not in found:
        found[str(key)] = perplexity(model, rows)
        known.write_text(json.dumps(found))
    return found[str(key)]


class Watch(pl.Callback):
    """Looks at the model before the first step, and notes the CPU seconds of each step, without the callbacks after it."""

    def __init__(self, look):
        self.look, self.seen, self.seconds = look, None, []

    def on_train_epoch_start(self, trainer, pl_module):
        """Looks, after all callbacks have started."""
        self.seen = self.look(pl_module.model) if self.seen is None else self.seen

    def on_train_batch_start(self, *_):
        """A step begins."""
        self.seconds.append(-time.process_time())

    def on_train_batch_end(self, *_):
        """A step has ended."""
        self.seconds[-1] += time.process_time()


def train(model, lr, callbacks, options):
    """A fit of the model."""
    pl.seed_everything(0)
    module = bh.TransformerModule(model, lr=lr, warmup=0.1, decay="cosine")
    data = bh.TextDataModule({"train": options.train}, tokenizer=options.model, length=256, batch_size=options.batch)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"max_steps": options.steps, "gradient_clip_val": 1.0, "accelerator": "cpu", "devices": 1}
    pl.Trainer(callbacks=callbacks, **settings, **quiet).fit(module, data)


def train_weights(model, pruning, calibration, look, options):
    """All weights are trained; they are pruned in the fit and held there."""
    callbacks, watch = [], Watch(look)
    if pruning is not None:
        criterion, settings = pruning
        settings = settings or {"sparsity": bh.schedules.Cubic(0.5, end=0.6, every=max(1, options.steps // 10))}
        callbacks = [bh.WeightPruning(criterion, **settings, calibration=calibration, measure_batches=0)]
    train(model, options.lr, [watch, *callbacks], options)
    return model, {"before": watch.seen, "step": median(watch.seconds), "trained": perplexity(model, options.held_out)}


def train_adapters(model, pruning, calibration, look, options, masked):
    """The weights are pruned and then frozen; adapters are trained and merged."""
    if pruning is not None:
        criterion, settings = pruning
        bh.prune(model, criterion, calibration, **settings)
    figures = {"before": look(model)}
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"))
    if masked:
        bh.training.mask_adapters(adapted)
    watch = Watch(lambda _: None)
    train(adapted.get_base_model(), options.adapter_lr, [watch], options)
    figures["step"] = median(watch.seconds)
    if not masked:
        figures["trained"] = perplexity(model, options.held_out)
    logits = first_logits(model, options.held_out)
    merged = bh.training.merge(adapted)
    moved = float((first_logits(merged.model, options.held_out) - logits).abs().max())
    print(f"{merged}; logits moved by {moved:.2g} at most")
    return merged.model, figures | {"merged": perplexity(merged.model, options.held_out)}


@torch.no_grad()
def first_logits(model, rows):
    """Of the first window."""
    return model.eval()(rows[0], use_cache=False).logits


def measure(name, options):
    """One row's figures."""
    pruning, trained = ROWS[name]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    options.held_out = windows(tokenizer, options.test, options.windows)
    calibration = [{"input_ids": ids} for ids in windows(tokenizer, options.train, 32)]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    learns = pruning is not None and "end" in (pruning[1] or {})  # by masks that the weights do not show
    look = (
        partial(perplexity, rows=options.held_out)
        if learns
        else partial(known_perplexity, rows=options.held_out, known=options.known)
    )
    if trained == "all weights":
        model, figures = train_weights(model, pruning, calibration, look, options)
    else:
        model, figures = train_adapters(model, pruning, calibration, look, options, trained == "masked adapters")
    zeros = sparsity_of(linear.weight for linear in prunable(model).values())
    return figures | {"sparsity": zeros, "minutes": time.process_time() / 60}


def line(name, figures):
    """A row of the table."""
    perplexities = [f"{figures[key]:.4f}" if figures.get(key) else "" for key in ("before", "trained", "merged")]
    rest = [f"{figures['sparsity']:.6f}", f"{figures['step']:.2f}", f"{figures['minutes']:.1f}"]
    return f"| {' | '.join([name, ROWS[name][1], *perplexities, *rest])} |"


def fresh(name, known):
    """A row of the table, by a process of its own."""
    given = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--known", str(known), "--here"]
    output = subprocess.run(given, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    row = line(name, json.loads(output[-1]))
    print("\n".join([row, *(one for one in output if one.startswith("merged"))]), flush=True)
    return row


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a language model")
    parser.add_argument("train", help="a text file")
    parser.add_argument("test", help="a text file")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2, help="blocks of 256 tokens in a step")
    parser.add_argument("--windows", type=int, default=64, help="windows of TEST")
    parser.add_argument("--lr", type=float, default=1e-4, help="where all weights are trained")
    parser.add_argument("--adapter-lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="where the table is written")
    parser.add_argument("--known", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Measures, prints and writes."""
    options = arguments()
    if options.here:
        torch.set_num_threads(1)
        print(json.dumps(measure(options.only[0], options)))
        return
    lines = [f"| {HEADER} |", "|---|---" + "|---:" * (HEADER.count("|") - 1) + "|"]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lines += [fresh(name, Path(folder, "known.json")) for name in options.only]
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
