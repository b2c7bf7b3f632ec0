"""A ConvNeXt learns to tell shapes, loses half of its operations in the middle of the fit, and goes on learning.

`python examples/convnext.py` draws its images itself, and takes a minute on a CPU. Your own folder of images goes as `photos`.
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from PIL import Image, ImageDraw
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTImageProcessor

import billhook as bh

SHAPES = ("circle", "square", "triangle")


def draw(photos: Path, split: str, count: int) -> None:
    """Draws shapes of any colour, size and place on noise, in a folder for each."""
    draw_from = np.random.default_rng(len(split))
    for number in range(count):
        shape = SHAPES[number % 3]
        picture = Image.fromarray(draw_from.integers(0, 90, (32, 32, 3), dtype=np.uint8))
        radius, colour = int(draw_from.integers(8, 14)), tuple(map(int, draw_from.integers(110, 256, 3)))
        place = tuple(map(int, draw_from.integers(radius, 32 - radius, 2)))
        if shape == "circle":
            ImageDraw.Draw(picture).ellipse([at + way * radius for way in (-1, 1) for at in place], fill=colour)
        else:
            ImageDraw.Draw(picture).regular_polygon((*place, radius), 4 if shape == "square" else 3, fill=colour)
        (photos / split / shape).mkdir(parents=True, exist_ok=True)
        picture.save(photos / split / shape / f"{number}.png")


def main(steps: int, folder: str) -> None:
    """Trains, removes channels on the way, saves, and asks what was saved."""
    pl.seed_everything(0)
    photos = Path(folder, "photos")
    draw(photos, "train", 1200)
    draw(photos, "validation", 300)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(f"{folder}/processor")
    sizes = {"num_stages": 2, "hidden_sizes": [32, 64], "depths": [2, 2], "image_size": 32, "layer_scale_init_value": 0.1}
    model = ConvNextForImageClassification(ConvNextConfig(**sizes, num_labels=len(SHAPES)))
    cut = bh.StructuredPruning(bh.Amount(flops=0.5, round_to=1), at=0.5, calibration=256)  # and refits what reads the channels
    trainer = pl.Trainer(
        max_steps=steps,
        val_check_interval=max(1, steps // 10),
        check_val_every_n_epoch=None,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[cut, bh.Export(f"{folder}/model"), bh.Report(f"{folder}/report.png")],
    )
    data = bh.training.ImageDataModule(str(photos), processor=f"{folder}/processor")
    trainer.fit(bh.TransformerModule(model, task="image-classification", lr=4e-3, warmup=0.1), data)

    small = bh.load(f"{folder}/model")
    picture = Image.open(next((photos / "validation" / "triangle").glob("*.png")))
    pixels = ViTImageProcessor.from_pretrained(f"{folder}/model")(picture, return_tensors="pt")["pixel_values"]
    print(small.config.id2label[int(small(pixel_values=pixels).logits.argmax())])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", default="outputs/convnext")
    main(**vars(parser.parse_args()))
