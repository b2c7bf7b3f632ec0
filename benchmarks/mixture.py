"""What pruning experts, their channels, and their weights costs a mixture, on text of calibrated kinds and on unseen text.

`python benchmarks/mixture.py MODEL --train a.txt b.txt --test wikitext=a.txt foldoc=b.txt unseen=c.txt` prints perplexities of
`train_mixture.py`'s model: without experts or channels right after the cut, after repair, and after 60 steps of routers or of all
weights with the dense model as teacher; and with half of the weights zero.
"""

import argparse
import copy
import math
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh
from billhook.importance.baselines import RandomUnits

LENGTH, CALIBRATION, TEST = 256, 64, 128  # tokens of a window, and windows of each text
STEPS, LR, ROUTER_LR = 60, 1e-4, 1e-3
IMPORTANCES = [
    bh.importance.REAP(),
    bh.importance.RoutingFrequency(),
    bh.importance.GateMass(),
    bh.Taylor(),
    bh.importance.WeightNorm(),
    RandomUnits(),
]


def windows(tokenizer, path, count):
    """Windows spread evenly over a text, `[count, LENGTH]`."""
    ids = torch.tensor(tokenizer(Path(path).read_text(), verbose=False)["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


@torch.inference_mode()
def perplexity(model, rows):
    """The perplexity on windows."""
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(8)]
    return math.exp(sum(losses) / len(rows))


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument("--test", nargs="+", required=True, help="NAME=FILE")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    dense = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    dense.set_experts_implementation("eager")
    calibration = [{"input_ids": part} for path in arguments.train for part in windows(tokenizer, path, CALIBRATION).split(8)]
    tests = {name: windows(tokenizer, path, TEST) for name, _, path in (pair.partition("=") for pair in arguments.test)}

    def row(label, model):
        print(f"| {label} | " + " | ".join(f"{perplexity(model, rows):.2f}" for rows in tests.values()) + " |", flush=True)

    def train(model, trainable, lr):
        """60 steps on the calibration text, with the dense model as teacher."""
        pl.seed_everything(0, verbose=False)
        module = bh.TransformerModule(
            copy.deepcopy(model), lr=lr, trainable=trainable, distillation=bh.training.Distillation(arguments.model, weight=1.0)
        )
        order = [calibration[number % len(calibration)] for number in torch.randperm(STEPS * 4)[:STEPS]]
        loader = torch.utils.data.DataLoader([{**batch, "labels": batch["input_ids"]} for batch in order], batch_size=None)
        settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        pl.Trainer(max_steps=STEPS, accelerator="cpu", **settings).fit(module, loader)
        return module.model.eval()

    print(f"| | {' | '.join(tests)} |\n|---|{'---:|' * len(tests)}")
    row("dense", dense)
    amounts = [({"channels": share}, importance) for share in (0.25, 0.5) for importance in (bh.OutputNorm(), bh.OBS())]
    amounts += [({"experts": share}, importance) for share in (0.25, 0.5) for importance in IMPORTANCES]
    for amount, importance in amounts:
        ((kind, share),) = amount.items()
        label = f"{share:.0%} of {kind} by `{importance}`"
        plan = bh.plan(dense, importance, calibration, **amount)
        models = [copy.deepcopy(dense) for _ in range(2)]
        for model, weights in zip(models, (None, bh.repair(dense, plan, calibration)), strict=True):
            bh.apply(model, plan, weights=weights)
        row(label, models[0])
        row(f"{label}, repaired", models[1])
        if isinstance(importance, bh.OutputNorm | bh.importance.REAP):
            row(f"{label}, repaired, {STEPS} steps of routers", train(models[1], "router", ROUTER_LR))
            row(f"{label}, repaired, {STEPS} steps of all weights", train(models[1], "all", LR))
    for criterion in (bh.Magnitude(), bh.Wanda(), bh.SparseGPT()):
        for pattern in ("unstructured", "2:4"):
            model = copy.deepcopy(dense)
            bh.prune(model, criterion, calibration, 0.5 if pattern == "unstructured" else None, pattern)
            row(f"{pattern}, `{criterion}`", model)


if __name__ == "__main__":
    main()
