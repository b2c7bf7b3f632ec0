"""A tokenizer, text and options for the one-shot commands."""

import math
from pathlib import Path

import torch
import transformers

import billhook as bh


def option(files):
    return ["--data", "{" + ", ".join(f"{split}: {path}" for split, path in files.items()) + "}"]


def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(bh.load("tiny").name_or_path)


def blocks(path, length=16):
    ids = tokenizer()(Path(path).read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@torch.no_grad()
def perplexity(model, rows):
    return math.exp(sum(float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in rows) / len(rows))


def drawn(rows, batch, examples=6, seed=0):
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:examples].split(batch)
    return [{"input_ids": rows[own], "labels": rows[own]} for own in order]
