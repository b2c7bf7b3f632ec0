"""Every way to make a real model smaller at equal size: what is removed, chosen by what, with and without repair.

`OMP_NUM_THREADS=1 python benchmarks/equal_size.py MODEL DATA WORK --out equal_size.md` writes the table. DATA and WORK are as in
`benchmarks/shrink.py`; what WORK holds is not measured again. Each row keeps at most 85 or 70 % of the parameters, all layers cut
alike. Scores and repair see 12 windows of 512 tokens of FOLDOC's training text, 12 of WikiText-2's validation text and 8 that the
model has written. Perplexity is that of the first 16 windows of FOLDOC's test text and the first 32 of WikiText-2's.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from shrink import calibration, perplexity, windows

import billhook as bh
from billhook.importance.obs import OBS

SIZES = (0.85, 0.7)
IMPORTANCES = {"Taylor": bh.Taylor(), "OBS": OBS(), "OutputNorm": bh.OutputNorm()}
BLOCKS = {"BlockInfluence": bh.BlockInfluence(), "Ablation": bh.Ablation()}
KV_HEADS = {"feed-forwards": 0.0, "feed-forwards, 1 of 3 KV heads": 0.34}
KINDS = ["feed-forwards, 1 of 3 KV heads", "blocks", "hidden size", "feed-forwards"]
ROWS = [
    (kind, size, by, repaired)
    for kind in KINDS
    for size in SIZES
    for by in (BLOCKS if kind == "blocks" else IMPORTANCES)
    for repaired in ((False,) if kind in ("blocks", "hidden size") else (False, True))
]


class Table:
    """Measures rows, and remembers what has been measured."""

    def __init__(self, options):
        self.options, self.scores = options, {}
        self.dense = bh.load(str(options.model), dtype="float32")
        shown = calibration(options, self.dense, texts=True)
        self.shown = shown[:12] + shown[48:60] + shown[96:104]
        tests = {"foldoc": ("foldoc/foldoc_test.txt", 16), "wikitext": ("wikitext-2/test.txt", 32)}
        self.tests = {name: windows(options, text, count, drawn=False) for name, (text, count) in tests.items()}

    def row(self, kind, size, by, repaired):
        """A row's figures."""
        file = self.options.work / f"equal {kind} {size} {by} {repaired}.json".replace(" ", "_")
        if not file.exists():
            file.write_text(json.dumps(self.measured(kind, size, by, repaired)))
        return json.loads(file.read_text())

    def measured(self, kind, size, by, repaired):
        """Removes units of a copy of the model and measures it."""
        model = bh.load(str(self.options.model), dtype="float32")
        try:
            plan = self.plan(model, kind, size, by)
        except ValueError as error:
            return {"refused": str(error)}
        bh.apply(model, plan, weights=bh.repair(model, plan, self.shown) if repaired else None)
        figures = {name: perplexity(model, rows) for name, rows in self.tests.items()}
        return {"params": model.num_parameters() / self.dense.num_parameters()} | figures

    def plan(self, model, kind, size, by):
        """Plans the least that meets the size."""
        most = size * model.num_parameters()
        if kind in KV_HEADS:
            amount = bh.Amount(params=size, kv_heads=KV_HEADS[kind])
            return bh.plan(model, scores=self.scored(model, by), amount=amount)
        if kind == "hidden size":
            width = model.config.hidden_size
            return self.first(most, (bh.Amount(residual=gone / width) for gone in range(1, width)), model, IMPORTANCES[by])
        return self.first(most, (bh.Amount(blocks=number) for number in range(1, 30)), model, BLOCKS[by])

    def first(self, most, amounts, model, importance):
        """The first plan that meets the size."""
        unit = "residual" if isinstance(importance, (bh.Taylor, OBS, bh.OutputNorm)) else "block"
        scores = bh.score(model, bh.find_units(model, unit), importance, self.shown)
        plans = (bh.plan(model, scores=scores, amount=amount) for amount in amounts)
        return next(plan for plan in plans if plan.parameters[1] <= most)

    def scored(self, model, by):
        """Scores of all channels and KV heads, once for each importance."""
        if by not in self.scores:
            units = bh.find_units(model, "head") | bh.find_units(model, "channel")
            self.scores[by] = bh.score(model, units, IMPORTANCES[by], self.shown, per="kv_head")
        return self.scores[by]


def line(kind, by, repaired, found):
    """A row of the table."""
    if "refused" in found:
        return f"| {kind} | {by} | {'yes' if repaired else 'no'} | | refused: {found['refused']} | |"
    texts = " | ".join(f"{found[name]:,.2f}" for name in ("foldoc", "wikitext"))
    return f"| {kind} | {by} | {'yes' if repaired else 'no'} | {found['params']:.1%} | {texts} |"


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured, lines = (
        Table(options),
        ["| removed | by | repair | parameters | FOLDOC | WikiText-2 |", "|---|---|---|---:|---:|---:|"],
    )
    for kind, size, by, repaired in (row for row in ROWS if row[0] in options.only):
        lines.append(line(kind, by, repaired, measured.row(kind, size, by, repaired)))
        print(lines[-1], flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
