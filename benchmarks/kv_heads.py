"""Fewer KV heads by every method: perplexity right after, and after the same few steps of training.

`OMP_NUM_THREADS=1 python benchmarks/kv_heads.py --model MODEL --train TRAIN.txt --test TEST.txt --heads 1 --out kv_heads.md`
writes the table; without a model it is the embedded one, on the embedded text. `--only` takes rows by name.

The methods see the first `--examples` windows of `--window` tokens of TRAIN, one at a time. Perplexity is that of the first 16
windows of TEST under bf16 autocast. Training: AdamW, all weights, warm-up of a sixth of the steps, then cosine to zero, clipped
at 1.0, on places of TRAIN drawn beyond what the methods have seen, the same for every row; the dense model's row says what the
text alone teaches. Every row is a fresh process; CPU seconds are those of the conversion on one thread.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook as bh
from billhook.assets import model_path, text_files

ROWS = {
    "dense": None,
    "mean": {"method": "mean"},
    "first": {"method": "first"},
    "random": {"method": "random"},
    "aligned": {"method": "aligned"},
    "mean, renorm": {"method": bh.kv_methods.Mean(renorm=True)},
    "aligned, renorm": {"method": bh.kv_methods.Aligned(renorm=True)},
    "svd": {"method": "svd"},
    "aligned, similar": {"method": bh.kv_methods.Aligned("similar")},
    "svd, similar": {"method": bh.kv_methods.SVD("similar")},
    "mean, repaired": {"method": "mean", "repair": bh.RepairConfig(ridges=(3.0, 10.0, 30.0, 100.0))},
    "svd, repaired": {"method": "svd", "repair": bh.RepairConfig(ridges=(3.0, 10.0, 30.0, 100.0))},
    "auto": {"method": "auto"},
}


def tokens(tokenizer, path, count):
    """The first tokens of a text, or of a table of texts one after the other."""
    table = path.endswith(".parquet")
    text = "\n".join(pyarrow.parquet.read_table(path)["text"].to_pylist()) if table else Path(path).read_text()
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:count])


@torch.no_grad()
def perplexity(model, rows):
    """Exp of the mean over all predictions."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in rows]
    return math.exp(sum(losses) / len(losses))


def train(model, ids, options):
    """The same steps for every row."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    warm = max(options.steps // 6, 1)
    starts = torch.randint(len(ids) - options.length, (options.steps, options.batch), generator=torch.Generator().manual_seed(0))
    for step, places in enumerate(starts.tolist()):
        batch = torch.stack([ids[start : start + options.length] for start in places])
        rise, fall = (step + 1) / warm, math.cos(math.pi * max(step - warm, 0) / (options.steps - warm))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(rise, 0.5 + 0.5 * fall)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def measure(options):
    """One row, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    test = tokens(tokenizer, options.test, 16 * options.window).view(16, options.window)
    ids, seen = tokens(tokenizer, options.train, None), options.examples * options.window
    start, how = time.process_time(), ROWS[options.row]
    if how is not None:
        batches = [{"input_ids": row[None]} for row in ids[:seen].view(-1, options.window)]
        bh.convert_kv_heads(model, options.heads, batches=batches, **how)
    row = {"seconds": time.process_time() - start, "before": perplexity(model, test)}
    row["after"] = perplexity(train(model, ids[seen:], options), test) if options.steps else None
    Path(options.measured).write_text(json.dumps(row))


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=model_path("tiny"))
    parser.add_argument("--train", default=text_files()["train"])
    parser.add_argument("--test", default=text_files()["validation"])
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--examples", type=int, default=24, help="windows that the methods see")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--measured", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Every row in a process of its own."""
    options = arguments()
    if options.row:
        measure(options)
        return
    lines = [f"| {options.heads} KV heads | perplexity | after {options.steps} steps | CPU s |", "|---|---:|---:|---:|"]
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            measured = Path(folder) / "row.json"
            subprocess.run([sys.executable, *sys.argv, "--row", name, "--measured", str(measured)], check=True)
            row = json.loads(measured.read_text())
        after = "" if row["after"] is None else f"{row['after']:,.2f}"
        lines.append(f"| {name} | {row['before']:,.2f} | {after} | {row['seconds']:,.0f} |")
        print("\n".join(lines if len(lines) == 3 else lines[-1:]), flush=True)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
