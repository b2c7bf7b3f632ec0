"""Michel et al., section 5: a small encoder-decoder learns to reverse words, and then loses heads of one kind of attention.

`python examples/cross_attention.py` takes a minute or two on a CPU.
"""

import argparse
import random

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import BartConfig, BartForConditionalGeneration

import billhook as bh

PAD, START, END, FIRST, LETTERS = 0, 1, 2, 3, 26
KINDS = {"encoder, self": ".encoder.", "decoder, self": "decoder.layers", "decoder, cross": "encoder_attn"}


def words(seed, count):
    """Random words of 4 to 10 letters."""
    draw = random.Random(seed)
    return [[draw.randrange(FIRST, FIRST + LETTERS) for _ in range(draw.randint(4, 10))] for _ in range(count)]


def batch_of(words):
    """Words as letters to read, and the same backwards to write."""
    rest = [10 - len(word) for word in words]
    read = torch.tensor([[*word, END] + [PAD] * n for word, n in zip(words, rest, strict=True)])
    write = torch.tensor([[*reversed(word), END] + [-100] * n for word, n in zip(words, rest, strict=True)])
    return {"input_ids": read, "attention_mask": (read != PAD).long(), "labels": write}


@torch.no_grad()
def accuracy(model, batch):
    """The share of letters, and of ends of words, that are right."""
    right = model(**batch).logits.argmax(-1) == batch["labels"]
    return right[batch["labels"] != -100].float().mean()


def main(steps):
    """Trains, and prints the share of right letters by kind of attention and share of its heads masked."""
    pl.seed_everything(0, verbose=False)
    sizes = {"layers": 2, "ffn_dim": 128, "attention_heads": 8}
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}
    tokens = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": START}
    config = BartConfig(vocab_size=FIRST + LETTERS, d_model=64, max_position_embeddings=32, **sides, **tokens)
    model = BartForConditionalGeneration(config)
    module = bh.TransformerModule(model, task="seq2seq-lm", lr=2e-3, warmup=50)
    trainer = pl.Trainer(max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.fit(module, DataLoader(words(1, 48_000), batch_size=32, collate_fn=batch_of, shuffle=True))
    model.eval()
    held_out, heads = batch_of(words(2, 500)), bh.find_units(model, "head")
    scores = bh.score(model, heads, bh.importance.GateGradient(), [batch_of(words(3, 256))], normalize=True)
    print(f"with all heads {accuracy(model, held_out):.1%} of the letters are right; without the least important of one kind:")
    for kind, part in KINDS.items():
        names = [name for name in scores if part in name and ("encoder_attn" in name) == ("cross" in kind)]
        ranked = sorted((float(score), name, head) for name in names for head, score in enumerate(scores[name]))
        shown = []
        for share in (0.25, 0.5, 0.75, 1.0):
            gone = [(name, head) for _, name, head in ranked[: int(share * len(ranked))]]
            with bh.mask(model, {name: [head for own, head in gone if own == name] for name in names}):
                shown.append(f"{share:.0%}: {accuracy(model, held_out):.1%}")
        print(f"{kind:<15} {',  '.join(shown)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    main(parser.parse_args().steps)
