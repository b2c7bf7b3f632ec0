"""Reads what a classifier is shown, measured and trained on: a table of texts with labels."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from billhook.cli.oneshot.text import EXAMPLES, Examples, Text
from billhook.running.batches import Batch
from billhook.training.data import ClassificationDataModule
from billhook.training.dataset_module import DatasetModule


class Labelled:
    """A table of texts with labels, which is read once it is needed.

    Args:
        given: It names the table.
        model: The classifier.
        tokenizer: The folder of its tokenizer.
        length: The most tokens of an example.
    """

    def __init__(self, given: Text, model: PreTrainedModel, tokenizer: str, length: int) -> None:
        self.given, self.model, self.tokenizer, self.length = given, model, tokenizer, length

    @cached_property
    def data(self) -> DatasetModule:
        """The table, by splits; it needs one to calibrate on."""
        given = self.given
        if not isinstance(given, Examples) or given.data is None or isinstance(given.data, list):
            raise ValueError(f"data={given.data!r}: a {type(self.model).__name__} needs one table with texts and labels")
        columns, size = [given.column], given.batch_size
        data = ClassificationDataModule(given.data, self.tokenizer, columns, given.label_column, self.length, size)
        data.read(self.model)
        if "train" not in data.splits:
            raise ValueError(f"data: calibration needs a split 'train'; there is {', '.join(data.splits)}")
        return data

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
        """Returns the first examples to measure on; None where there is no split for that."""
        rows: Any = self.data.splits.get(self.split)
        return None if rows is None else self._batched(rows, range(min(self.given.evaluate, len(rows))))

    def loader(self, batch_size: int, chance: torch.Generator) -> DataLoader[Any]:
        """Returns what is trained on, shuffled."""
        rows: Any = self.data.splits["train"]
        return DataLoader(rows, batch_size, shuffle=True, collate_fn=self.data.collate(), generator=chance)

    def to_json(self) -> dict[str, Any]:
        """Says what is calibrated on."""
        rows: Any = self.data.splits["train"]
        read = {"data": self.given.data, "examples": min(self.count, len(rows)), "length": self.length}
        return read | {"batch_size": self.given.batch_size, "seed": self.given.seed}

    def _batched(self, rows: Any, numbers: Sequence[int]) -> Iterator[Batch]:  # noqa: ANN401 - `datasets` types rows as a list too
        collate, size = self.data.collate(), self.given.batch_size
        for start in range(0, len(numbers), size):
            yield Batch(collate([rows[number] for number in numbers[start : start + size]]))
