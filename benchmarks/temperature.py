"""At what temperature a model best writes the text that it is calibrated on.

`OMP_NUM_THREADS=1 python benchmarks/temperature.py MODEL DATA WORK --out temperature.md` writes the table; `measured.py` says
what is in DATA. For each temperature the model writes 24 windows of 512 tokens; a KV head of three with its query heads, and as
many channels as then leave 85 % of the parameters, alike in all blocks, go by `OutputNorm` and are repaired: on what was
written alone, and on 12 windows of it and 12 of FOLDOC's training text. Columns: the dense model's perplexity on what was
written, and the KL divergence of the cut model from the dense one, in nats per token, on ten windows of FOLDOC's training text
and of WikiText-2's validation text that nothing was fitted to, and on six that the model writes at temperature 1 and at 0.7. No
test text is read. Products of forwards are multiplied in bfloat16 where a CPU can.
"""

import argparse
from pathlib import Path

import torch
from measured import CALIBRATION, Lines, batches, divergence, perplexity, windows

import billhook as bh

TEMPERATURES = (1.0, 0.85, 0.7, 0.5)
MIXED = {"what it wrote": (24, 0), "and FOLDOC": (12, 12)}


def wrote(options, model, temperature, seed):
    """What the model writes at a temperature, once."""
    file = options.work / f"written {temperature} {seed}.pt".replace(" ", "_")
    if not file.exists():
        found = bh.generated(model, examples=24 if not seed else 6, length=512, temperature=temperature, seed=seed)
        torch.save(torch.cat([batch["input_ids"] for batch in found]), file)
    return torch.load(file)


def cut(options, rows):
    """A copy of the model, cut and repaired on rows of each source."""
    model = bh.load(str(options.model), dtype="float32")
    shown = [batch for source, own in rows.items() for batch in batches(own, source)]
    units = bh.find_units(model, "head") | bh.find_units(model, "channel")
    scores = bh.score(model, units, bh.OutputNorm(), shown, per="kv_head")
    plan = bh.plan(model, scores=scores, amount=bh.Amount(params=0.85, kv_heads=0.34, round_to=1))
    bh.apply(model, plan, weights=bh.repair(model, plan, shown))
    return model


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--temperatures", nargs="*", type=float, default=TEMPERATURES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    options.work.mkdir(parents=True, exist_ok=True)
    dense = bh.load(str(options.model), dtype="float32")
    tests = {name: windows(options, text, 106)[96:] for name, text in CALIBRATION.items()}
    tests |= {f"written at {temperature}": wrote(options, dense, temperature, 1) for temperature in (1.0, 0.7)}
    table = Lines(options.out, ["temperature", "perplexity", "fitted to", *tests])
    for temperature in options.temperatures:
        own = wrote(options, dense, temperature, 0)
        for name, (count, other) in MIXED.items():
            rows = {"generated": own[:count]} | ({"foldoc": windows(options, CALIBRATION["foldoc"], other)} if other else {})
            model = cut(options, rows)
            found = [f"{divergence(dense, model, test):.3f}" for test in tests.values()]
            table.add([f"{temperature:g}", f"{perplexity(dense, own[:8]):.1f}", name, *found])


if __name__ == "__main__":
    main()
