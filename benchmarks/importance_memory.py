"""What it takes to score units by gradients: memory above the model and CPU seconds, beside gradients of all weights at once.

`OMP_NUM_THREADS=1 python benchmarks/importance_memory.py MODEL TEXT.txt` prints the table. The channels of all feed-forward
blocks are scored on one batch of `--rows` windows of `--length` tokens of TEXT (few, so that logits do not hide the rest).
"at once" is how LLM-Pruner's script does it: a backward pass for the whole model, and for `mixed` squared gradients of every
weight, example by example. billhook turns each gradient into scores as it comes and drops it. Every row is a fresh process;
memory is the highest resident size above that with the model loaded and its weights touched, so Linux is needed.
"""

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh

ROWS = ("first", "first, at once", "mixed", "mixed, passes=1", "mixed, at once", "second", "OutputNorm", "OBS")
IMPORTANCE = {
    "first": bh.Taylor("first"),
    "mixed": bh.Taylor("mixed"),
    "mixed, passes=1": bh.Taylor("mixed", passes=1),
    "second": bh.Taylor("second"),
    "OutputNorm": bh.OutputNorm(),
    "OBS": bh.OBS(),
}


def resident(key):
    """A size of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def at_once(model, ids, mixed):
    """The gradients of all weights, and their squares, held until all are there."""
    squares = {}
    for row in ids.split(1) if mixed else ():
        model(input_ids=row, labels=row, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            square = parameter.grad.square() / len(ids)
            squares[name] = squares[name] + square if name in squares else square
        model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        first = parameter.detach() * parameter.grad
        (first - parameter.detach().square() * squares[name] / 2 if mixed else first).abs().sum()


def measure(options):
    """One row, in this process."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    count = options.rows * options.length
    ids = tokenizer(Path(options.text).read_text()[: 12 * count], add_special_tokens=False)["input_ids"][:count]
    ids = torch.tensor(ids).view(options.rows, options.length)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    units = bh.find_units(model, ["channel"])
    sum(float(parameter.sum()) for parameter in model.parameters())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before, start = resident("VmRSS"), time.process_time()
    if "at once" in options.row:
        at_once(model, ids, options.row.startswith("mixed"))
    else:
        bh.score(model, units, IMPORTANCE[options.row], [{"input_ids": ids}])
    print(f"| {options.row} | {resident('VmHWM') - before:,.0f} | {time.process_time() - start:.1f} |", flush=True)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "text"):
        parser.add_argument(name)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=ROWS, choices=ROWS)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        measure(options)
        return
    print("| score | MiB | CPU s |\n|---|---:|---:|", flush=True)
    for row in options.only:
        subprocess.run([sys.executable, *sys.argv, "--row", row], check=True)


if __name__ == "__main__":
    main()
