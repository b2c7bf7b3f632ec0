"""What pruning experts, and the weights of experts, costs a mixture on text of calibrated kinds and on text that nothing saw.

`python benchmarks/mixture.py MODEL --train a.txt b.txt --test wikitext=a.txt foldoc=b.txt unseen=c.txt` prints perplexities of
`train_mixture.py`'s model: dense, without a quarter and half of the experts by every score, and with half of the weights zero.
"""

import argparse
import copy
import math
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh
from billhook.importance.baselines import RandomUnits

LENGTH, CALIBRATION, TEST = 256, 64, 128  # tokens of a window, and windows of each text
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

    print(f"| | {' | '.join(tests)} |\n|---|{'---:|' * len(tests)}")
    row("dense", dense)
    for share in (0.25, 0.5):
        for importance in IMPORTANCES:
            model = copy.deepcopy(dense)
            bh.apply(model, bh.plan(model, importance, calibration, experts=share))
            row(f"{share:.0%} of experts by `{importance}`", model)
    for criterion in (bh.Magnitude(), bh.Wanda(), bh.SparseGPT()):
        for pattern in ("unstructured", "2:4"):
            model = copy.deepcopy(dense)
            bh.prune(model, criterion, calibration, 0.5 if pattern == "unstructured" else None, pattern)
            row(f"{pattern}, `{criterion}`", model)


if __name__ == "__main__":
    main()
