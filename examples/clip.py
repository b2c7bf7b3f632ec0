"""A CLIP learns which caption belongs to an image, from a DataModule of your own, loses half of its channels, and is saved.

`python examples/clip.py` draws its images itself, and takes a minute on a CPU. Your own images come from a folder with a
`metadata.jsonl` (`{"file_name": "1.png", "text": "a dog"}`), as `datasets.load_dataset("imagefolder", data_dir=FOLDER)`, and the
model and its processor by the name of a CLIP.
"""

import argparse
import string

import datasets
import lightning.pytorch as pl
import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

import billhook as bh

COLOURS, SHAPES = ("red", "green", "blue", "white"), ("circle", "square", "triangle")
CAPTIONS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]


def drawn(rounds: int, seed: int) -> datasets.Dataset:
    """Each caption once a round, with a shape of any size and place on noise."""
    draw_from, images = np.random.default_rng(seed), []
    for caption in CAPTIONS * rounds:
        _, colour, shape = caption.split()
        picture = Image.fromarray(draw_from.integers(0, 90, (32, 32, 3), dtype=np.uint8))
        radius = int(draw_from.integers(8, 14))
        circle = (*map(int, draw_from.integers(radius, 32 - radius, 2)), radius)
        if shape == "circle":
            ImageDraw.Draw(picture).circle(circle[:2], radius, fill=colour)
        else:
            ImageDraw.Draw(picture).regular_polygon(circle, 4 if shape == "square" else 3, fill=colour)
        images.append(picture)
    rows = datasets.Dataset.from_dict({"image": images, "text": CAPTIONS * rounds})
    return rows.cast_column("image", datasets.Image())


def tiny() -> tuple[CLIPModel, CLIPProcessor]:
    """A small CLIP with random weights, which reads letters."""
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *string.ascii_lowercase,
        *(f"{letter}</w>" for letter in string.ascii_lowercase),
    ]
    tokenizer = CLIPTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[], model_max_length=24)
    images = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    tower = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    text = tower | {"vocab_size": len(tokens), "max_position_embeddings": 24}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    sizes = {"text_config": text, "vision_config": tower | {"image_size": 32, "patch_size": 8}}
    return CLIPModel(CLIPConfig(**sizes, projection_dim=32)), CLIPProcessor(images, tokenizer)


class Captions(pl.LightningDataModule):
    """Images and captions of `datasets`, prepared by a processor that `Export` saves beside the model."""

    def __init__(self, train: datasets.Dataset, validation: datasets.Dataset, processor: CLIPProcessor, batch_size: int):
        super().__init__()
        self.train, self.validation, self.processor, self.batch_size = train, validation, processor, batch_size

    def batch_of(self, rows):
        """What CLIP takes, with its contrastive loss asked for."""
        images, texts = [row["image"].convert("RGB") for row in rows], [row["text"] for row in rows]
        batch = self.processor(images=images, text=texts, padding=True, truncation=True, return_tensors="pt")
        return {**batch, "return_loss": True}

    def train_dataloader(self):
        """Batches in which each caption stands once: of two that are alike neither would be the right one."""
        return DataLoader(self.train, self.batch_size, collate_fn=self.batch_of)

    def val_dataloader(self):
        """Likewise."""
        return DataLoader(self.validation, self.batch_size, collate_fn=self.batch_of)


def main(steps: int, folder: str) -> None:
    """Trains, cuts on the way, saves, and asks what was saved."""
    pl.seed_everything(0)
    model, processor = tiny()
    cut = bh.StructuredPruning(bh.Amount(channels=0.5), at=0.5, calibration=96)  # in both towers, and refits what reads them
    trainer = pl.Trainer(
        max_steps=steps,
        val_check_interval=max(1, steps // 10),
        check_val_every_n_epoch=None,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[cut, bh.Export(f"{folder}/model")],
    )
    data = Captions(drawn(50, seed=0), drawn(10, seed=1), processor, batch_size=len(CAPTIONS))
    trainer.fit(bh.TransformerModule(model, task="feature-extraction", lr=2e-3, warmup=0.1), data)
    print(f"images whose own caption suits them best: {trainer.callback_metrics['val_accuracy']:.0%}")

    small, processor = bh.load(f"{folder}/model"), CLIPProcessor.from_pretrained(f"{folder}/model")
    picture = drawn(1, seed=2)[6]["image"]
    inputs = processor(images=picture, text=CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    print(CAPTIONS[int(small(**inputs).logits_per_image.argmax())])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", default="outputs/clip")
    main(**vars(parser.parse_args()))
