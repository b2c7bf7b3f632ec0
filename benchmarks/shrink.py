"""A real model made smaller by one command's defaults, on three domains, on questions, and after a little training.

`OMP_NUM_THREADS=1 python benchmarks/shrink.py MODEL DATA WORK --out shrink.md` writes the table; `measured.py` says what is in
DATA, and how each row is measured. WORK keeps what the model writes, the libraries, the smaller models and a file of figures for
each row, so that an interrupted run goes on. `--only` takes rows by name.

Calibration, "texts": 32 windows of 512 tokens each of FOLDOC's training text and of WikiText-2's validation text, drawn at
random, and 32 each of packaged text and of what the model has written (as `billhook shrink --data a.txt b.txt`); "matched": the
same, with block-wise reconstruction; "generated": 40 that it has written, and nothing else; "generated, 128": so many. All that
is chosen, as ridges, levels and sizes, is chosen on these. `--matmul medium` multiplies in bfloat16 where a CPU can: the
model's forwards, not sums of squares nor solving; what is measured in the end is in float32 either way. "+ N steps": of 2 x
256 tokens of the two texts, taught by the dense model (`--recover`); the dense model is trained in the same way for
comparison.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from measured import COLUMNS, Lines, calibration, cells, figures, shown, windows
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import billhook as bh
from billhook.cli.shrink import Recovery

SHRINKS = {
    "85 %, uniform": {"budget": bh.Budget(params=0.85)},
    "85 %, free": {"budget": bh.Budget(params=0.85), "layers": "free"},
    "71 %, uniform": {"budget": bh.Budget(params=0.71)},
    "71 %, free": {"budget": bh.Budget(params=0.71), "layers": "free"},
    "71 %, free, generations=0": {"budget": bh.Budget(params=0.71), "layers": "free", "search": bh.Search(generations=0)},
    "71 %, free, generations=0, round_to=1": {
        "budget": bh.Budget(params=0.71),
        "layers": "free",
        "search": bh.Search(generations=0, round_to=1),
    },
}
CONVERTED = "1 of 3 KV heads by svd"
STEPS, OWN = 300, {"generated": 40, "generated, 128": 128}
MATCHED = bh.RepairConfig(match=bh.criteria.BlockMatching())
ROWS = [
    "dense",
    *(f"{size} | {texts}" for size in [*SHRINKS, CONVERTED] for texts in ("texts", "matched", *OWN)),
    *(f"{size} | {texts} + {STEPS} steps" for size in SHRINKS for texts in ("texts", "matched")),
    f"dense | texts + {STEPS} steps",
]


def make(options, size, texts):
    """Makes a smaller model."""
    model = bh.load(str(options.model), dtype="float32")
    if size == "dense":
        return model
    seen = calibration(options, model, 0, OWN[texts]) if texts in OWN else shown(options)
    if size == CONVERTED:
        bh.convert_kv_heads(model, 1, "svd", seen, repair=MATCHED if texts == "matched" else bh.RepairConfig())
        return model
    settings = dict(SHRINKS[size])
    if texts == "matched":
        settings["search"] = replace(settings.get("search", bh.Search()), repair=MATCHED)
    shrunk = bh.shrink(model, batches=seen, variant_cache=options.work / "variant_cache", progress=_progress, **settings)
    print(shrunk, flush=True)
    (options.work / f"{size} {texts} found.json".replace(" ", "_")).write_text(json.dumps(shrunk.to_json()))
    return model


def _progress(done, total):
    if done % 10 == 0:
        print(f"{done} of {total} steps, {time.process_time():.0f} CPU s", flush=True)


def recovered(options, model, steps):
    """Trains a model as `billhook shrink --recover` does."""
    rows = torch.cat([windows(options, text, steps, 256) for text in ("foldoc/foldoc_train.txt", "wikitext-2/valid.txt")])
    examples = [{"input_ids": row, "labels": row} for row in rows]
    loader = DataLoader(examples, 2, shuffle=True, generator=torch.Generator().manual_seed(0))
    Recovery(recover=steps, recover_lr=options.lr).train(model, str(options.model), loader, torch.device("cpu"), 0, _progress)


def save(options, row):
    """Makes and saves a row's model, in this process, with how many CPU seconds that took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(options.matmul)
    start, (size, _, texts) = time.process_time(), row.partition(" | ")
    before, _, training = texts.partition(" + ")
    if training:
        first = options.model if size == "dense" else folder_of(options, f"{size} | {before}")
        model = bh.load(str(first), dtype="float32")
        recovered(options, model, STEPS)
    else:
        model = make(options, size, texts)
    bh.save(model, folder_of(options, row), AutoTokenizer.from_pretrained(options.model))
    (options.work / f"{folder_of(options, row).name}.seconds").write_text(f"{time.process_time() - start:.0f}")


def folder_of(options, row):
    """The folder of a row's model."""
    return options.work / row.replace(" ", "_")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", nargs="*", default=ROWS, choices=ROWS)
    parser.add_argument("--texts", nargs="*", default=["foldoc:32", "wikitext:32", "mixed:32", "generated:32"])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--lr", type=float, help="of the training")
    parser.add_argument("--matmul", default="highest", choices=("highest", "medium"), help="precision of float32 products")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if options.row:
        save(options, options.row)
        return
    table, dense = Lines(options.out, ["what is left", "calibrated on", *COLUMNS, "CPU s"]), None
    for row in ["dense", *(row for row in options.only if row != "dense")]:
        seconds = options.work / f"{folder_of(options, row).name}.seconds"
        if not seconds.exists():
            subprocess.run([sys.executable, *sys.argv, "--row", row], check=True)
        found = figures(options, folder_of(options, row))
        dense = dense or found
        size, _, texts = row.partition(" | ")
        table.add([size, texts, *cells(found, dense), f"{int(seconds.read_text()):,}"])


if __name__ == "__main__":
    main()
