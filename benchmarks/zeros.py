"""What repair makes of a model that was pruned before it is cut: perplexity, and how many weights are zero.

`OMP_NUM_THREADS=1 python benchmarks/zeros.py MODEL DATA --out zeros.md` writes the table: Wanda at 50 %, then a fifth of the
channels by `OutputNorm()`, without and with repair. All see the first 8 windows of 512 tokens of FOLDOC's training text and of
WikiText-2's validation text; perplexity is that of the first 8 of their test texts. `--matmul medium` multiplies in bfloat16
where a CPU can.
"""

import argparse
from pathlib import Path

import torch
from measured import Lines
from transformers import AutoTokenizer

import billhook as bh
from billhook.engine.batches import Batch

TEXTS = {"FOLDOC": "foldoc/foldoc_{}.txt", "WikiText-2": "wikitext-2/{}.txt"}
SHOWN, WINDOWS, LENGTH, CHARACTERS = {"FOLDOC": "train", "WikiText-2": "valid"}, 8, 512, 400_000


def rows(options, name, split):
    """The first windows of a text."""
    text = (options.data / TEXTS[name].format(split)).read_text()[:CHARACTERS]
    ids = torch.tensor(AutoTokenizer.from_pretrained(options.model)(text)["input_ids"][: WINDOWS * LENGTH])
    return [Batch({"input_ids": row[None], "labels": row[None]}, name) for row in ids.view(-1, LENGTH)]


@torch.no_grad()
def perplexity(options, model, name):
    """Of the first windows of a test text."""
    return float(torch.stack([model(**row).loss for row in rows(options, name, "test")]).mean().exp())


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--matmul", default="highest", choices=("highest", "medium"), help="precision of float32 products")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(options.matmul)
    table = Lines(options.out, ["what", *TEXTS, "weights that are zero"])

    def add(what, model):
        zeros = sum(int((own == 0).sum()) for own in model.parameters())
        table.add([what, *(f"{perplexity(options, model, name):.2f}" for name in TEXTS), f"{zeros:,}"])

    shown = [row for name, split in SHOWN.items() for row in rows(options, name, split)]
    model = bh.load(str(options.model), dtype="float32")
    add("dense", model)
    bh.prune(model, bh.Wanda(), shown, sparsity=0.5)
    add("Wanda, 50 %", model)
    plan = bh.plan(model, bh.OutputNorm(), shown, channels=0.2)
    repaired, pruned = bh.repair(model, plan, shown), {name: own.clone() for name, own in model.state_dict().items()}
    for what, weights in (("and 20 % of the channels", None), ("and repaired", repaired)):
        model = bh.load(str(options.model), dtype="float32")
        model.load_state_dict(pruned)
        bh.apply(model, plan, weights=weights)
        add(what, model)


if __name__ == "__main__":
    main()
