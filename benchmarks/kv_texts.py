"""One KV head for three of a real model, measured on two texts that methods and training see, and on one that nothing sees.

`OMP_NUM_THREADS=1 python benchmarks/kv_texts.py MODEL DATA WORK --out kv_texts.md` writes the table; `measured.py` says what is
in DATA. The methods see windows of `--window` tokens of `--texts` (see `matching.py`). Training draws rows of 2 x 128 tokens
from the rest of both texts (AdamW as in `kv_heads.py`). Perplexity is that of the first 12 windows of 512 tokens of each test
text, and of Python's own library (the modules of its `asyncio`), in float32. What WORK holds is not measured again.
"""

import argparse
import asyncio
import email
import json
from functools import partial
from pathlib import Path

import torch
from measured import CALIBRATION, QUESTIONS, TESTS, Lines, answered, perplexity, python, shown, windows
from transformers import AutoTokenizer

import billhook as bh
from kv_heads import train

SVD = bh.kv_methods.SVD
ROWS = {
    "dense": None,
    "`svd`, frequencies fixed": SVD(frequencies="fixed"),
    "`svd`": SVD(),
    "`svd`, context 2,048": SVD(context=2048),
    "`svd`, context 512": SVD(context=512),
}
STATES = {"before": None, "repaired": bh.RepairConfig(), "matched": bh.RepairConfig(match=bh.criteria.BlockMatching())}
STATES["matched in 30 steps"] = bh.RepairConfig(match=bh.criteria.BlockMatching(steps=30))
SEEN = 64
"""Most windows of a text that methods see."""
COLUMNS = ("one KV head", *TESTS, "Python", *QUESTIONS)


def tests(options, left_out):
    """Windows of each test text and of Python's library, or of training text that nothing sees and of other modules."""
    package, length = (email, 512) if left_out else (asyncio, getattr(options, "test_window", 512))
    count = 8 if left_out else 12 * 512 // length
    rows = {name: windows(options, text, count, length, drawn=False) for name, (text, _) in TESTS.items()}
    if left_out:
        rows = {name: windows(options, text, 130 + count)[130:] for name, text in CALIBRATION.items()}
    return rows | {"python": python(options, package, count, length)}


def trained(options, model, steps):
    """The model after some steps on what the methods have not seen."""
    rest = [windows(options, text, None, options.window)[SEEN:].flatten() for text in CALIBRATION.values()]
    settings = argparse.Namespace(steps=steps, batch=2, length=128, lr=3e-4)
    shortest = min(map(len, rest))
    return train(model, torch.cat([ids[:shortest] for ids in rest]), settings)


def measured(options, name):
    """The perplexities of a row in each state, after training too, and its answers, each measured once."""
    texts = f"{' '.join(options.texts)} {options.window}".replace(":", "_")
    file, tested = options.work / f"{''.join(filter(str.isalnum, name))} {texts}.json", options.test_window
    folders, file = file.with_suffix(""), file if tested == 512 else file.with_name(f"{file.stem} on {tested}.json")
    known, rows = json.loads(file.read_text()) if file.exists() else {}, tests(options, left_out=False)

    def measure(state, make):
        folder, row = Path(f"{folders} {state}"), known.get(state, {})
        if not row:
            model = bh.load(folder, dtype="float32") if folder.exists() else make()
            row |= {text: perplexity(model, own) for text, own in rows.items()}
            if not folder.exists():
                bh.save(model, folder, AutoTokenizer.from_pretrained(options.model))
        row |= answered(options, folder) if options.ask and folder.exists() else {}
        known[state] = row
        file.write_text(json.dumps(known))
        print(name, state, row, flush=True)

    def converted(state):
        model = bh.load(str(options.model), dtype="float32")
        if ROWS[name] is not None:
            bh.convert_kv_heads(model, 1, ROWS[name], shown(options), repair=STATES[state])
        return model

    def continued(state, steps):
        return trained(options, bh.load(Path(f"{folders} {state}"), dtype="float32"), steps)

    for state in ["before"] if name == "dense" else options.states:
        measure(state, partial(converted, state))
        for steps in options.steps:
            measure(f"{state}, after {steps} steps", partial(continued, state, steps))
    return known


def main():
    """Every row that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--texts", nargs="*", default=["foldoc:8", "wikitext:8"])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--test-window", type=int, default=512, help="of as many tokens in total")
    parser.add_argument("--steps", type=int, nargs="*", default=[60])
    parser.add_argument("--states", nargs="*", default=list(STATES), choices=STATES)
    parser.add_argument("--ask", action="store_true", help="asks questions")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    lines, dense = Lines(options.out, COLUMNS), None
    for name in options.only:
        known = measured(options, name)
        dense = known["before"] if name == "dense" else dense
        for state, texts in known.items():
            ratios = [
                f"{texts[text]:,.2f}" + (f" ({texts[text] / dense[text]:.2f})" if dense else "") for text in (*TESTS, "python")
            ]
            lines.add([f"{name}, {state}", *ratios, *(f"{texts[text]:.3f}" if text in texts else "" for text in QUESTIONS)])


if __name__ == "__main__":
    main()
