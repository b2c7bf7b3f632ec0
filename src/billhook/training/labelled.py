"""The part that data modules of classifiers share: labels by number and by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from transformers import PretrainedConfig, PreTrainedModel

from billhook.calibration.reading import Rows
from billhook.training.dataset_module import DatasetModule


def names_in(splits: Mapping[str, Rows], column: str) -> list[str]:
    """Finds the names of labels: those that `datasets` knows of a column of numbers, or the words in it, sorted; else none."""
    found = set[str]()
    for rows in splits.values():
        kind = (rows.features or {}).get(column)
        if isinstance(kind, datasets.ClassLabel):
            return list(kind.names)
        if isinstance(rows, datasets.Dataset) and getattr(kind, "dtype", "").endswith("string"):
            found |= {word for word in rows.unique(column) if word is not None}
    return sorted(found)


def number_labels(names: Sequence[str], config: PretrainedConfig | None, column: str) -> dict[str, int]:
    """Numbers labels by name, as a model does that knows them all, or else in their order.

    Raises:
        ValueError: If the model has another number of classes.
    """
    known: dict[str, int] = {} if config is None else dict(config.label2id or {})  # type: ignore[arg-type]
    if names and set(names) <= known.keys():
        return {name: int(known[name]) for name in sorted(known, key=known.__getitem__)}
    if names and config is not None and len(names) != config.num_labels:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"label_column='{column}' holds {len(names)} labels ({shown}), and the model has {config.num_labels} classes: give "
            f"TransformerModule num_labels={len(names)}"
        )
    return {name: number for number, name in enumerate(names)}


def numbers_of(rows: Rows, column: str, label2id: Mapping[str, int]) -> dict[Any, int] | None:
    """Returns the number of each label as it stands in a column, a word or a number; None where the numbers stay as they are."""
    kind = (rows.features or {}).get(column)
    if not isinstance(kind, datasets.ClassLabel):
        return dict(label2id) or None
    numbers = {place: label2id[name] for place, name in enumerate(kind.names)}
    return None if all(one == other for one, other in numbers.items()) else numbers


def name_labels(config: PretrainedConfig, label2id: Mapping[str, int]) -> None:
    """Keeps the names of labels in a model's config, from which they are saved along."""
    if label2id:
        config.id2label = {number: name for name, number in label2id.items()}
        config.label2id = dict(label2id)


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
