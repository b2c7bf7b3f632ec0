"""What billhook makes of a real model, in llama.cpp: yes or no, what quantisation costs, and how fast it reads and writes there.

`OMP_NUM_THREADS=1 python benchmarks/serving.py MODEL WORK` makes a folder of each kind, chosen by weights alone (speeds and
verdicts do not depend on which units go), has `serve_check` compare each with transformers, and then runs
`billhook bench --engine llama.cpp` on all of them: a prompt of 480 tokens and 64 more, one thread, interleaved rounds.
"""

import argparse
import subprocess
from pathlib import Path

import torch
from transformers import AutoTokenizer

import billhook as bh
from billhook.serving.check import serve_check

CUTS = {
    "20 % of channels, exactly": bh.Amount(channels=0.2, round_to=1),
    "20 % of channels": bh.Amount(channels=0.2),
    "20 % of channels, x 256": bh.Amount(channels=0.2, round_to=256),
    "1 of 3 KV heads, with its queries": bh.Amount(kv_heads=0.34),
    "an eighth of the hidden size": bh.Amount(residual=0.125),
    "4 of 30 blocks": bh.Amount(blocks=4),
    "20 % of channels, but for 6 blocks": bh.Amount(channels=0.2, first=4, last=2),
}
KINDS = ["dense", "3 -> 1 KV heads", *CUTS]


def make(options, kind):
    """Writes the folder of a kind, once."""
    folder = options.work / kind.replace(" ", "_").replace(",", "").replace("%", "percent")
    if not folder.exists():
        model = bh.load(str(options.model), dtype="float32")
        if kind in CUTS:
            importance = bh.importance.BlockInfluence() if CUTS[kind].blocks else bh.importance.WeightNorm()
            batches = [{"input_ids": torch.arange(100, 356)[None]}] if CUTS[kind].blocks else None
            bh.apply(model, bh.plan(model, importance, batches, amount=CUTS[kind]))
        elif kind != "dense":
            bh.convert_kv_heads(model, 1)
        bh.save(model, folder, AutoTokenizer.from_pretrained(options.model))
    return folder


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--unchecked", action="store_true", help="measure speeds alone")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    folders = {kind: make(options, kind) for kind in options.only}
    for kind, folder in folders.items() if not options.unchecked else ():
        print(f"{kind}: {serve_check(folder)}", flush=True)
    lengths = ["--contexts", "[480]", "--new_tokens", "64", "--rounds", "7", "--threads", "1"]
    subprocess.run(["billhook", "bench", *map(str, folders.values()), "--engine", "llama.cpp", *lengths], check=True)


if __name__ == "__main__":
    main()
