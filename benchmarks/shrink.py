"""A real model made smaller by one command's defaults, on two domains, on questions, and after a little training.

`OMP_NUM_THREADS=1 python benchmarks/shrink.py MODEL DATA WORK --out shrink.md` writes the table. DATA holds
`foldoc/foldoc_{train,test}.txt`, `wikitext-2/{valid,test}.txt` and `zeroshot/{arc_easy,piqa}.jsonl`; WORK keeps what the model
writes, the libraries, the smaller models and a file of figures for each row, so that an interrupted run goes on. `--only` takes
rows by name.

Calibration, "texts": 48 windows of 512 tokens each of FOLDOC's training text and of WikiText-2's validation text, drawn at
random, and 32 that the model has written (what `billhook shrink --data '[a.txt, b.txt]'` takes by default); "generated": 40 that
it has written, and nothing else (what it takes where it is given no data). All that is chosen, as ridges, levels and sizes, is
chosen on these. Perplexity is that of the first 16 windows of FOLDOC's test text and the first 32 of WikiText-2's, in float32;
ARC-easy and PIQA are accuracies on the first 150 questions, by `billhook evaluate`. "+ N steps": of 2 x 256 tokens of the two
texts, taught by the dense model (`--recover`); the dense model is trained in the same way for comparison.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import billhook as bh
from billhook.cli.oneshot.recovery import Recovery
from billhook.running.batches import Batch

SHRINKS = {
    "85 %, uniform": {"params": 0.85},
    "85 %, free": {"params": 0.85, "layers": "free"},
    "71 %, uniform": {"params": 0.71},
    "71 %, free": {"params": 0.71, "layers": "free"},
}
KV_HEADS = "1 of 3 KV heads"
STEPS = 300
QUESTIONS = ("arc_easy", "piqa")
ROWS = [
    "dense",
    *(f"{size} | {texts}" for size in [*SHRINKS, KV_HEADS] for texts in ("texts", "generated")),
    *(f"{size} | texts + {STEPS} steps" for size in SHRINKS),
    f"dense | texts + {STEPS} steps",
]
HEADER = (
    "| what is left | calibrated on | parameters | KV bytes a token | FOLDOC | WikiText-2 | ARC-easy | PIQA | CPU s | loads by |"
)


def windows(options, text, count, length=512, drawn=True):
    """Rows of a text, drawn at random or the first."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = torch.tensor(tokenizer((options.data / text).read_text(), add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]] if drawn else rows[:count]


def written(options, model):
    """What the model has written, once."""
    file = options.work / "written.pt"
    if not file.exists():
        torch.save(torch.cat([batch["input_ids"] for batch in bh.generated(model, examples=40, length=512)]), file)
    return torch.load(file)


def batches(rows, source):
    """Batches of one row, with labels."""
    return [Batch({"input_ids": row[None], "labels": row[None]}, source) for row in rows]


def calibration(options, model, texts):
    """The batches that a smaller model is fitted to and chosen on."""
    own = batches(written(options, model)[: 32 if texts else 40], "generated")
    if not texts:
        return own
    foldoc, wikitext = (windows(options, text, 48) for text in ("foldoc/foldoc_train.txt", "wikitext-2/valid.txt"))
    return batches(foldoc, "foldoc") + batches(wikitext, "wikitext") + own


def make(options, size, texts):
    """Makes and saves a smaller model; returns how it loads."""
    model = bh.load(str(options.model), dtype="float32")
    if size != "dense":
        shown = calibration(options, model, texts)
        if size == KV_HEADS:
            bh.convert_kv_heads(model, 1, "svd", shown, repair=bh.Repair())
        else:
            library = options.work / "library"
            print(bh.shrink(model, shown, library=library, progress=_progress, **SHRINKS[size]), flush=True)
    return model


def _progress(done, total):
    if done % 10 == 0:
        print(f"{done} of {total} steps, {time.process_time():.0f} CPU s", flush=True)


def recovered(options, model, steps):
    """Trains a model as `billhook shrink --recover` does."""
    texts = (("foldoc/foldoc_train.txt", "wikitext-2/valid.txt"), steps)
    rows = torch.cat([windows(options, text, texts[1], 256) for text in texts[0]])
    examples = [{"input_ids": row, "labels": row} for row in rows]
    loader = DataLoader(examples, 2, shuffle=True, generator=torch.Generator().manual_seed(0))
    Recovery(recover=steps, recover_lr=options.lr).train(model, str(options.model), loader, torch.device("cpu"), 0, _progress)


@torch.no_grad()
def perplexity(model, rows):
    """Exp of the mean over all predictions."""
    losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in rows]
    return math.exp(sum(losses) / len(losses))


def answered(options, folder):
    """Accuracies on the first questions of each set."""
    file = options.work / "answers.json"
    data = ",".join(str(options.data / "zeroshot" / f"{name}.jsonl") for name in QUESTIONS)
    command = ["billhook", "evaluate", str(folder), "--data", f"[{data}]", "--limit", "150", "--json", str(file)]
    subprocess.run([*command, "--dtype", "float32"], check=True)
    answers = json.loads(file.read_text())["models"][0]["answers"]
    return {Path(name).stem: sum(one["acc"] for one in own) / len(own) for name, own in answers.items()}


def measure(options, row):
    """Makes one row's model, in this process, and measures it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size, _, shown = row.partition(" | ")
    before, _, training = shown.partition(" + ")
    start, folder, first = (
        time.process_time(),
        options.work / row.replace(" ", "_"),
        options.work / f"{size} | {before}".replace(" ", "_"),
    )
    if training:
        model = bh.load(str(options.model if size == "dense" else first), dtype="float32")
        recovered(options, model, STEPS)
    else:
        model = make(options, size, shown == "texts")
    seconds = time.process_time() - start
    saved = bh.save(model, folder, AutoTokenizer.from_pretrained(options.model))
    summary = bh.summary(model)
    tests = [
        windows(options, text, count, drawn=False)
        for text, count in (("foldoc/foldoc_test.txt", 16), ("wikitext-2/test.txt", 32))
    ]
    foldoc, wikitext = (perplexity(model, rows) for rows in tests)
    figures = {"params": summary.params, "kv_cache_bytes": summary.kv_cache_bytes, "foldoc": foldoc, "wikitext": wikitext}
    figures |= {"seconds": seconds, "way": saved.way, "config": model.config.to_dict()} | answered(options, folder)
    (options.work / f"{folder.name}.json").write_text(json.dumps(figures, default=str))


def line(row, found, dense):
    """A row of the table."""
    size, _, shown = row.partition(" | ")
    texts = " | ".join(f"{found[name]:.2f} ({found[name] / dense[name]:.2f})" for name in ("foldoc", "wikitext"))
    answers = " | ".join(f"{found[name]:.3f}" for name in QUESTIONS)
    loads = "billhook" if found["way"] == "shaped" else "transformers"
    kept = f"{found['params'] / dense['params']:.1%}"
    return (
        f"| {size} | {shown} | {kept} | {found['kv_cache_bytes']:,} | {texts} | {answers} | {found['seconds']:,.0f} | {loads} |"
    )


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", nargs="*", default=ROWS, choices=ROWS)
    parser.add_argument("--lr", type=float, help="of the training")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.row:
        measure(options, options.row)
        return
    lines = [HEADER, "|---|---|---:|---:|---:|---:|---:|---:|---:|---|"]
    dense = None
    for row in ["dense", *(row for row in options.only if row != "dense")]:
        file = options.work / f"{row.replace(' ', '_')}.json"
        if not file.exists():
            subprocess.run([sys.executable, *sys.argv, "--row", row], check=True)
        found = json.loads(file.read_text())
        dense = dense or found
        lines.append(line(row, found, dense))
        print(lines[-1], flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
