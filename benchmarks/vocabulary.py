"""A smaller vocabulary of a real model, alone and together with channels, in bits per byte of three texts.

`OMP_NUM_THREADS=1 python benchmarks/vocabulary.py MODEL DATA WORK --out vocabulary.md` writes the table; `measured.py` says what
is in DATA. Tokens are counted in FOLDOC's training text, WikiText-2's validation text, and, unless a row says otherwise, packaged
text. "tokens first" is what `billhook prune-structure` does. "channels" is `shrink` on the windows of `--texts`. Bits per byte
are those of the first 12 windows of 512 tokens of each test text, and of Python's own library (the modules of its `asyncio`),
which nothing has seen, in float32, each as a text, so that every tokenizer has the same. What WORK holds is not measured again.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from kv_texts import tests
from measured import CALIBRATION, TESTS, Lines, shown
from transformers import AutoTokenizer

import billhook as bh
from billhook.engine.batches import Batch
from billhook.report.degradation import DenseReference
from billhook.report.predictions import ExampleText

COUNTED = 6_000_000
ROWS = {
    "nothing": None,
    **{f"tokens, {share:.0%}": share for share in (0.95, 0.9, 0.85, 0.8)},
    **{f"tokens, {share:.0%}, without packaged text": share for share in (0.95, 0.9, 0.85)},
    **{f"channels, {share:.0%}": share for share in (0.9, 0.85, 0.8, 0.75)},
}
"""Share of the parameters that is left."""
FIRST = {"tokens first, 85%": (0.33, 0.85), "tokens first, 75%": (0.5, 0.75)}
"""Share of the tokens that goes, and share of the parameters that is left."""
ROWS |= {name: share for name, (_, share) in FIRST.items()}


def counted(options, model, packaged):
    """Text to count tokens in: all of it."""
    sources = [str(options.data / file) for file in CALIBRATION.values()] + ["mixed"] * packaged
    return bh.Calibration(sources, tokens=COUNTED, length=options.window).read(model)


def tokens_first(options, tokens, share, model, tokenizer):
    """Tokens removed, then channels, which see text in the tokens that are left, as by `billhook prune-structure`."""
    left, seen = int(share * model.num_parameters()), shown(options)
    plan = bh.plan(model, batches=counted(options, model, True), tokens=tokens, tokenizer=tokenizer)
    fewer = plan.trim_tokenizer(tokenizer)
    bh.apply(model, plan)
    examples = [(batch.source, ids) for batch in seen for ids in batch["input_ids"]]
    seen = [Batch({"input_ids": ExampleText.of(ids, tokenizer).encoded(fewer).ids[None]}, name) for name, ids in examples]
    plan = bh.plan(model, bh.OutputNorm(), seen, amount=bh.Amount(params=left, round_to=1))
    print(plan, flush=True)
    bh.apply(model, plan, weights=bh.repair(model, plan, seen))
    return fewer


def smaller(options, name, model, tokenizer):
    """The model and its tokenizer."""
    share, (how, *_) = ROWS[name], name.split(", ")
    if name in FIRST:
        return tokens_first(options, *FIRST[name], model, tokenizer)
    if how == "tokens":
        size, text = model.config.vocab_size, counted(options, model, "without" not in name)
        fewer = (1 - share) * model.num_parameters() / (model.config.hidden_size * size)
        plan = bh.plan(model, batches=text, amount=bh.Amount(tokens=fewer), tokenizer=tokenizer)
        bh.apply(model, plan)
        return plan.trim_tokenizer(tokenizer)
    search, cache = bh.Search(generations=0, repair=bh.RepairConfig()), options.work / "variant_cache"
    shrunk = bh.shrink(model, bh.Budget(params=share), shown(options), search=search, variant_cache=cache)
    (options.work / f"{name} found.json").write_text(json.dumps(shrunk.to_json()))
    print(shrunk, flush=True)
    return tokenizer


def measured(options, name):
    """Bits per byte of each text, and tokens over those of the dense model, measured once."""
    file = options.work / f"{name}.json"
    if not file.exists():
        model, tokenizer = bh.load(str(options.model), dtype="float32"), AutoTokenizer.from_pretrained(options.model)
        rows = [Batch({"input_ids": row[None]}, text) for text, rows in tests(options, left_out=False).items() for row in rows]
        reference = DenseReference(model, rows, tokenizer=tokenizer)
        start = time.process_time()
        fewer = tokenizer if ROWS[name] is None else smaller(options, name, model, tokenizer)
        row = {"seconds": time.process_time() - start, "parameters": model.num_parameters(), "tokens": model.config.vocab_size}
        row |= {text.source: (text.bits_per_byte[1], text.token_ratio) for text in reference.degradation(model, tokenizer=fewer)}
        bh.save(model, options.work / name, fewer)
        file.write_text(json.dumps(row))
    return json.loads(file.read_text())


def main():
    """Every row that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", nargs="*", default=list(ROWS)[1:], choices=list(ROWS)[1:])
    parser.add_argument("--texts", nargs="*", default=["foldoc:32", "wikitext:32", "mixed:32", "generated:32"])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    texts = (*TESTS, "Python")
    lines = Lines(options.out, ("what goes", "parameters", "tokens", *texts, *(f"tokens of {text}" for text in texts), "CPU s"))
    dense = measured(options, "nothing")
    for name in ("nothing", *options.only):
        row = measured(options, name)
        pairs = [(row[text], dense[text]) for text in (*TESTS, "python")]
        cells = [f"{bits:.4f} ({bits / before:.3f})" for (bits, _), (before, _) in pairs]
        cells += [f"{tokens / before:.3f}" for (_, tokens), (_, before) in pairs]
        share = row["parameters"] / dense["parameters"]
        lines.add([name, f"{share:.1%}", f"{row['tokens']:,}", *cells, f"{row['seconds']:,.0f}"])


if __name__ == "__main__":
    main()
