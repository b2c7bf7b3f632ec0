"""Which heads a fine-tuned encoder can do without: the experiments of Michel et al. (1905.10650) on dictionary entries.

`OMP_NUM_THREADS=1 python benchmarks/heads.py MODEL TRAIN.txt TEST.txt --out heads.md --picture heads.png` writes the tables and
the picture; `--tuned FOLDER` keeps the fine-tuned model there, so that the next run starts from it, and `--parts` chooses.

TRAIN and TEST are of the Free On-line Dictionary of Computing (Debian's dict-foldoc). An entry is a headword, a blank line and
paragraphs of which the first begins with categories: `<language, humour> A daft way of ...`. The task is to tell the first
category from the headword and the rest of the first paragraph, cut to 128 tokens; all `<...>` are taken out. The twelve
categories that are most frequent in TRAIN count, all their entries there, and the first 600 in TEST. MODEL (an encoder, such as
all-MiniLM-L6-v2) is fine-tuned for three epochs: batch 32, AdamW at 2e-4, a tenth of warm-up, linear decay, seed 0.

Heads are scored on 256 random entries of TRAIN, in eight batches, divided by the layer's L2 norm, ranked over all layers and
masked from the lowest; nothing is trained afterwards. As in the paper a layer may lose all heads, unless `--keep` says otherwise.
Everything is in float32. The standard error of an accuracy is sqrt(p (1 - p) / 600); of the difference of two it is that of the
mean of the differences, entry by entry, which is smaller. Milliseconds are of CPU time on one thread, the median of rounds in
which the three models take turns.
"""

import argparse
import copy
import json
import random
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import billhook as bh
from billhook.pruning.choice import choose

CLASSES, ENTRIES, LENGTH = 12, 600, 128
SHARES = tuple(range(10, 100, 10))
TOKEN, EXAMPLE = "gate gradient, each token", "gate gradient, each example"
SCORES = {
    TOKEN: bh.importance.GateGradient("token"),
    EXAMPLE: bh.importance.GateGradient("example"),
    "Taylor": bh.Taylor("unit"),
    "activation norm": bh.importance.ActivationNorm(),
    "weight norm": bh.importance.WeightNorm(),
    "random, seed 0": bh.importance.baselines.RandomUnits(0),
    "random, seed 1": bh.importance.baselines.RandomUnits(1),
}
COLORS = dict(zip(SCORES, ("#1f5f8b", "#b03a2e", "#3d8b5f", "#c98a1b", "#7d5ba6", "0.6", "0.6"), strict=True))
TAG = re.compile(r"<([a-z][^<>@/]*)>\s*")


def entries(path):
    """Of each entry that has a category: the first one, and the headword with the first paragraph, without categories."""
    paragraphs = [one.strip() for one in re.split(r"\n\s*\n", Path(path).read_text()) if one.strip()]
    for headword, body in zip(paragraphs, paragraphs[1:], strict=False):
        if tag := TAG.match(body):
            category = " ".join(tag[1].split(",")[0].split())
            yield category, f"{TAG.sub('', headword)}. {TAG.sub('', body)}"


def classification(train, test, count):
    """The rows for training, and those for testing by length."""
    categories = [category for category, _ in Counter(one for one, _ in entries(train)).most_common(CLASSES)]
    splits = (
        [{"text": text, "label": categories.index(category)} for category, text in entries(path) if category in categories]
        for path in (train, test)
    )
    training, testing = splits
    return training, sorted(testing[:count], key=lambda row: len(row["text"]))


def batches(rows, tokenizer, size):
    """Rows as the model takes them."""
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    options = {"truncation": True, "max_length": LENGTH, "padding": True, "return_tensors": "pt"}
    return [
        {**tokenizer([row["text"] for row in part], **options), "labels": torch.tensor([row["label"] for row in part])}
        for part in parts
    ]


def fine_tune(model, rows, folder):
    """Trains a classifier and saves it in a folder."""
    pl.seed_everything(0)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary, "train.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        module = bh.TransformerModule(model, "sequence-classification", lr=2e-4, warmup=0.1, decay="linear", num_labels=CLASSES)
        data = bh.training.ClassificationDataModule({"train": str(file)}, tokenizer=model, length=LENGTH, batch_size=32)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        pl.Trainer(max_epochs=3, gradient_clip_val=1.0, accelerator="cpu", devices=1, **quiet).fit(module, data)
    module.model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)


class Lab:
    """A fine-tuned model, and what it is scored and tested on. Heads are as billhook gives them, by the names of attentions."""

    def __init__(self, options):
        train, test = classification(options.train, options.test, options.tested)
        if not (options.tuned / "config.json").exists():
            fine_tune(options.model, train, options.tuned)
        tokenizer = AutoTokenizer.from_pretrained(options.tuned)
        self.model = AutoModelForSequenceClassification.from_pretrained(options.tuned, dtype=torch.float32).eval()
        sample = sorted(random.Random(0).sample(train, options.scored), key=lambda row: len(row["text"]))
        self.scored, self.tested = batches(sample, tokenizer, 32), batches(test, tokenizer, 30)
        self.keep, self.known = options.keep, {}
        self.dense = self.right({})
        told = float(self.dense.mean())
        self.about = (
            f"{len(train)} entries to train on, {len(test)} to test: {100 * told:.2f} % are told, standard error "
            f"{100 * (told * (1 - told) / len(test)) ** 0.5:.2f}; heads are scored on {len(sample)} of those to train on."
        )
        print(self.about, flush=True)

    def right(self, masked):
        """Which of the test entries are told, 0 or 1, without these heads."""
        key = frozenset((layer, head) for layer, heads in masked.items() for head in heads)
        if key not in self.known:
            with bh.mask(self.model, masked), torch.no_grad():
                told = [self.model(**batch).logits.argmax(-1) == batch["labels"] for batch in self.tested]
            self.known[key] = torch.cat(told).double()
        return self.known[key]

    def scores(self, importance, masked):
        """How much each head matters while some are masked; these come before all others."""
        with bh.mask(self.model, masked):
            scores = bh.score(self.model, bh.find_units(self.model, "head"), importance, self.scored, normalize=True)
        for layer, heads in masked.items():
            scores[layer][heads] = -torch.inf
        return scores

    def lowest(self, scores, share, remove=False):
        """The heads that go, of all layers, at a share in percent."""
        total = sum(map(len, scores.values()))
        ratio = round(share * total / 100) / total
        heads = bh.find_units(self.model, "head")
        return choose(heads, scores, ratio, "global", max(self.keep, int(remove)), remove=remove)


def curve(lab, importance, again):
    """Which entries are told at each share of masked heads, `[shares, entries]`; scored once, or again at each share."""
    rows, masked, scores = [], {}, lab.scores(importance, {})
    for share in SHARES:
        if again and masked:
            scores = lab.scores(importance, masked)
        masked = lab.lowest(scores, share)
        rows.append(lab.right(masked))
    return torch.stack(rows)


def curves(lab):
    """Every score's curve, by its name and whether it is estimated again."""
    found = {}
    for name, importance in SCORES.items():
        for again in (False, True) if importance.needs_data else (False,):
            found[name, again] = curve(lab, importance, again)
            print(line(name, again, found[name, again], lab.dense), flush=True)
    return found


def line(name, again, rows, dense):
    """A row of the table of curves: the accuracies, and the share up to which each is less than a point below the dense one."""
    percents = (100 * rows.mean(1)).tolist()
    free = [share for share in (0, *SHARES) if all(100 * dense.mean() - one < 1 for one in percents[: share // 10])]
    how = "every 10 %" if again else "one shot"
    return f"| {name} | {how} | {' | '.join(f'{one:.1f}' for one in percents)} | {max(free)} % |"


def compared(found):
    """The two gate gradients beside each other, over all shares."""
    lines = []
    for again in (False, True):
        difference = found[TOKEN, again] - found[EXAMPLE, again]
        parts = [f"{share} %: {points(one)}" for share, one in zip(SHARES, difference, strict=True)]
        how = "every 10 %" if again else "one shot"
        lines.append(f"Each token less each example, {how}: {points(difference.mean(0))} over all shares; {', '.join(parts)}.")
    return "\n\n".join(lines)


def points(differences):
    """The mean of differences, entry by entry, in points, with its standard error."""
    return f"{100 * differences.mean():+.2f} ± {100 * differences.std() / len(differences) ** 0.5:.2f}"


def table_of_curves(lab):
    """The first part: the tables, and the curves."""
    found = curves(lab)
    head = f"| accuracy, dense {100 * lab.dense.mean():.2f} | scored | {' | '.join(f'{one} %' for one in SHARES)} | < 1 point |"
    rows = [line(name, again, rows, lab.dense) for (name, again), rows in found.items()]
    return "\n".join([head, "|---|---" + "|---:" * (len(SHARES) + 1) + "|", *rows, "", compared(found)]), found


def accuracy(model, batch):
    """The share of a batch that is told."""
    return (model(**batch).logits.argmax(-1) == batch["labels"]).double().mean()


def table_of_ablation(lab):
    """The second part: each head alone removed, and each alone left in its layer."""
    lines = ["| layer | worst head to lose | best head to lose | heads that lose nothing | best head alone | worst head alone |"]
    lines.append("|---:" * 6 + "|")
    without, only = (bh.importance.ablate_heads(lab.model, lab.tested, accuracy, mode) for mode in ("without", "only"))
    for number, name in enumerate(without.values):
        one, other = (100 * (found.values[name] - found.dense) for found in (without, only))
        worst, best = int(one.argmin()), int(other.argmax())
        lost = points(lab.right({name: [worst]}) - lab.dense)
        kept = points(lab.right({name: [head for head in range(len(one)) if head != best]}) - lab.dense)
        shown = [f"head {worst}: {lost}", f"{one.max():+.2f}", f"{int((one > -1e-9).sum())} of {len(one)}"]
        lines.append(f"| {' | '.join([str(number), *shown, f'head {best}: {kept}', f'{other.min():+.2f}'])} |")
    return "\n".join([*lines, "", "```", str(without), str(only), "```"])


def table_of_speed(lab):
    """The last part: how much faster a model is without half of its heads."""
    scores = lab.scores(SCORES[TOKEN], {})
    heads = lab.lowest(scores, 50, remove=True)
    models = {name: copy.deepcopy(lab.model) for name in ("dense", "masked", "removed")}
    bh.mask(models["masked"], heads)
    bh.pruning.prune_units(models["removed"], heads)
    lines = ["| 128 tokens, ms an example | dense | masked | removed | removed is faster |", "|---:" * 5 + "|"]
    for size in (1, 16, 64):
        ids = torch.randint(1000, 20000, (size, LENGTH), generator=torch.Generator().manual_seed(0))
        rounds = [{name: timed(model, ids) for name, model in models.items()} for _ in range(max(7, 64 // size))]
        middle = {name: median(one[name][0] for one in rounds[1:]) / size for name in models}
        shown = " | ".join(f"{one:.2f}" for one in middle.values())
        lines.append(f"| batch {size} | {shown} | {middle['dense'] / middle['removed']:.2f} x |")
    moved = float((rounds[0]["masked"][1] - rounds[0]["removed"][1]).abs().max())
    left = [len(each) - len(heads.get(layer, [])) for layer, each in scores.items()]
    return "\n".join([*lines, "", f"Heads left by layer: {left}. Logits of removed and masked differ by {moved:.2g} at most."])


@torch.no_grad()
def timed(model, ids):
    """CPU milliseconds of a forward, and its logits."""
    start = time.process_time()
    logits = model(ids).logits
    return 1000 * (time.process_time() - start), logits


def draw(lab, found, path):
    """The importance of each head, beside the curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    scores = torch.stack(list(lab.scores(SCORES[TOKEN], {}).values()))
    image = left.imshow(scores, cmap="Blues", vmin=0, aspect="auto")
    left.set(xlabel="head", ylabel="layer", title=f"importance: {TOKEN}")
    left.set(xticks=range(scores.shape[1]), yticks=range(scores.shape[0]))
    left.spines[:].set_visible(False)
    figure.colorbar(image, ax=left, pad=0.02).outline.set_visible(False)
    dense = 100 * float(lab.dense.mean())
    for (name, again), rows in found.items():
        style = {"linestyle": (0, (3, 2)), "linewidth": 1.0} if again else {"linewidth": 1.6, "marker": "o", "markersize": 3.5}
        label = None if again or name.endswith("1") else name.replace(", seed 0", ", two seeds")
        right.plot((0, *SHARES), (dense, *(100 * rows.mean(1)).tolist()), color=COLORS[name], label=label, **style)
    right.plot([], [], color="0.3", linestyle=(0, (3, 2)), linewidth=1.0, label="scored again every 10 %")
    error = (dense * (100 - dense) / len(lab.dense)) ** 0.5
    right.axhspan(dense - error, dense + error, color="0.9", linewidth=0, zorder=0, label="dense ± standard error")
    right.set(
        xticks=(0, *SHARES),
        xlabel="heads masked, %",
        ylabel="accuracy, %",
        title=f"{len(lab.dense)} test entries, nothing retrained",
    )
    right.grid(alpha=0.25)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path)


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with an encoder")
    parser.add_argument("train", help="a text file")
    parser.add_argument("test", help="a text file")
    parser.add_argument("--tuned", type=Path, help="where the fine-tuned model is, or is to be saved")
    parser.add_argument("--parts", nargs="*", default=("curves", "ablation", "speed"), choices=("curves", "ablation", "speed"))
    parser.add_argument("--keep", type=int, default=0, help="heads that a layer keeps at least")
    parser.add_argument("--scored", type=int, default=256, help="entries that heads are scored on")
    parser.add_argument("--tested", type=int, default=ENTRIES, help="entries of TEST")
    parser.add_argument("--out", type=Path, help="where the tables are written")
    parser.add_argument("--picture", type=Path, help="where the picture is drawn, a PNG")
    return parser.parse_args()


def main():
    """Measures, prints and writes."""
    options = arguments()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        options.tuned = options.tuned or Path(folder)
        lab = Lab(options)
    tables = [lab.about]
    for part in options.parts:
        if part == "curves":
            table, found = table_of_curves(lab)
            if options.picture:
                draw(lab, found, options.picture)
        else:
            table = {"ablation": table_of_ablation, "speed": table_of_speed}[part](lab)
        print(table, flush=True)
        tables.append(table)
        if options.out:
            options.out.write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
