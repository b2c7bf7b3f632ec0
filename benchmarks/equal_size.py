"""Every way to make a real model smaller at equal size: what is removed, chosen by what, with and without repair.

`OMP_NUM_THREADS=1 python benchmarks/equal_size.py MODEL DATA WORK --out equal_size.md` writes the table; `measured.py` says what
is in DATA, and how each row is measured (questions only where linears are repaired, or cannot be). With `--left-out` rows are
measured by the KL to the dense model on windows of the calibration texts that nothing has seen, by which a default may be chosen.
What WORK holds is not made or measured again: all rows take hours. Each row keeps at most 85 or 70 % of the parameters, all
layers cut alike but for the rows of `bh.shrink` with free ones. Scores, repair and search see the same 32 windows of 512 tokens:
12 of FOLDOC's training text, 12 of WikiText-2's validation text and 8 that the model has written.
"""

import argparse
import time
from pathlib import Path

import torch
from measured import COLUMNS, Lines, calibration, cells, figures, left_out
from transformers import AutoTokenizer

import billhook as bh
from billhook.importance.obs import OBS

SIZES = (0.85, 0.7)
IMPORTANCES = {"Taylor": bh.Taylor(), "OBS": OBS(), "OutputNorm": bh.OutputNorm()}
BLOCKS = {"BlockInfluence": bh.importance.BlockInfluence(), "Ablation": bh.importance.Ablation()}
WITHIN = {
    "feed-forwards": {"kv_heads": 0.0},
    "feed-forwards, 1 of 3 KV heads": {"kv_heads": 0.34},
    "attention": {"channels": 0.0},
}
SHRINKS = {"all, by one budget, uniform": "uniform", "all, by one budget, free": "free"}
KINDS = [*WITHIN, "hidden size", "blocks", *SHRINKS]


def rows_of(kind, size):
    """The rows of a kind: by what, and whether with repair."""
    if kind in SHRINKS:
        return [(kind, size, "shrink", True)]
    ways = BLOCKS if kind == "blocks" else IMPORTANCES
    return [(kind, size, by, repaired) for by in ways for repaired in ((False, True) if kind in WITHIN else (False,))]


class Table:
    """Makes rows, and remembers what has been made."""

    def __init__(self, options):
        self.options, self.dense = options, bh.load(str(options.model), dtype="float32")
        self.shown = calibration(options, self.dense, 12, 8)
        self.columns = ("FOLDOC", "WikiText-2", "its own text") if options.left_out else COLUMNS

    def row(self, kind, size, by, repaired):
        """A row's cells."""
        name = f"{kind} {100 * size:.0f} {by}{' repaired' if repaired else ''}"
        folder = self.options.work / f"equal {name}".replace(" ", "_").replace(",", "")
        refused = self.refused(folder, kind, size, by, repaired)
        if refused:
            return [f"refused: {refused}", *[""] * (len(self.columns) - 1)]
        if self.options.left_out:
            return [f"{lost:.3f}" for lost in left_out(self.options, folder).values()]
        asked = repaired or kind not in WITHIN
        return cells(figures(self.options, folder, asked), figures(self.options, self.options.work / "dense"))

    def refused(self, folder, kind, size, by, repaired):
        """Makes a row's model, once; why that is refused, or None."""
        refused = folder.with_suffix(".refused")
        if not folder.exists() and not refused.exists():
            start = time.process_time()
            torch.set_float32_matmul_precision(self.options.matmul)
            try:
                model = self.made(kind, size, by, repaired)
            except ValueError as error:
                refused.write_text(str(error))
            else:
                print(f"{folder.name}: {time.process_time() - start:.0f} CPU s", flush=True)
                bh.save(model, folder, AutoTokenizer.from_pretrained(self.options.model))
            torch.set_float32_matmul_precision("highest")
        return refused.read_text() if refused.exists() else None

    def made(self, kind, size, by, repaired):
        """Returns a copy of the model without what goes."""
        model = bh.load(str(self.options.model), dtype="float32")
        if kind in SHRINKS:
            variant_cache = self.options.work / "variant_cache"
            bh.shrink(model, bh.Budget(params=size), self.shown, layers=SHRINKS[kind], variant_cache=variant_cache)
            return model
        plan = self.plan(model, kind, size, by)
        bh.apply(model, plan, weights=bh.repair(model, plan, self.shown) if repaired else None)
        return model

    def plan(self, model, kind, size, by):
        """Plans the least that meets the size."""
        most = size * model.num_parameters()
        if kind in WITHIN:
            return bh.plan(model, scores=self.scored(model, by), amount=bh.Amount(params=size, **WITHIN[kind], round_to=1))
        if kind == "hidden size":
            width = model.config.hidden_size
            amounts = (bh.Amount(residual=gone / width, round_to=1) for gone in range(1, width))
            return self.first(most, amounts, model, by, "residual")
        return self.first(most, (bh.Amount(blocks=number) for number in range(1, 30)), model, by, "block")

    def first(self, most, amounts, model, by, kind):
        """The first plan that meets the size."""
        scores = self.kept(f"{kind} {by}", lambda: bh.score(model, bh.find_units(model, kind), self.by(by), self.shown))
        plans = (bh.plan(model, scores=scores, amount=amount) for amount in amounts)
        return next(plan for plan in plans if plan.parameters[1] <= most)

    def scored(self, model, by):
        """Scores of all channels and KV heads."""
        units = bh.find_units(model, "head") | bh.find_units(model, "channel")
        return self.kept(f"units {by}", lambda: bh.score(model, units, self.by(by), self.shown, per="kv_head"))

    def by(self, name):
        """The importance of a name."""
        return (IMPORTANCES | BLOCKS)[name]

    def kept(self, name, scores):
        """Scores, once for each importance."""
        file = self.options.work / f"scores {name}.pt".replace(" ", "_")
        if not file.exists():
            torch.save(scores(), file)
        return torch.load(file)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--sizes", nargs="*", type=float, default=SIZES, choices=SIZES)
    parser.add_argument("--matmul", default="highest", choices=("highest", "medium"), help="precision of float32 products")
    parser.add_argument("--left-out", action="store_true", help="measure on text that defaults may be chosen by")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    made, dense = Table(options), options.work / "dense"
    if not dense.exists():
        bh.save(made.dense, dense, AutoTokenizer.from_pretrained(options.model))
    table = Lines(options.out, ["removed", "by", "repair", *made.columns])
    wanted = [row for kind in options.only for size in options.sizes for row in rows_of(kind, size)]
    for kind, size, by, repaired in wanted:
        table.add([kind, by, "yes" if repaired else "no", *made.row(kind, size, by, repaired)])


if __name__ == "__main__":
    main()
