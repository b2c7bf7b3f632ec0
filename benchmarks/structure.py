"""Coupled structures removed from a real model: perplexity before and after the same few steps of training, memory and time.

`OMP_NUM_THREADS=1 python benchmarks/structure.py MODEL TRAIN.txt TEST.txt --out structure.md` writes the tables; `--only` takes
rows by name, `--steps 0` leaves the training out, `--speed` adds how fast the cut models are.

Blocks 4 to 27 of 30 are cut, all of them alike, and perplexity is that of the first 16 windows of 512 tokens of TEST, 511
predictions each, in float32. "LLM-Pruner" is its paper's settings: the Taylor score of the first 10 windows of 64 tokens of
TRAIN, as one batch. "billhook" is `callbacks/structured.yaml`: the gradient of gates on each unit and `RepairConfig`, on 512
tokens of each of `--examples` windows of TRAIN.
Every row is a fresh process. Training: AdamW, all weights, 2 x 128 tokens of TRAIN a
step that the calibration has not seen, the same for every row; the dense model's row says what the text alone teaches. Memory
is the peak of the process above what it held with the model loaded, CPU seconds are those of one thread, both up to the cut.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh

PROTECTED = {"first": 4, "last": 2}
CUTS = {  # name -> ratios: 308 of 1,536 channels, a KV head of 3 with its query heads, half of the channels
    "20 % of the FFN": {"channels": 0.2006},
    "20 % of the FFN, 1 of 3 KV heads": {"channels": 0.2006, "kv_heads": 0.34},
    "50 % of the FFN, 1 of 3 KV heads": {"channels": 0.5, "kv_heads": 0.34},
}
RECIPES = {
    "LLM-Pruner, vector": (bh.Taylor("vector"), False),
    "LLM-Pruner, element 1st": (bh.Taylor("first"), False),
    "LLM-Pruner, mixed": (bh.Taylor("mixed"), False),
    "billhook, no repair": (bh.OutputNorm(), False),
    "billhook, OutputNorm": (bh.OutputNorm(), True),
    "billhook, GateGradient": (bh.importance.GateGradient(), True),
    "billhook": (bh.OBS(), True),
}
ROWS = ["dense", *(f"{cut}: {recipe}" for cut in CUTS for recipe in RECIPES)]
HEADER = "| cut | recipe | parameters kept | perplexity | after training | MiB | CPU s |"


def tokens(tokenizer, path, count):
    """The first tokens of a text."""
    return torch.tensor(tokenizer(Path(path).read_text(), add_special_tokens=False)["input_ids"][:count])


@torch.no_grad()
def perplexity(model, rows):
    """Exp of the mean over all predictions, summed in float64."""
    losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in rows]
    return math.exp(sum(losses) / len(losses))


def peak():
    """The most memory that the process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cut(model, ids, ratios, importance, repairs, examples):
    """Plans and removes; returns the plan."""
    theirs = isinstance(importance, bh.Taylor)
    rows = ids[: 10 * 64].view(1, 10, 64) if theirs else ids[: examples * 512].view(-1, 1, 512)
    batches = [{"input_ids": row} for row in rows]
    plan = bh.plan(model, importance, batches, amount=bh.Amount(**ratios, **PROTECTED, round_to=1))
    bh.apply(model, plan, weights=bh.repair(model, plan, batches) if repairs else None)
    return plan


def train(model, ids, steps, lr):
    """The same steps for every row."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for batch in ids[: steps * 2 * 128].view(steps, 2, 128):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def measure(options):
    """One row, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    test = tokens(tokenizer, options.test, 16 * 512).view(16, 512)
    ids = tokens(tokenizer, options.train, 64 * 512 + max(options.steps, 1) * 256)
    held, start, kept = peak(), time.process_time(), 1.0
    if options.row != "dense":
        name, _, recipe = options.row.partition(": ")
        plan = cut(model, ids, CUTS[name], *RECIPES[recipe], options.examples)
        kept = plan.parameters[1] / plan.parameters[0]
    row = {"kept": kept, "seconds": time.process_time() - start, "memory": peak() - held, "before": perplexity(model, test)}
    row["after"] = perplexity(train(model, ids[64 * 512 :], options.steps, options.lr), test) if options.steps else None
    Path(options.measured).write_text(json.dumps(row))


def line(name, row):
    """A row of the table."""
    where, _, recipe = name.partition(": ")
    after = "" if row["after"] is None else f"{row['after']:,.2f}"
    cost = f"{row['memory']:,.0f} | {row['seconds']:,.0f}" if recipe else " | "
    return f"| {where} | {recipe} | {row['kept']:.1%} | {row['before']:,.2f} | {after} | {cost} |"


@torch.no_grad()
def seconds(model, batch, context):
    """CPU seconds of reading a context, and of a token after it."""
    ids = torch.randint(1000, (batch, context), generator=torch.Generator().manual_seed(0))
    start = time.process_time()
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    read = time.process_time()
    for _ in range(4):
        cache = model(ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
    return read - start, (time.process_time() - read) / 4


def moved(model, batch, context):
    """Bytes that a decoding step reads: the weights without the rows of the table that it does not look up, and the cache."""
    summary = bh.summary(model)
    return summary.bytes + batch * context * summary.kv_cache_bytes


def speed(options):
    """How many times as fast as the dense model, interleaved with it, beside what bytes and operations allow."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokens(tokenizer, options.train, 4 * 512)
    dense = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    yield "| cut | batch | prefill | operations allow | reached | decode | bytes allow | reached |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, ratios in CUTS.items():
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        cut(model, ids, ratios, bh.importance.WeightNorm(), False, 1)
        work = bh.summary(dense).flops / bh.summary(model).flops
        for batch in (1, 8):
            taken = [[seconds(one, batch, 512) for one in (dense, model)] for _ in range(options.rounds + 1)][1:]
            prefill, decode = (median(before[i] / after[i] for before, after in taken) for i in (0, 1))
            bytes_ = moved(dense, batch, 512) / moved(model, batch, 512)
            yield (
                f"| {name} | {batch} | {prefill:.2f} | {work:.2f} | {prefill / work:.0%} | {decode:.2f} | {bytes_:.2f} | "
                f"{decode / bytes_:.0%} |"
            )


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--only", nargs="*", default=ROWS, choices=ROWS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--measured", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        measure(options)
        return
    lines = []

    def tell(text):
        lines.append(text)
        print(text, flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")

    if options.only:
        tell(HEADER)
        tell("|---|---|---:|---:|---:|---:|---:|")
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            measured = Path(folder) / "row.json"
            subprocess.run([sys.executable, *sys.argv, "--row", name, "--measured", str(measured)], check=True)
            tell(line(name, json.loads(measured.read_text())))
    for text in speed(options) if options.speed else ():
        tell(text)


if __name__ == "__main__":
    main()
