"""A quarter of the channels, or six blocks, of a real model removed, repaired, and matched, on three texts.

`OMP_NUM_THREADS=1 python benchmarks/matching.py MODEL DATA WORK --out matching.md` writes the table; `measured.py` says what is
in DATA. Channels are ranked by `OutputNorm` and blocks by `BlockInfluence`. All methods see windows of 512 tokens of `--texts`:
`foldoc` and `wikitext` are training text, `mixed` is packaged, and `generated` is the model's own. Perplexity is that of
`kv_texts.py`: the first 12 windows of each test text, and of Python's own library, which nothing has seen, in float32; with
`--left-out`, of training text that nothing has seen, and of other modules. What WORK holds is not measured again.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from kv_texts import STATES, tests
from measured import TESTS, Lines, perplexity, shown

import billhook as bh

AMOUNTS = {
    "a quarter of the channels": {"importance": bh.OutputNorm(), "amount": bh.Amount(channels=0.25, round_to=1)},
    "6 blocks": {"importance": bh.importance.BlockInfluence(), "amount": bh.Amount(blocks=6)},
}


def measured(options, name):
    """The perplexities of a row as it is cut, repaired, and matched, each measured once."""
    file = options.work / f"{name} {' '.join(options.texts)}{' left out' * options.left_out}.json".replace(":", "_")
    known, rows = json.loads(file.read_text()) if file.exists() else {}, tests(options, options.left_out)
    for state, repair in STATES.items():
        if state not in known and (state in options.states if name in AMOUNTS else state == "before"):
            model = bh.load(str(options.model), dtype="float32")
            start = time.process_time()
            if name in AMOUNTS:
                seen = shown(options)
                plan = bh.plan(model, batches=seen, **AMOUNTS[name])
                bh.apply(model, plan, weights=None if repair is None else bh.repair(model, plan, seen, repair))
            known[state] = {text: perplexity(model, ids) for text, ids in rows.items()}
            known[state] |= {"seconds": time.process_time() - start, "parameters": model.num_parameters()}
            file.write_text(json.dumps(known))
            print(name, state, known[state], flush=True)
    return known


def main():
    """Every row that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--texts", nargs="*", default=["foldoc:32", "wikitext:32"])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--left-out", action="store_true", help="measures on training text, for choices")
    parser.add_argument("--states", nargs="*", default=list(STATES), choices=STATES)
    parser.add_argument("--only", nargs="*", default=list(AMOUNTS), choices=AMOUNTS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    lines, dense = Lines(options.out, ("removed", "parameters", *TESTS, "Python", "CPU s")), None
    for name in ("dense", *options.only):
        for state, row in measured(options, name).items():
            dense = dense or row
            ratios = [f"{row[text]:.2f} ({row[text] / dense[text]:.2f})" for text in (*TESTS, "python")]
            share = f"{row['parameters'] / dense['parameters']:.1%}"
            lines.add([f"{name}, {state}", share, *ratios, f"{row['seconds']:.0f}"])


if __name__ == "__main__":
    main()
