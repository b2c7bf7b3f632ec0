"""Which tokens go first: counts, a discount of them, and what the model expects, on training text.

`OMP_NUM_THREADS=1 python benchmarks/token_order.py MODEL DATA` prints the table. Tokens are counted in the first 85% of FOLDOC's
training text, of WikiText-2's validation text, and of packaged text without its code. Bits per byte, relative to the dense model,
are those of 10 windows of 512 tokens of the rest of the first two, and of the packaged code, which nothing has seen, with about
half of the tokens removed.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from measured import CALIBRATION, drawn_from, rows_of
from transformers import AutoTokenizer

import billhook as bh
from billhook.calibration.reading import load_splits
from billhook.engine.batches import Batch
from billhook.report.texts import ExampleText, example_loss
from billhook.vocabulary import scores
from billhook.vocabulary.tokenizer import Vocabulary

ORDERS = {
    "counts": (0, 0),
    "counts and expected": (0, 0.5),
    "discounted": (0.75, 0),
    "discounted and expected": (0.75, 0.5),
    "twice expected": (0.75, 1),
}
"""The discount of each count, and the weight of what the model expects."""
LEFT, WINDOWS = 25_800, 10


@torch.no_grad()
def bits(model, tokenizer, texts, kept):
    """Bits per byte of texts, in the tokens that are kept."""
    loss = sum(example_loss(model, text.encoded(tokenizer), kept) for text in texts)
    return loss / math.log(2) / sum(text.bytes for text in texts)


def main():
    """A row for each order."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = bh.load(str(options.model), dtype="float32").eval(), AutoTokenizer.from_pretrained(options.model)
    packaged, size = load_splits("mixed")["train"], model.config.vocab_size
    rows = {name: rows_of(tokenizer, (options.data / file).read_text()) for name, file in CALIBRATION.items()}
    rows["packaged"] = rows_of(tokenizer, "\n".join(row["text"] for row in packaged if row["kind"] != "code"))
    code = rows_of(tokenizer, "\n".join(row["text"] for row in packaged if row["kind"] == "code"))
    parts = {name: len(own) * 85 // 100 for name, own in rows.items()}
    counted = [Batch({"input_ids": row[None]}, name) for name, own in rows.items() for row in own[: parts[name]]]
    measured = {name: drawn_from(rows[name][parts[name] :], WINDOWS) for name in CALIBRATION} | {"code": code[:WINDOWS]}
    texts = {name: [ExampleText.of(row, tokenizer) for row in own] for name, own in measured.items()}
    dense = {name: bits(model, tokenizer, own, torch.arange(size)) for name, own in texts.items()}
    print(f"| order | {' | '.join(texts)} |\n|{'---|' * (len(texts) + 1)}")
    vocabulary, expected = Vocabulary(tokenizer), scores.predicted_shares(model, size, counted)
    scores.predicted_shares = lambda *_: expected  # the same for all orders
    for name, (scores.DISCOUNT, scores.EXPECTED) in ORDERS.items():
        required, others = scores.order_tokens(model, size, vocabulary, counted)
        kept = np.sort(np.array(required + others[: LEFT - len(required)]))
        fewer = vocabulary.without(kept)
        ratios = [bits(model, fewer, own, torch.from_numpy(kept)) / dense[text] for text, own in texts.items()]
        print(f"| {name} | {' | '.join(f'{ratio:.4f}' for ratio in ratios)} |", flush=True)


if __name__ == "__main__":
    main()
