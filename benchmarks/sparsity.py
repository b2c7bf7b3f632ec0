"""Pruning a real model's weights in one shot: perplexity, time beside a forward, and memory.

`OMP_NUM_THREADS=1 python benchmarks/sparsity.py MODEL TRAIN.txt TEST.txt --out sparsity.md` writes the table; `--only` takes rows
by name, `--jobs` runs so many at once (and spoils the times a little).

Calibration is the first 32 windows of 512 tokens of TRAIN, perplexity that of the first 64 windows of TEST, 511 predictions
each, in float32. With `--also TRAIN TEST` calibration is the first 20 windows of either training text, and a column more has the
perplexity of the first 32 windows of that test text. Every row is a fresh process: how much its memory grows at most while it
prunes, the CPU seconds of that on one thread, and the same of one forward of the calibration windows through the decoder, without
the output embedding: the mean of one right before and one right afterwards.
"""

import argparse
import ctypes
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh
from billhook.sparsity.criteria import WandaAlpha
from billhook.sparsity.masks import sparsity_of

LAYER = {"options": bh.PruneOptions(sequential="layer")}
MATCHED = {"options": bh.PruneOptions(sequential="layer", match=bh.criteria.BlockMatching())}
MATCHED_14 = {"options": bh.PruneOptions(sequential="layer", match=bh.criteria.BlockMatching(steps=14))}
HALF, PAIRS = {"sparsity": 0.5}, {"pattern": "2:4"}
ROWS = {
    "dense": None,
    "Magnitude, 50 %": (bh.Magnitude(), HALF),
    "Magnitude, 2:4": (bh.Magnitude(), PAIRS),
    "Wanda, 50 %": (bh.Wanda(), HALF),
    "Wanda, 50 %, layer": (bh.Wanda(), HALF | LAYER),
    "Wanda, 50 %, none": (bh.Wanda(), HALF | {"options": bh.PruneOptions(sequential="none")}),
    "Wanda, 2:4": (bh.Wanda(), PAIRS),
    "Wanda, 50 %, OWL": (bh.Wanda(), HALF | {"options": bh.PruneOptions(allocation=bh.criteria.OWL())}),
    "WandaAlpha, 50 %": (WandaAlpha(), HALF),
    "RIA, 50 %": (bh.criteria.RIA(), HALF),
    "RIA, 2:4": (bh.criteria.RIA(), PAIRS),
    "SparseGPT, 50 %": (bh.SparseGPT(), HALF),
    "SparseGPT, 50 %, layer": (bh.SparseGPT(), HALF | LAYER),
    "SparseGPT, 2:4": (bh.SparseGPT(), PAIRS),
    "SparseGPT, 2:4, layer": (bh.SparseGPT(), PAIRS | LAYER),
    "Refit(Wanda), 50 %, layer": (bh.criteria.Refit(), HALF | LAYER),
    "Refit(Wanda), 2:4, layer": (bh.criteria.Refit(), PAIRS | LAYER),
    "Refit(RIA), 2:4, layer": (
        bh.criteria.Refit(bh.criteria.RIA(compares="row")),
        PAIRS | LAYER,
    ),
    "Refit(SparseGPT), 50 %, layer": (bh.criteria.Refit(bh.SparseGPT()), HALF | LAYER),
    "ALPS, 50 %, layer": (bh.criteria.ALPS(), HALF | LAYER),
    "ALPS, 2:4, layer": (bh.criteria.ALPS(), PAIRS | LAYER),
    "ALPS, 50 %, layer, matched": (
        bh.criteria.ALPS(),
        HALF | MATCHED,
    ),
    "ALPS, 2:4, layer, matched": (
        bh.criteria.ALPS(),
        PAIRS | MATCHED,
    ),
    "Wanda, 50 %, layer, 14 steps": (
        bh.Wanda(),
        HALF | MATCHED_14,
    ),
    "Refit(Wanda), 50 %, layer, 14 steps": (
        bh.criteria.Refit(),
        HALF | MATCHED_14,
    ),
    "Refit(SparseGPT), 2:4, layer, 14 steps": (
        bh.criteria.Refit(bh.SparseGPT()),
        PAIRS | MATCHED_14,
    ),
    "Refit(SparseGPT), 2:4, layer": (bh.criteria.Refit(bh.SparseGPT()), PAIRS | LAYER),
}
MEASURED = "sparsity | CPU s | forwards | peak memory above the model, MiB"


def windows(tokenizer, path, first, count):
    """Windows of 512 tokens of a text, in order."""
    ids = tokenizer(Path(path).read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[first * 512 : (first + count) * 512]).view(-1, 1, 512)


def resident(peak=False):
    """Megabytes of resident memory, now or at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 1024


def start_peak():
    """Lets the peak start from now; megabytes of resident memory."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


@torch.no_grad()
def run(model, rows):
    """A forward of all windows through the decoder."""
    for ids in rows:
        model.model(ids, use_cache=False)


@torch.no_grad()
def perplexity(model, rows):
    """Exp of the mean over all predictions, summed in float64."""
    total = 0.0
    for ids in rows:
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        total += float(cross_entropy(logits, ids[0, 1:], reduction="none").double().sum())
    return math.exp(total / (511 * len(rows)))


def timed(what):
    """CPU seconds."""
    start = time.process_time()
    what()
    return time.process_time() - start


def measure(options, criterion, settings):
    """One row's perplexities, and its other figures. `settings` are of `bh.prune`."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    calibration, held_out = windows(tokenizer, options.train, 0, 32), [windows(tokenizer, options.test, 0, 64)]
    if options.also:
        train, test = options.also
        calibration = torch.cat([calibration[:20], windows(tokenizer, train, 0, 20)])
        held_out.append(windows(tokenizer, test, 0, 32))
    if criterion is None:
        return [perplexity(model, rows) for rows in held_out], [0.0]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the file, so that reading it does not count
    batches, pruning = [{"input_ids": ids} for ids in calibration], []
    forward = timed(lambda: run(model, calibration))
    before = start_peak()
    seconds = timed(lambda: pruning.append(bh.prune(model, criterion, batches, **settings)))
    grown = resident(peak=True) - before
    forward = (forward + timed(lambda: run(model, calibration))) / 2
    zeros = sparsity_of(pruning[0].masks(model).values())
    return [perplexity(model, rows) for rows in held_out], [zeros, seconds, seconds / forward, grown]


def line(name, perplexities, figures):
    """A row of the table."""
    zeros, *cost = figures
    shown = [f"{cost[0]:.0f}", f"{cost[1]:.2f}", f"{cost[2]:.0f}"] if cost else ["", "", ""]
    return f"| {' | '.join([name, *(f'{one:.4f}' for one in perplexities), f'{zeros:.6f}', *shown])} |"


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--also", nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        torch.set_num_threads(1)
        criterion, settings = ROWS[options.only[0]] or (None, {})
        print(line(options.only[0], *measure(options, criterion, settings)))
        return

    def fresh(name):
        given = [sys.executable, __file__, *sys.argv[1:], "--here", "--only", name]
        row = subprocess.run(given, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        print(row, flush=True)
        return row

    columns = ["one shot", *(f"perplexity, {Path(test).stem}" for test in (options.test, *(options.also or ())[1:])), MEASURED]
    header = f"| {' | '.join(columns)} |"
    lines = [header, "|---" + "|---:" * (header.count("|") - 2) + "|"]
    print("\n".join(lines), flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        lines += pool.map(fresh, options.only)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
