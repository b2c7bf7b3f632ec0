"""Measures a saved smaller model as a user meets it: three texts, questions, speed beside the dense model, and what loads it.

Shared by `shrink.py` and `equal_size.py`, whose DATA holds `foldoc/foldoc_{train,test}.txt`, `wikitext-2/{valid,test}.txt` and
`zeroshot/{arc_easy,piqa}.jsonl`. Perplexity is that of the first 16 windows of 512 tokens of FOLDOC's test text, the first 32 of
WikiText-2's, and the first 12 of Python's own library (the modules of its `asyncio`), which nothing has seen, in float32;
ARC-easy and PIQA are accuracies on the first 150 questions, by `billhook evaluate`; reading (a prompt of 512 tokens) and writing
(16 more) are times against the dense model's, in interleaved rounds, one thread.
"""

import asyncio
import json
import math
import subprocess
from pathlib import Path

import torch
from torch.nn.functional import kl_div
from transformers import AutoTokenizer

import billhook as bh
from billhook.calibration.reading import load_splits
from billhook.engine.batches import Batch
from billhook.report.speed import measure_speed

QUESTIONS = ("arc_easy", "piqa")
CALIBRATION = {"foldoc": "foldoc/foldoc_train.txt", "wikitext": "wikitext-2/valid.txt"}
TESTS = {"foldoc": ("foldoc/foldoc_test.txt", 16), "wikitext": ("wikitext-2/test.txt", 32)}
COLUMNS = (
    "parameters",
    "KV bytes per token",
    "FOLDOC",
    "WikiText-2",
    "Python",
    "ARC-easy",
    "PIQA",
    "reads",
    "writes",
    "loads by",
)


def rows_of(tokenizer, text, length=512):
    """A text as rows of tokens, without the rest."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def drawn_from(rows, count):
    """Rows at random."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]]


def windows(options, text, count, length=512, drawn=True):
    """Rows of a text, drawn at random or the first."""
    rows = rows_of(AutoTokenizer.from_pretrained(options.model), (options.data / text).read_text(), length)
    return drawn_from(rows, count) if drawn else rows[:count]


def python(options, package=asyncio, count=12, length=512):
    """The first rows of the source of a package of Python's library."""
    source = options.work / f"{package.__name__}.txt"
    source.write_text("\n".join(file.read_text() for file in sorted(Path(package.__file__).parent.glob("*.py"))))
    return windows(options, source.resolve(), count, length, drawn=False)


def written(options, model, count=40):
    """So many windows that the model has written, once."""
    file = options.work / ("written.pt" if count <= 40 else f"written {count}.pt")
    if not file.exists():
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # attention of one token takes twice as long in bfloat16 products
        made = bh.generated(model, examples=max(count, 40), length=512)
        torch.set_float32_matmul_precision(precision)
        torch.save(torch.cat([batch["input_ids"] for batch in made]), file)
    return torch.load(file)


def batches(rows, source):
    """Batches of one row, with labels."""
    return [Batch({"input_ids": row[None], "labels": row[None]}, source) for row in rows]


def calibration(options, model, texts=48, own=32):
    """The batches that a smaller model is fitted to and chosen on: so many windows of each text, and of the model's own."""
    shown = [batch for name, text in CALIBRATION.items() for batch in batches(windows(options, text, 48)[:texts], name)]
    return shown + batches(written(options, model, own)[:own], "generated")


def shown(options):
    """Windows of each of `--texts`: `foldoc:16`, `mixed:16`, `generated:16`, or `mixed-python-code:16`, without these kinds."""
    rows, length = {}, options.window
    for name, count in ((name, int(count)) for name, count in (text.split(":") for text in options.texts)):
        if name in CALIBRATION:
            rows[name] = windows(options, CALIBRATION[name], count, length)
        elif name == "generated":
            rows[name] = written(options, bh.load(str(options.model), dtype="float32"), count)[:count]
        else:
            kinds, model = name.split("-")[1:], bh.load(str(options.model), dtype="float32")
            table = load_splits("mixed")["train"].filter(lambda row, kinds=kinds: row["kind"] not in kinds)
            read = bh.Calibration(table, tokens=count * length, length=length).read(model)
            rows[name] = torch.cat([batch["input_ids"] for batch in read])
    return [batch for name, own in rows.items() for batch in batches(own, name)]


def perplexity(model, rows):
    """Exp of the mean over all predictions."""
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in rows]
    return math.exp(sum(losses) / len(losses))


def left_out(options, folder):
    """KL(dense || smaller), in nats per token by source, on six windows of each that nothing was fitted to or chosen on."""
    file = folder.parent / f"{folder.name}.left_out.json"
    if not file.exists():
        dense, model = bh.load(str(options.model), dtype="float32"), bh.load(str(folder), dtype="float32")
        rows = {name: windows(options, text, 106)[100:] for name, text in CALIBRATION.items()}
        rows["generated"] = written(options, dense)[32:38]
        file.write_text(json.dumps({name: divergence(dense, model, own) for name, own in rows.items()}))
    return json.loads(file.read_text())


@torch.no_grad()
def divergence(dense, model, rows):
    """The mean KL over all predictions."""
    own, other = ([each(row[None], use_cache=False).logits[0, :-1].log_softmax(-1) for row in rows] for each in (dense, model))
    return float(kl_div(torch.cat(other), torch.cat(own), reduction="batchmean", log_target=True))


def answered(options, folder):
    """Accuracies on the first questions of each set, asked once."""
    file = folder.parent / f"{folder.name}.answers.json"
    if not file.exists():
        data = ",".join(str(options.data / "zeroshot" / f"{name}.jsonl") for name in QUESTIONS)
        command = ["billhook", "evaluate", str(folder), "--data", f"[{data}]", "--limit", "150", "--json", str(file)]
        subprocess.run([*command, "--dtype", "float32"], check=True)
    answers = json.loads(file.read_text())["models"][0]["answers"]
    return {Path(name).stem: sum(one["acc"] for one in own) / len(own) for name, own in answers.items()}


def figures(options, folder, asked=True):
    """All figures of a saved model, measured once; questions only if they are asked."""
    file = folder.parent / f"{folder.name}.json"
    if not file.exists():
        file.write_text(json.dumps(_figures(options, folder)))
    return json.loads(file.read_text()) | (answered(options, folder) if asked else {})


def _figures(options, folder):
    dense, model = bh.load(str(options.model), dtype="float32"), bh.load(str(folder), dtype="float32")
    rows = measure_speed([dense, model], [1], [512], rounds=9)
    speeds = {row.phase: 1 / row.speed_up for row in rows if row.model}
    texts = {name: perplexity(model, windows(options, text, count, drawn=False)) for name, (text, count) in TESTS.items()}
    texts["python"] = perplexity(model, python(options))
    summary, shaped = bh.summary(model), "billhook" in json.loads((folder / "config.json").read_text())
    sizes = {"params": summary.params / bh.summary(dense).params, "kv_cache_bytes": summary.kv_cache_bytes}
    return sizes | speeds | texts | {"loads": "billhook" if shaped else "transformers"}


def cells(found, dense):
    """The cells of a row of a table, as `COLUMNS`."""
    texts = [f"{found[name]:,.2f} ({found[name] / dense[name]:.2f})" if name in found else "" for name in (*TESTS, "python")]
    answers = [f"{found[name]:.3f}" if name in found else "" for name in QUESTIONS]
    times = [f"{found[phase]:.2f}" for phase in ("prefill", "decode")]
    return [f"{found['params']:.1%}", f"{found['kv_cache_bytes']:,}", *texts, *answers, *times, found["loads"]]


class Lines:
    """A table that is printed, and written, row by row."""

    def __init__(self, file, columns):
        self.file, self.lines = file, [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]

    def add(self, row):
        """Adds a row's cells."""
        self.lines.append(f"| {' | '.join(row)} |")
        print(self.lines[-1], flush=True)
        if self.file:
            self.file.write_text("\n".join(self.lines) + "\n")
