"""Classifiers of real images cut to equal MACs by billhook and by torch-pruning, and then trained alike.

`pip install torch-pruning`; `OMP_NUM_THREADS=1 python benchmarks/images_vs_torch_pruning.py DATA WORK --out side_by_side.md`;
`--picture docs/evidence/images_macs.png` draws, too.
`pictures.py` says what DATA is, and how the two models come into WORK. A row that was measured is kept in WORK.

torch-pruning's rows are its own recipes: those of `examples/transformers/prune_hf_vit.py` for the ViT (as many dimensions of each
head; "uniform" also takes the same share of the stream, "bottleneck" leaves it), and for ConvNeXt those of
`examples/timm_models` (magnitude, uniform) and of Isomorphic-Pruning (Taylor, global, isomorphic, `round_to=2`). billhook's rows
are `Amount(flops=...)` by `OutputNorm`, with `RepairConfig` unless said otherwise. Both see the same first 1,024 training images,
and train for the same steps on the same batches in the same order. The
ratio that gives torch-pruning the MACs is found by bisection.
"Held out" are 5,000 training images that nothing was fitted to, on which one would choose; the rest is on all test images.
"""

import argparse
import copy
import json
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch_pruning as tp
from images import Judge, calibration, macs
from measured import Lines
from pictures import MODELS, dense, logits, pictures, train
from transformers.models.vit.modeling_vit import ViTAttention

import billhook as bh
from billhook.plots.style import Plot, style_axes

TARGETS = (0.7, 0.5)
MAGNITUDE, TAYLOR = partial(tp.importance.GroupMagnitudeImportance, p=1), tp.importance.GroupTaylorImportance
ISOMORPHIC = {"global_pruning": True, "isomorphic": True, "round_to": 2}
THEIRS = {
    "ViT": {
        "magnitude, uniform": (MAGNITUDE, False, {}),
        "Taylor, uniform": (TAYLOR, False, {}),
        "Taylor, bottleneck": (TAYLOR, True, {}),
    },
    "ConvNeXt": {
        "magnitude, uniform": (MAGNITUDE, False, {}),
        "Taylor, uniform": (TAYLOR, False, {}),
        "Taylor, bottleneck": (TAYLOR, True, {}),
        "Taylor, isomorphic": (TAYLOR, False, ISOMORPHIC),
    },
}
OURS = {"ViT": {"channels": False, "heads and channels": True}, "ConvNeXt": {"channels": False}}
"""Whether heads go, too, in the ratio in which operations do."""


def theirs(importance, bottleneck, how, target, model, images):
    """Prunes by torch-pruning to the MACs that are nearest."""
    whole, low, high, tried = macs(model), 0.0, 1.0, []
    for _ in range(7):
        ratio = (low + high) / 2
        cut = pruned(importance(), bottleneck, how, ratio, copy.deepcopy(model), images)
        tried.append((abs(macs(cut) / whole - target), len(tried), cut))
        low, high = (low, ratio) if macs(cut) < target * whole else (ratio, high)
    return min(tried)[2]


def pruned(importance, bottleneck, how, ratio, model, images):
    """Prunes as their examples do."""
    attentions = [module for module in model.modules() if isinstance(module, ViTAttention)]
    heads = {layer: one.num_attention_heads for one in attentions for layer in (one.q_proj, one.k_proj, one.v_proj)}
    last = [module for name, module in model.named_modules() if name.endswith(("o_proj", "pwconv2"))]
    pruner = tp.pruner.BasePruner(
        model,
        torch.zeros(1, 3, 28, 28),
        importance=importance,
        pruning_ratio=ratio,
        ignored_layers=[model.classifier, *(last if bottleneck else [])],
        output_transform=lambda out: out.logits.sum(),
        num_heads=heads,
        prune_head_dims=True,
        prune_num_heads=False,
        **how,
    )
    for batch in images[:1024].batches() if isinstance(importance, TAYLOR) else ():
        model(**batch).loss.backward()
    for group in pruner.step(interactive=True):
        group.prune()
    for one in attentions:
        one.num_attention_heads = pruner.num_heads[one.q_proj]
        one.head_dim = one.q_proj.out_features // one.num_attention_heads
        one.scaling = one.head_dim**-0.5
    model.zero_grad()
    return model


def ours(heads, repaired, target, model, images):
    """Prunes by billhook to a target."""
    batches = calibration(images)
    amount = bh.Amount(flops=target, kv_heads=1 - target if heads else 0.0, round_to=1)
    plan = bh.plan(model, bh.OutputNorm(), batches, amount=amount)
    bh.apply(model, plan, weights=bh.repair(model, plan, batches) if repaired else None)
    return model


def rows(name):
    """The rows of a model, each with what makes it."""
    for recipe, settings in THEIRS[name].items():
        yield f"torch-pruning: {recipe}", partial(theirs, *settings)
    for recipe, heads in OURS[name].items():
        yield f"billhook: {recipe}", partial(ours, heads, True)
    yield "billhook: channels, no repair", partial(ours, False, False)


def draw(found, path):
    """Accuracy right after the cut against MACs, a panel for each model."""
    figure, every = Plot(figsize=(9, 3.6), dpi=150, layout="constrained"), list(dict.fromkeys(chain(*found.values())))
    for axes, (name, cuts) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for recipe, points in cuts.items():
            shares, right = zip(*((100 * share, 100 * accuracy) for share, accuracy in sorted(points)), strict=True)
            style = "o-" if recipe.startswith("billhook") else "o--"
            axes.plot(shares, right, style, color=f"C{every.index(recipe)}", label=recipe, ms=4)
        axes.set(xlabel="MACs, % of the dense model's", ylabel="test accuracy, %", title=f"{name}, before any training")
        style_axes(axes)
        axes.legend(loc="lower right", fontsize=7)
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
    images, held_out, test = pictures(options.data)
    lines = Lines(options.out, ("model", "cut by", "MACs", "held out", "accuracy", "agreement", "trained: accuracy", "agreement"))
    found = {name: {} for name in MODELS}
    for name in MODELS:
        judge, whole = Judge(dense(options.work, name, images), test), macs(dense(options.work, name, images))
        for target in TARGETS:
            for row, make in rows(name):
                file = options.work / f"{name}, {target}, {row}.json"
                if not file.exists():
                    model = make(target, dense(options.work, name, images), images)
                    seen = float((logits(model, held_out).argmax(-1) == held_out.labels).float().mean())
                    found = [macs(model) / whole, seen, *judge(model)]
                    file.write_text(json.dumps([*found, *judge(train(model, images, options.steps, 5e-4))]))
                share, *shares = json.loads(file.read_text())
                lines.add([name, row, f"{share:.1%}", *(f"{one:.2%}" for one in shares)])
                found[name].setdefault(row, []).append((share, shares[1]))
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
