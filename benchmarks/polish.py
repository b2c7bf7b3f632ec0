"""What a polish brings after a repair, on texts that calibration has seen and on two that it has not.

`OMP_NUM_THREADS=1 python benchmarks/polish.py MODEL DATA WORK --out polish.md` writes the table; `measured.py` says what is in
DATA. Methods see 16 windows of 512 tokens each of FOLDOC, WikiText-2, and packaged text without Python. `channels`: a quarter of
the channels, `OutputNorm()` and `RepairConfig()`; `heads`: one KV head of three, `svd`, not repaired. Perplexity is on 8 windows
of FOLDOC's and WikiText-2's test text, of Python's own library (`asyncio`), and on the packaged text of unseen kinds, over the
dense model's. What WORK holds is not measured again. CPU seconds are those of the polish, with the dense model's predictions.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from measured import TESTS, Lines, perplexity, python, shown, windows

import billhook as bh

POLISHES = {
    "as repaired": None,
    "scales (default)": bh.PolishConfig(),
    "LoRA": bh.PolishConfig(trains="lora"),
    "all weights": bh.PolishConfig(trains="all"),
}


def tests(options, model):
    """Windows of each text to measure on."""
    rows = {name: windows(options, text, 8, drawn=False) for name, (text, _) in TESTS.items()}
    unseen = bh.Calibration("unseen", tokens=16 * 512, length=512).read(model)
    return rows | {"python": python(options, count=8), "unseen": torch.cat([batch["input_ids"] for batch in unseen])}


def smaller(options, what):
    """The model without channels or KV heads, made once."""
    folder = options.work / f"polish {what}"
    if not folder.exists():
        model, seen = bh.load(str(options.model), dtype="float32"), shown(options)
        if what == "channels":
            plan = bh.plan(model, bh.OutputNorm(), seen, channels=0.25)
            bh.apply(model, plan, weights=bh.repair(model, plan, seen))
        else:
            bh.convert_kv_heads(model, 1, "svd", seen)
        bh.save(model, folder)
    return bh.load(str(folder), dtype="float32")


def measured(options, what, name):
    """The ratios of perplexity of a row, its CPU seconds and its held-out divergences, measured once."""
    file = options.work / f"polish {what} {name}.json"
    if not file.exists():
        dense, model, result, seconds = bh.load(str(options.model), dtype="float32"), smaller(options, what), {}, 0.0
        rows = tests(options, dense)
        if (how := POLISHES[name]) is not None:
            start = time.process_time()
            result = bh.polish(model, dense, shown(options), how).to_json()
            seconds = time.process_time() - start
        ratios = {text: perplexity(model, own) / perplexity(dense, own) for text, own in rows.items()}
        file.write_text(json.dumps({"ratios": ratios, "seconds": seconds, "polish": result}))
    return json.loads(file.read_text())


def main():
    """Measures all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", nargs="+", default=list(POLISHES), choices=POLISHES)
    parser.add_argument("--what", nargs="+", default=["channels", "heads"])
    options = parser.parse_args()
    options.texts, options.window = ["foldoc:16", "wikitext:16", "mixed-python:16"], 512
    options.work.mkdir(exist_ok=True)
    lines = Lines(options.out, ["smaller by", "polish", "FOLDOC", "WikiText-2", "Python", "unseen kinds", "CPU s"])
    for what in options.what:
        for name in options.rows:
            row = measured(options, what, name)
            lines.add([what, name, *(f"{ratio:.3f}" for ratio in row["ratios"].values()), f"{row['seconds']:,.0f}"])


if __name__ == "__main__":
    main()
