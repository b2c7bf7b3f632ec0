"""Heads of a real language model: perplexity against the share of heads masked, and what removing them saves.

`OMP_NUM_THREADS=1 python benchmarks/heads_lm.py MODEL TRAIN.txt TEST.txt --out heads_lm.md` writes two tables.

Scores are taken from the first windows of 512 tokens of TRAIN (32 of them, two in a batch), perplexity from those of TEST (16),
511 predictions each, in float32. The first table masks the lowest heads of all layers. The second takes away one query head of
each KV head, or one KV head with its query heads, in every layer, and compares the seconds of a forward of three models in turn:
dense, masked and smaller; the median of the ratios is shown.
"""

import argparse
import copy
import math
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh
from billhook.pruning.choice import choose

SHARES = (0.1, 0.2, 0.3, 0.5)
METHODS = {
    "gate gradient, each token": bh.importance.GateGradient(),
    "gate gradient, each example": bh.importance.GateGradient("example"),
    "Taylor": bh.Taylor("unit"),
    "activation norm": bh.importance.ActivationNorm(),
    "weight norm": bh.importance.WeightNorm(),
    "random": bh.importance.baselines.RandomUnits(),
}
SHAPES = [(1, 64), (1, 512), (16, 64)]


def windows(tokenizer, path, count):
    """The first windows of 512 tokens of a text."""
    ids = tokenizer(Path(path).read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * 512]).view(-1, 512)


@torch.no_grad()
def perplexity(model, rows):
    """Exp of the mean over all predictions, summed in float64."""
    total = 0.0
    for ids in rows:
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        total += float(cross_entropy(logits, ids[1:], reduction="none").double().sum())
    return math.exp(total / (511 * len(rows)))


def curves(model, scores, rows):
    """A line for every method: perplexity at each share of heads masked."""
    for name, own in scores.items():
        shown = []
        for share in SHARES:
            with bh.mask(model, choose(bh.find_units(model, "head"), own, share, ranking="global", min_units=0, remove=False)):
                shown.append(f"{perplexity(model, rows):,.2f}")
        yield f"| {name} | {' | '.join(shown)} |"


@torch.no_grad()
def seconds(model, shape):
    """CPU seconds of a forward."""
    ids = torch.zeros(shape, dtype=torch.long)
    start = time.process_time()
    model.model(ids, use_cache=False)
    return time.process_time() - start


def speed(models, shape, rounds):
    """The median of how many times as long the first model takes as each of the others."""
    taken = [[seconds(model, shape) for model in models] for _ in range(rounds + 1)][1:]
    return [median(row[0] / row[i] for row in taken) for i in range(1, len(models))]


def removal(model, scores, per, rows, rounds):
    """A line: what is left, perplexity, and how much faster a forward is."""
    count = model.config.num_key_value_heads
    ratio = 1 / count if per == "kv_head" else count / model.config.num_attention_heads
    chosen = choose(bh.find_units(model, "head"), scores, ratio, per=per)
    smaller, masked = copy.deepcopy(model), copy.deepcopy(model)
    plan = bh.pruning.prune_units(smaller, chosen, per=per)
    what = "a KV head with its query heads" if per == "kv_head" else "a query head of each KV head"
    with bh.mask(masked, chosen, per=per):
        ratios = [speed([model, masked, smaller], shape, rounds) for shape in SHAPES]
    told = " | ".join(f"{one:.2f} / {other:.2f}" for one, other in ratios)
    return f"| {what} | {1 - plan.parameters[1] / plan.parameters[0]:.1%} | {perplexity(smaller, rows):,.2f} | {told} |"


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--evaluate", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9, help="of timing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    rows = windows(tokenizer, options.test, options.evaluate)
    batches = [{"input_ids": ids} for ids in windows(tokenizer, options.train, options.examples).split(2)]
    lines = [
        f"dense: perplexity {perplexity(model, rows):.2f}",
        "",
        f"| heads masked | {' | '.join(f'{s:.0%}' for s in SHARES)} |",
    ]
    lines += ["|---" + "|---:" * len(SHARES) + "|"]
    print("\n".join(lines), flush=True)

    def tell(line):
        lines.append(line)
        print(line, flush=True)

    heads = bh.find_units(model, "head")
    scores = {name: bh.score(model, heads, method, batches, normalize=True) for name, method in METHODS.items()}
    for line in curves(model, scores, rows):
        tell(line)
    tell(f"\n| removed in every layer | parameters | perplexity | {' | '.join(f'{b} x {n} tokens' for b, n in SHAPES)} |")
    tell("|---|---:|---:" + "|---:" * len(SHAPES) + "|")
    best = bh.importance.GateGradient()
    for per in ("head", "kv_head"):
        tell(removal(model, bh.score(model, heads, best, batches, normalize=True, per=per), per, rows, options.rounds))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
