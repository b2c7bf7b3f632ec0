"""Small images of noise in folders by class, and a tiny ViT with its processor."""

from pathlib import Path

import numpy as np
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox"]


def config(**options):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTConfig(**sizes, image_size=16, patch_size=8, **{"num_labels": len(CLASSES)} | options)


def picture(number, mode="RGB"):
    generator = np.random.default_rng(number)
    return Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).convert(mode)


def write_photos(folder: Path) -> str:
    """Writes twelve images to train on, and six to validate on, by class; one is grey."""
    for split, copies in (("train", 2), ("validation", 1)):
        for number, name in enumerate(CLASSES * copies):
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            picture(number, "L" if number == 3 else "RGB").save(place / f"{number}.png")
    return str(folder)


def write_processor(folder: Path) -> str:
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)
