"""Zeros and smaller shapes in classifiers of real images: test accuracy, and agreement with the dense model.

`OMP_NUM_THREADS=1 python benchmarks/images.py DATA WORK --out images.md --picture docs/evidence/images.png` writes the tables and
the picture; `pictures.py` says what DATA is, and how the two models come into WORK. A row that was measured is kept in WORK.

Every row changes the dense model in one shot, by the first 1,024 training images. Criteria prune with `sequential="layer"`; in
the structured rows `OutputNorm` chooses, in each layer as many. Accuracy is that on all 10,000 test images, agreement the share
of them that the dense model puts into the same class. "Trained" is after `--steps` steps of 64 training images, all weights,
zeros held, the same for every row; the dense model's row says what the training alone does. MACs are those of one image.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from measured import Lines
from pictures import MODELS, dense, logits, pictures, train
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import billhook as bh
from billhook.plots.style import Plot, style_axes

CRITERIA = {
    "Magnitude": bh.Magnitude(),
    "Wanda": bh.Wanda(),
    "SparseGPT": bh.SparseGPT(),
    "Refit": bh.criteria.Refit(),
    "ALPS": bh.criteria.ALPS(),
}
LAYER = {"options": bh.PruneOptions(sequential="layer")}
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
AMOUNTS = {f"{sparsity:.0%}": {"sparsity": sparsity} for sparsity in SPARSITIES} | {"2:4": {"pattern": "2:4"}}
LEFT = {"options": bh.PruneOptions(sequential="layer", skip="classifier")}
OTHERWISE = {  # what weights are compared with, and what the classifier's ten rows lose
    "Magnitude by rows, 70%": (bh.Magnitude(compares="row"), {"sparsity": 0.7}),
    "Wanda by layers, 70%": (bh.Wanda(compares="layer"), {"sparsity": 0.7}),
    "Magnitude, 70%, classifier left": (bh.Magnitude(), {"sparsity": 0.7} | LEFT),
    "Wanda, 70%, classifier left": (bh.Wanda(), {"sparsity": 0.7} | LEFT),
}
TRAINED = [(criterion, "80%") for criterion in ("Magnitude", "Wanda", "ALPS")]
CHANNELS = {"50% of the channels": {"channels": 0.5}, "75% of the channels": {"channels": 0.75}}
HEADS = {"2 of 4 heads": {"heads": 0.5}, "2 of 4 heads, 50% of the channels": {"heads": 0.5, "channels": 0.5}}
CUTS = {"ViT": CHANNELS | HEADS, "ConvNeXt": CHANNELS}
COLOURS = dict(zip(CRITERIA, ("#7f8c8d", "#1f5f8b", "#2e8b57", "#d68910", "#b03a2e"), strict=True))


def calibration(images):
    """The first training images, without labels."""
    return [{"pixel_values": batch["pixel_values"]} for batch in images[:1024].batches()]


def zeros(criterion, amount, model, images):
    """Prunes weights; returns what holds the zeros after a step."""
    masks = bh.prune(model, criterion, calibration(images), **LAYER | amount).masks(model)

    @torch.no_grad()
    def hold():
        for name, mask in masks.items():
            model.get_submodule(name).weight.mul_(mask)

    return hold


def smaller(amount, repaired, model, images):
    """Removes channels or heads."""
    batches = calibration(images)
    plan = bh.plan(model, bh.OutputNorm(), batches, amount=bh.Amount(**amount, round_to=1))
    bh.apply(model, plan, weights=bh.repair(model, plan, batches) if repaired else None)
    return lambda: None


@torch.no_grad()
def macs(model):
    """Multiplications of the forward of one image."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixel_values=torch.zeros(1, 3, 28, 28))
    return counter.get_total_flops() // 2


class Judge:
    """Accuracy and agreement on the test images."""

    def __init__(self, model, test):
        self.test, self.own = test, logits(model, test).argmax(-1)

    def __call__(self, model):
        """Both, of a model."""
        found = logits(model, self.test).argmax(-1)
        return [float((found == other).float().mean()) for other in (self.test.labels, self.own)]


def measured(file, model, change, images, judge, steps):
    """A row's figures, measured once: MACs, and accuracy and agreement right after, and after some steps."""
    if not file.exists():
        hold = change(model, images)
        found = {"macs": macs(model), "before": judge(model)}
        if steps:
            found["after"] = judge(train(model, images, steps, 5e-4, hold=hold))
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def rows(name):
    """The rows of a model: name, what changes it, and whether it is trained."""
    yield "dense", lambda *_: lambda: None, True
    for amount, settings in AMOUNTS.items():
        for criterion, made in CRITERIA.items():
            yield f"{criterion}, {amount}", partial(zeros, made, settings), (criterion, amount) in TRAINED
    for row, settings in OTHERWISE.items():
        yield row, partial(zeros, *settings), False
    for cut, ratios in CUTS[name].items():
        for repaired in (False, True):
            yield f"{cut}{', repaired' if repaired else ''}", partial(smaller, ratios, repaired), True


def draw(found, path):
    """Accuracy against sparsity, a panel for each model."""
    figure = Plot(figsize=(9, 3.6), dpi=150, layout="constrained")
    for axes, (name, own) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        whole = own["dense"]["before"][0]
        axes.axhline(100 * whole, color="black", linestyle=":", linewidth=1, label="dense")
        for criterion, colour in COLOURS.items():
            curve = [whole, *(own[f"{criterion}, {sparsity:.0%}"]["before"][0] for sparsity in SPARSITIES)]
            axes.plot([0, *(100 * s for s in SPARSITIES)], [100 * a for a in curve], "o-", color=colour, label=criterion, ms=4)
        axes.set(xlabel="weights that are zero, %", ylabel="test accuracy, %", title=f"{name}, one shot")
        style_axes(axes)
        axes.legend(loc="lower left", fontsize=8)
    figure.savefig(path)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=100, help="of training after pruning")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, _, test = pictures(options.data)
    lines = Lines(options.out, ("model", "one shot", "MACs", "accuracy", "agreement", "trained: accuracy", "agreement"))
    found = {name: {} for name in MODELS}
    for name, own in found.items():
        judge = Judge(dense(options.work, name, images), test)
        for row, change, trained in rows(name):
            file = options.work / f"{name}, {row}.json"
            model = dense(options.work, name, images)
            own[row] = one = measured(file, model, change, images, judge, options.steps if trained else 0)
            shares = [f"{share:.2%}" for share in one["before"] + one.get("after", [])] + [""] * (0 if "after" in one else 2)
            lines.add([name, row, f"{one['macs'] / own['dense']['macs']:.1%}", *shares])
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
