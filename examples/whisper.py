"""A Whisper in a LightningModule of your own learns to name tones, loses half of its heads and weights on the way, and is saved.

`python examples/whisper.py` makes its sound itself, and takes a minute on a CPU. Of recordings, `tones` is a `Dataset` whose
column `audio` is cast to `datasets.Audio(sampling_rate=16000)`; `tiny` is a Whisper, and its processor, by `from_pretrained`.
"""

import argparse

import datasets
import lightning.pytorch as pl
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch.utils.data import DataLoader
from torchmetrics.text import WordErrorRate
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

import billhook as bh

WORDS, RATE = ("ant", "bee", "cat", "dog"), 16000


def tones(count: int, seed: int) -> datasets.Dataset:
    """Half a second of sound for each row: the higher the tone, the further down its word stands in `WORDS`."""
    noise, time = np.random.default_rng(seed), np.arange(RATE // 2) / RATE
    sound = [np.sin(2 * np.pi * 200 * (n % 4 + 1) * time) + noise.normal(0, 0.1, len(time)) for n in range(count)]
    audio = [{"array": array.astype(np.float32), "sampling_rate": RATE} for array in sound]
    return datasets.Dataset.from_dict({"audio": audio, "text": [WORDS[n % 4] for n in range(count)]})


def tiny() -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """A small Whisper with random weights, which hears one second and spells in bytes."""
    tokenizer = WhisperTokenizer(
        vocab={sign: n for n, sign in enumerate(sorted(ByteLevel.alphabet()))}, merges=[], pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"]})
    tokenizer.set_prefix_tokens()  # it begins a text with both
    start, end = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|endoftext|>"])
    sides = {"layers": 2, "attention_heads": 4, "ffn_dim": 32}
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sides.items()}
    sizes |= {"d_model": 16, "num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 32, "vocab_size": 300}
    tokens = {"decoder_start_token_id": start, "pad_token_id": end, "bos_token_id": end, "eos_token_id": end}
    config = WhisperConfig(**sizes, **tokens, suppress_tokens=None, begin_suppress_tokens=None)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    model = WhisperForConditionalGeneration(config)
    model.generation_config.max_length = 8
    return model, WhisperProcessor(extractor, tokenizer)


class Transcription(pl.LightningModule):
    """Whisper's own loss, and the word error rate of what it writes."""

    def __init__(self, model: WhisperForConditionalGeneration, processor: WhisperProcessor):
        super().__init__()
        self.model, self.processor, self.error_rate = model, processor, WordErrorRate()

    def batch_of(self, rows):
        """Features of the sounds, and tokens of the words, of which padding is not learnt."""
        sound = self.processor([row["audio"]["array"] for row in rows], sampling_rate=RATE, return_tensors="pt")
        words = self.processor.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        labels = words["input_ids"].masked_fill(words["attention_mask"] == 0, -100)
        return {"input_features": sound["input_features"], "labels": labels[:, 1:]}  # the model itself puts the start before them

    def loader(self, rows, shuffle=False):
        """Batches of 8 rows."""
        return DataLoader(rows, batch_size=8, shuffle=shuffle, collate_fn=self.batch_of)

    def training_step(self, batch):
        """The loss."""
        return self.model(**batch).loss

    def validation_step(self, batch):
        """Logs the loss, and the share of words that are wrong."""
        self.log("val_loss", self.training_step(batch))
        written = self.model.generate(batch["input_features"])
        meant = batch["labels"].where(batch["labels"] >= 0, self.processor.tokenizer.pad_token_id)
        self.error_rate.update(*(self.processor.batch_decode(ids, skip_special_tokens=True) for ids in (written, meant)))
        self.log("val_wer", self.error_rate, prog_bar=True)

    def configure_optimizers(self):
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(steps: int, folder: str) -> None:
    """Trains, cuts on the way, saves, and asks what was saved."""
    pl.seed_everything(0)
    model, processor = tiny()
    lit = Transcription(model, processor)
    heads = bh.HeadPruning(0.5, at=0.5, calibration=16)  # of the encoder, of the decoder, and of what it reads of the encoder
    zeros = bh.WeightPruning(bh.Wanda(), sparsity=0.5, at=0.75, calibration=16)
    trainer = pl.Trainer(
        max_steps=steps,
        val_check_interval=max(1, steps // 10),
        check_val_every_n_epoch=None,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[heads, zeros, bh.Export(f"{folder}/model")],
    )
    trainer.fit(lit, lit.loader(tones(160, seed=0), shuffle=True), lit.loader(tones(16, seed=1)))
    print(f"word error rate: {trainer.callback_metrics['val_wer']:.2f}")

    small, processor = bh.load(f"{folder}/model"), WhisperProcessor.from_pretrained(f"{folder}/model")
    sound = processor(tones(4, seed=2)[2]["audio"]["array"], sampling_rate=RATE, return_tensors="pt")
    print(processor.decode(small.generate(sound["input_features"])[0], skip_special_tokens=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", default="outputs/whisper")
    main(**vars(parser.parse_args()))
