"""Short fits of small models on a little text."""

from functools import cache
from pathlib import Path

import datasets
import lightning.pytorch as pl
import torch

from billhook import TextDataModule, TransformerModule
from kit.families import llama

WORDS = "the heads of a hydra were pruned with a billhook one by one and none grew back again said the old gardener "


def write_text(folder: Path) -> dict[str, str]:
    """A training and a validation file: 24 and 8 blocks of 16 tokens and a little more."""
    files = {}
    for split, length in (("train", 1300), ("validation", 450)):
        path = folder / f"{split}.txt"
        path.write_text("".join(WORDS[i % len(WORDS)] if i % 7 else str(i % 10) for i in range(length)))
        files[split] = str(path)
    return files


def data(files: dict[str, str], **options: object) -> TextDataModule:
    """Its text is made into blocks once for all fits."""
    module = TextDataModule(files, tokenizer="tiny", **{"length": 16, "batch_size": 2, **options})
    if not {"column", "streaming"} & options.keys():
        module.splits = dict(_blocks(module.length, **files))
    return module


@cache
def _blocks(length: int, **files: str) -> dict[str, datasets.Dataset]:
    module = TextDataModule(files, tokenizer="tiny", length=length)
    module.setup("fit")
    return module.splits


def module(seed: int = 0, lr: float = 1e-2, **changes: object) -> TransformerModule:
    torch.manual_seed(seed)
    return TransformerModule(llama(vocab_size=2048, **changes), lr=lr, warmup=2)


def trainer(folder: Path, callbacks: list[pl.Callback], max_steps: int = 8, **options: object) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    given = {
        "accelerator": "cpu",
        "devices": 1,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.ModelCheckpoint) for c in callbacks),
    }
    return pl.Trainer(default_root_dir=folder, callbacks=callbacks, max_steps=max_steps, **quiet | given | options)


def weights(pl_module: pl.LightningModule) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pl_module.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
