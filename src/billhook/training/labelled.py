"""The part that data modules of classifiers share: labels by number and by name."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from billhook.calibration.reading import Rows
from billhook.training.dataset_module import DatasetModule
from billhook.training.labels import name_labels, names_in, number_labels


class LabelledModule(DatasetModule):
    """Base of the data modules of classifiers: labels are numbered as the model in training does, which learns their names.

    Attributes:
        label_column: The column of the label.
        names: The names of labels that the data holds.
        label2id: The number of each.
    """

    label_column: str
    names: Sequence[str] = ()
    label2id: Mapping[str, int] = {}

    def read(self, model: PreTrainedModel | None = None) -> None:
        """Makes the splits, with the numbers that a model gives to labels; it then knows their names."""
        if model is not None and number_labels(self.names, model.config, self.label_column) != self.label2id:
            self.splits = {}  # which were made for a model that gives other numbers
        super().read(model)
        if model is not None:
            name_labels(model.config, self.label2id)

    def prepare(self, given: Sequence[dict[str, Rows]], model: PreTrainedModel | None) -> None:
        """Finds the names of labels."""
        self.names = [name for splits in given for name in names_in(splits, self.label_column)]
        self.label2id = number_labels(self.names, None if model is None else model.config, self.label_column)


def draw(rows: int, count: int, seed: int = 0) -> list[int]:
    """Draws the numbers of so many rows, in their order, as folders and tables are often in the order of their labels."""
    return sorted(torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count].tolist())
