"""What commands are run with: the quickstart config, a tokenizer, text and options."""

import math
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import billhook as bh
from kit import fits

ROOT = Path(__file__).parents[2]


QUICK = """
  --trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.limit_val_batches 1 --trainer.num_sanity_val_steps 0
  --trainer.default_root_dir . --data.length 16 --data.batch_size 2
"""


# Lightning says so in each of these short runs
pytestmark = [
    pytest.mark.filterwarnings("ignore:No seed found"),
    pytest.mark.filterwarnings("ignore:`max_epochs` was not set"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    # Lightning 2.6 calls what jsonargparse 4.53 calls deprecated
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended to run from within Python"),
]


def callbacks_in(path: str) -> list[str]:
    config = yaml.safe_load(Path(path).read_text())
    return [c["class_path"].rpartition(".")[2] for c in config["trainer"]["callbacks"]]


def option(files):
    return ["--data", "{" + ", ".join(f"{split}: {path}" for split, path in files.items()) + "}"]


def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(bh.load("tiny").name_or_path)


def small_llama(folder, **changes):
    """Saves a Llama with four KV heads and 48 channels in each of two layers, or with changes, beside the tokenizer."""
    torch.manual_seed(0)
    fits.llama(vocab_size=2048, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def blocks(path, length=16):
    ids = tokenizer()(Path(path).read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


@torch.no_grad()
def perplexity(model, rows):
    return math.exp(sum(float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in rows) / len(rows))


def drawn(rows, batch, examples=6, seed=0):
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:examples].split(batch)
    return [{"input_ids": rows[own], "labels": rows[own]} for own in order]
