"""Pruning against quantization on a real model, and both together: bytes, perplexity and speed in llama.cpp.

    OMP_NUM_THREADS=1 python benchmarks/quantized.py MODEL DATA WORK --out quantized.md --plot quantized.png

The pruned models are made in WORK, with repair, on 12 windows of 512 tokens of each of two texts and 8 that the model
generates (a quarter of those in `shrink.py`): uniform ones lose MLP channels, non-uniform ones what `bh.shrink` chooses without
an evolutionary search, and the last KV heads (`bh.convert_kv_heads`). Each model is written as a GGUF file of F16 and quantized
by llama.cpp, without an importance matrix. Perplexity is llama.cpp's own, of the windows of `measured.py` (16 of
FOLDOC's test text, 32 of WikiText-2's, 512 tokens each). Prefill (480 tokens) and decoding (63 tokens) are measured in
interleaved rounds on one thread, as ratios to the dense model in F16 in the same round. WORK keeps every result, so that an
interrupted run goes on; `--speed` measures speeds alone, once all perplexities are there, since they need a quiet machine.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from measured import TESTS, Lines, calibration, windows
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

import billhook as bh
from billhook.serving.converter import Converter
from billhook.serving.engine import LlamaCpp, measure_engine, speed_up
from billhook.serving.written import write_gguf

MODELS = {
    "dense": None,
    "1 instead of 3 KV heads": None,
    "85%, uniform": bh.Amount(params=0.85, kv_heads=0.0),
    "85%, non-uniform": bh.Budget(params=0.85),
    "71%, uniform": bh.Amount(params=0.71, kv_heads=0.0),
    "71%, non-uniform": bh.Budget(params=0.71),
}
KINDS = {name: ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M") if name == "dense" else ("F16", "Q8_0", "Q4_K_M") for name in MODELS}
COLUMNS = ["model", "weights", "MB", "FOLDOC", "WikiText-2", "prefill", "decoding", "KV bytes per token"]
CONTEXT, NEW_TOKENS = 480, 64


def folder_of(options, name):
    """Returns the checkpoint of a model, made once."""
    if name == "dense":
        return options.model
    folder = options.work / name.replace(" ", "_").replace("%", "percent").replace(",", "")
    if not folder.exists():
        torch.manual_seed(0)
        model = bh.load(str(options.model), dtype="float32")
        batches = calibration(options, model, 12, 8)
        amount = MODELS[name]
        if amount is None:
            bh.convert_kv_heads(model, 1, "svd", batches, repair=bh.RepairConfig())
        elif isinstance(amount, bh.Amount):
            plan = bh.plan(model, bh.OBS(), batches, amount=amount)
            bh.apply(model, plan, weights=bh.repair(model, plan, batches))
            print(plan, flush=True)
        else:
            cache, search = options.work / "variants", bh.Search(generations=0)
            print(bh.shrink(model, amount, batches, layers="free", search=search, variant_cache=cache), flush=True)
        bh.save(model, folder, AutoTokenizer.from_pretrained(options.model))
    return folder


def file_of(options, name, kind):
    """Returns the GGUF file of a model, written once."""
    folder = folder_of(options, name)
    file = options.work / f"{'dense' if name == 'dense' else folder.name}.{kind}.gguf"
    if not file.exists():
        draft = file.with_suffix(".draft")
        if kind == "F16":
            with Converter() as converter:
                write_gguf(str(folder), draft, converter, "f16")
        else:
            with LlamaCpp(options.threads) as engine:
                engine.quantize(file_of(options, name, "F16"), draft, kind)
        draft.replace(file)
    return file


def result_of(options, name, kind):
    """Returns bytes and perplexities of a file, measured once."""
    file = file_of(options, name, kind)
    kept = file.with_suffix(".json")
    if not kept.exists():
        result = {"bytes": file.stat().st_size}
        with LlamaCpp(options.threads) as engine:
            engine.load(file, 512)
            for text, (path, count) in TESTS.items():
                rows = windows(options, path, count, drawn=False)
                losses = [float(cross_entropy(engine.logits(row.tolist())[:-1], row[1:])) for row in rows]
                result[text] = math.exp(sum(losses) / len(losses))
        kept.write_text(json.dumps(result))
        print(f"{name}, {kind}: {result}", flush=True)
    return json.loads(kept.read_text())


def speeds_of(options, names):
    """Returns quartiles of prefill and decoding ratios of every file to the dense model in F16, measured once."""
    kept = options.work / "speeds.json"
    if options.speed or not kept.exists():
        keys = [(name, kind) for name in names for kind in KINDS[name]]
        speeds = measure_engine([file_of(options, *key) for key in keys], CONTEXT, NEW_TOKENS, options.rounds)
        dense = speeds[keys.index(("dense", "F16"))]
        rows = {
            f"{name}, {kind}": [speed_up(dense.prefill, speed.prefill), speed_up(dense.decoding, speed.decoding)]
            for (name, kind), speed in zip(keys, speeds, strict=True)
        }
        rates = {"prefill": dense.prefill_rate, "decoding": dense.decoding_rate}
        kept.write_text(json.dumps({"dense tokens per second": rates, **rows}))
    return json.loads(kept.read_text())


def ratio(low, middle, high):
    """Returns the cell of a ratio with its quartiles."""
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def draw(results, plot):
    """Draws the geometric mean of the perplexity ratios over bytes, a line for each model."""
    dense = results["dense", "F16"]
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(name for name, _ in results):
        points = [(kind, result) for (other, kind), result in results.items() if other == name]
        sizes = [result["bytes"] / 1e6 for _, result in points]
        losses = [math.sqrt(math.prod(result[text] / dense[text] for text in TESTS)) for _, result in points]
        axes.plot(sizes, losses, "o-", label=name, linewidth=2.5 if name == "dense" else 1.2)
        for number, ((kind, _), size, loss) in enumerate(zip(points, sizes, losses, strict=True)):
            axes.annotate(kind, (size, loss), textcoords="offset points", xytext=(4, 4 if number % 2 else -9), fontsize=6)
    axes.set(xlabel="MB on disk", ylabel="perplexity relative to the dense model in F16\n(geometric mean of two texts)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(plot)


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--threads", type=int, default=1, help="of quantization and perplexity; speed is of one thread")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--speed", action="store_true", help="measure speeds again")
    parser.add_argument("--no-speed", action="store_true", help="measure bytes and perplexity alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {(name, kind): result_of(options, name, kind) for name in options.only for kind in KINDS[name]}
    if options.no_speed:
        return
    speeds, dense = speeds_of(options, options.only), results["dense", "F16"]
    table = Lines(options.out, COLUMNS)
    for (name, kind), result in results.items():
        texts = [f"{result[text]:.2f} ({result[text] / dense[text]:.2f}x)" for text in TESTS]
        cache = bh.summary(bh.load(str(folder_of(options, name)), dtype="float16")).kv_cache_bytes
        prefill, decoding = (ratio(*quartiles) for quartiles in speeds[f"{name}, {kind}"])
        table.add([name, kind, f"{result['bytes'] / 1e6:.1f}", *texts, prefill, decoding, f"{cache:,}"])
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
