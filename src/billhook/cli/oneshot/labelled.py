"""Reads what a classifier is shown, measured and trained on: a table of texts, or images, with labels."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from billhook.cli.oneshot.text import EXAMPLES, Pictures, Text
from billhook.engine.batches import Batch
from billhook.names import without_folders
from billhook.training.data import ClassificationDataModule
from billhook.training.dataset_module import DatasetModule, draw
from billhook.training.images import ImageDataModule

IMAGE = "image"
"""The column of images, where no other is asked for."""


class Labelled:
    """A table of texts, or images, with labels, which is read once it is needed.

    Args:
        given: It names the table.
        model: The classifier.
        preprocessor: The folder of its tokenizer, or image processor.
        length: The most tokens of an example.
    """

    def __init__(self, given: Text, model: PreTrainedModel, preprocessor: str, length: int) -> None:
        self.given, self.model, self.preprocessor, self.length = given, model, preprocessor, length

    @cached_property
    def data(self) -> DatasetModule:
        """The table, by splits; it needs one to calibrate on."""
        given = self.given
        if not isinstance(given, Pictures) or given.data is None or isinstance(given.data, list):
            what = "images" if self.of_images else "texts"
            raise ValueError(f"data={given.data!r}: a {type(self.model).__name__} needs one table with {what} and labels")
        data: DatasetModule
        if self.of_images:
            column = IMAGE if given.column == Text.column else given.column
            data = ImageDataModule(given.data, self.preprocessor, column, given.label_column, given.batch_size)
        else:
            columns, size = [given.column], given.batch_size
            data = ClassificationDataModule(given.data, self.preprocessor, columns, given.label_column, self.length, size)
        data.read(self.model)
        if "train" not in data.splits:
            raise ValueError(f"data: calibration needs a split 'train'; there is {', '.join(data.splits)}")
        return data

    @property
    def is_classifier(self) -> bool:
        """True for a classifier of any kind."""
        return "Classification" in type(self.model).__name__

    @property
    def of_images(self) -> bool:
        """True for a classifier of images."""
        return self.is_classifier and self.model.main_input_name == "pixel_values"

    @property
    def count(self) -> int:
        """How many examples are shown, if there are as many."""
        return self.given.examples or EXAMPLES

    @property
    def split(self) -> str:
        """The split that is measured on."""
        return "test" if "test" in self.data.splits else "validation"

    def shown(self) -> Iterator[Batch]:
        """Draws the examples to calibrate on."""
        rows: Any = self.data.splits["train"]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.given.seed))
        return self._batched(rows, order[: self.count].tolist())

    def measured(self) -> Iterator[Batch] | None:
        """Draws the examples to measure on; None where there is no split for that."""
        rows: Any = self.data.splits.get(self.split)
        return None if rows is None else self._batched(rows, self.drawn)

    @property
    def drawn(self) -> list[int]:
        """The numbers of the examples that are measured on, as many as are asked for where there are so many."""
        return draw(len(self.data.splits.get(self.split, ())), self.given.evaluate, self.given.seed)

    def loader(self, batch_size: int, chance: torch.Generator) -> DataLoader[Any]:
        """Returns what is trained on, shuffled."""
        rows: Any = self.data.splits["train"]
        return DataLoader(rows, batch_size, shuffle=True, collate_fn=self.data.collate(), generator=chance)

    def to_json(self) -> dict[str, Any]:
        """Says what is calibrated on."""
        rows: Any = self.data.splits["train"]
        read = {"data": without_folders(self.given.data), "examples": min(self.count, len(rows))} | (
            {} if self.of_images else {"length": self.length}
        )
        return read | {"batch_size": self.given.batch_size, "seed": self.given.seed}

    def _batched(self, rows: Any, numbers: Sequence[int]) -> Iterator[Batch]:  # noqa: ANN401 - `datasets` types rows as a list too
        collate, size = self.data.collate(), self.given.batch_size
        for start in range(0, len(numbers), size):
            yield Batch(collate([rows[number] for number in numbers[start : start + size]]))
