"""Verdicts of smaller models: perplexity ratios beside the share of texts that loop.

`OMP_NUM_THREADS=1 python benchmarks/verdicts.py MODEL WORK --data FOLDOC WIKITEXT --test FOLDOC WIKITEXT --out verdicts.md` takes
hours. Rows of the table in --out are not measured again, so that it goes on where it stopped. Each row is what its command makes
of MODEL (SmolLM2-135M-Instruct), with `--data` for both files of training text; `Q8_0` and `Q4_K_M` are quantized by llama.cpp
without an importance matrix, and read back by transformers. `billhook verdict` compares each with MODEL on the files of --test,
by its defaults: 8 examples of each text, and 4 prompts of each text and temperature.
"""

import argparse
import json
import math
import shlex
import subprocess
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from billhook.serving.converter import Converter
from billhook.serving.engine import LlamaCpp
from billhook.serving.written import write_gguf

QUANTIZED = ("Q8_0", "Q4_K_M")
VOCABULARY = ("prune-vocabulary --tokens 0.1", "prune-vocabulary --tokens 0.25")
COMMANDS = (
    "prune --sparsity 0.5 --criterion Wanda",
    "prune --pattern 2:4 --criterion Wanda",
    "prune-structure --params 0.95",
    "prune-structure --params 0.9",
    "prune-structure --params 0.85",
    "prune-structure --params 0.71",
    "prune-blocks --blocks 3",
    "convert --num_key_value_heads 1 --method svd",
)
ROWS = (
    *QUANTIZED,
    *VOCABULARY,
    *(f"{command} --effort fast" for command in COMMANDS),
    *(f"{command} --effort default" for command in COMMANDS),
    "shrink --params 0.85 --effort default",
    "prune-structure --params 0.71 --effort best",
    "shrink --params 0.85 --recover 300 --effort default",
)
DENSE = "dense model"
KINDS = ("repaired and polished", "unrepaired", "recovered", "quantized")
COLUMNS = [
    "made by",
    "parameters",
    "domain",
    "other text (worst)",
    "same token",
    "accepted",
    "loops, greedy",
    "loops, T=0.7",
    "ends, T=0.7",
]


def name_of(row):
    """The folder of a row."""
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in row)


def label_of(row):
    """The first cell of a row."""
    return row if row in (DENSE, *QUANTIZED) else f"`billhook {row}`"


def kind_of(row):
    """What was done to the model."""
    if row in QUANTIZED:
        return "quantized"
    if row in VOCABULARY or row.endswith("fast"):
        return "unrepaired"
    return "recovered" if "recover" in row else "repaired and polished"


def quantized(options, kind, folder):
    """Quantizes the dense model, and saves the weights that transformers reads from the file."""
    file = options.work / f"{kind}.gguf"
    full = options.work / "F16.gguf"
    if not full.exists():
        with Converter() as converter:
            write_gguf(str(options.model), full, converter, "f16")
    with LlamaCpp() as engine:
        engine.quantize(full, file, kind)
    read = AutoModelForCausalLM.from_pretrained(options.work, gguf_file=file.name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)  # transformers does not save what it reads
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(folder)


def made(options, row):
    """The folder of a row's model, made once."""
    folder = options.work / name_of(row)
    if row in QUANTIZED:
        if not (folder / "config.json").exists():
            quantized(options, row, folder)
    elif not (folder / "billhook.json").exists():
        command, *words = shlex.split(row)
        data = [word for file in options.data for word in ("--data", str(file))]
        print(f"billhook {row}", flush=True)
        subprocess.run(["billhook", command, str(options.model), str(folder), *words, *data], check=True)
    return folder


def verdict_of(options, row):
    """What `billhook verdict` finds, measured once."""
    folder = made(options, row)
    file = options.work / f"{folder.name}.json"
    if not file.exists():
        data = [word for path in options.test for word in ("--data", str(path))]
        cache = ["--cache", str(options.work / "cache")]
        command = ["billhook", "verdict", str(options.model), str(folder), *data, *cache, "--json", str(file)]
        subprocess.run(command, check=True)
    return json.loads(file.read_text())


def mean(values):
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def cells(options, row):
    """A row of the table, and the dense model's."""
    result = verdict_of(options, row)
    tested = {path.stem for path in options.test}
    texts, written = result["degradation"], result["written"]
    ratios = [[text["ratio"] for text in texts if (text["source"] in tested) == seen] for seen in (True, False)]
    before, after = (
        AutoModelForCausalLM.from_pretrained(path).num_parameters() for path in (options.model, options.work / name_of(row))
    )
    same, accepted = (sum(float(text[name]) for text in texts) / len(texts) for name in ("agreement", "acceptance"))
    shown = [f"{mean(ratios[0]):.2f}x", f"{mean(ratios[1]):.2f}x ({max(ratios[1]):.2f}x)"]
    shown += ["" if math.isnan(share) else f"{share:.0%}" for share in (same, accepted)]
    writes = {
        when: [f"{share:.0%}" for share in (*(text[when]["loop_share"] for text in written), written[-1][when]["ended"])]
        for when in ("before", "after")
    }
    dense = [DENSE, f"{before:,}", "1.00x", "1.00x (1.00x)", "100%", "100%", *writes["before"]]
    return [label_of(row), f"{after:,}", *shown, *writes["after"]], dense


def measured(file):
    """The rows of a table in Markdown, by their first cells."""
    lines = [line for line in file.read_text().splitlines() if line.startswith("| ")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in rows}


def draw(rows, plot):
    """Draws the shares of texts that loop over the ratio of perplexities on other text."""
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for label, color in {"greedy": "tab:orange", "T=0.7": "tab:blue"}.items():
        column = COLUMNS.index(f"loops, {label}")
        points = {name: (float(cells[3].split("x")[0]), float(cells[column].rstrip("%"))) for name, cells in rows.items()}
        axes.axhline(points[DENSE][1], color=color, linewidth=0.8, linestyle=":", label=f"{label}, dense")
        for marker, kind in zip("ox^s", KINDS, strict=True):
            chosen = [points[label_of(row)] for row in ROWS if kind_of(row) == kind and label_of(row) in points]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), marker, color=color, label=f"{label}, {kind}", fillstyle="none")
    axes.set(xlabel="perplexity over the dense model's, on other text", ylabel="texts that loop (%)", xscale="log", ylim=(0, 100))
    axes.set_xticks([1, 1.25, 1.5, 2, 3, 4, 6], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlim(0.95, max(float(cells[3].split("x")[0]) for cells in rows.values()) * 1.1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(plot)


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, nargs=2, required=True)
    parser.add_argument("--test", type=Path, nargs=2, required=True)
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    lines = measured(options.out) if options.out.exists() else {}
    for row in options.rows:
        if label_of(row) in lines:
            continue
        try:
            lines[label_of(row)], lines[DENSE] = cells(options, row)
        except subprocess.CalledProcessError as error:
            print(f"{row}: {error}", flush=True)
            continue
        shown = [lines[label] for label in map(label_of, (DENSE, *ROWS)) if label in lines]
        table = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *shown]
        options.out.write_text("".join(f"| {' | '.join(line)} |\n" for line in table))
    if options.plot and lines:
        draw(lines, options.plot)


if __name__ == "__main__":
    main()
