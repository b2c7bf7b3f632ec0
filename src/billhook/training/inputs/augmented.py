"""Training images that are changed at random when they are loaded, in each pass over the data otherwise."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from PIL.Image import Image
from torch.utils.data import Dataset

from billhook.engine.noise import seeded


class Augmented(Dataset[dict[str, Any]]):
    """Examples of images that transforms have changed.

    What they draw with torch is decided by the seed, the pass over the data and the number of the image alone, and so is the same
    with any number of workers and devices, and in a resumed run.

    Args:
        rows: The images, with their labels.
        image_column: The column of the image.
        augment: Transforms, each called with what the one before returns; the first one with the image.
        prepare: Makes examples of rows.
        seed: What is drawn by.

    Attributes:
        epoch: The pass over the data.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        augment: Sequence[Callable[[Any], Any]],
        prepare: Callable[[Mapping[str, Sequence[Any]]], dict[str, Any]],
        seed: int,
    ) -> None:
        self.rows, self.image_column, self.augment, self.prepare, self.seed = rows, image_column, augment, prepare, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Begins a pass over the data."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        image: object = row[self.image_column]
        key = int.from_bytes(hashlib.blake2b(f"{self.seed} {self.epoch} {number}".encode(), digest_size=7).digest(), "big")
        with seeded(key, torch.device("cpu")):
            for transform in self.augment:
                image = transform(image)
        if not isinstance(image, Image):
            raise ValueError(
                f"augment makes a {type(image).__name__} of an image; its last transform must return an image of PIL, which the "
                "image processor reads"
            )
        made = self.prepare({name: [value] for name, value in (row | {self.image_column: image}).items()})
        return {name: values[0] for name, values in made.items()}
