"""The part that data modules share: splits from `datasets`, loaders in a resumable order, and labels of classifiers."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import datasets
import lightning.pytorch as pl
import torch
from datasets.distributed import split_dataset_by_node
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from billhook.arguments import check_fraction, check_int, check_number
from billhook.calibration.examples import Batch
from billhook.calibration.reading import SPLITS, Data, Rows, Table, check_data, is_line_text, load_splits
from billhook.fit.lightning_internals import drop_training_loaders
from billhook.model.find import find_transformer
from billhook.training.loader import EpochSampler, ResumableLoader, batches_seen, fit_place, place_of


def check_weights(weights: Sequence[float] | None, sources: int) -> None:
    """Refuses weights that are not a number above 0 for each of several sources."""
    if weights is None:
        return
    for weight in weights:
        check_number("weights", weight, above=0)
    if len(weights) != sources:
        raise ValueError(f"weights={weights!r} must be a number for each of {sources} sources in data")


def held_out(splits: dict[str, Rows], share: float, seed: int) -> dict[str, Rows] | None:
    """Moves a share of the training rows to a split `validation`; None where that cannot be done.

    They are drawn by `seed`; of text whose lines run on they are the last ones.
    """
    rows = splits.get("train")
    if not isinstance(rows, datasets.Dataset) or len(rows) < 2:
        return None
    parts = rows.train_test_split(test_size=share, seed=seed, shuffle=not is_line_text(rows))
    return {**splits, "train": parts["train"], "validation": parts["test"]}


def tell_held_out(share: float, seed: int, examples: int) -> None:
    """Logs how many examples are held out to validate on, or why there are none."""
    if examples:
        rank_zero_info(
            f"billhook: the data has no split 'validation', so {examples} examples are held out of 'train': "
            f"{share:.3g} of its rows, drawn by seed {seed} (validation=0 trains on them too)"
        )
    else:
        rank_zero_info(
            "billhook: there is no validation, as the data has no such split and 'train' is a stream, or too short to hold "
            "something out of it: name a split 'validation' in data to have one"
        )


def join(parts: Sequence[Rows], weights: Sequence[float] | None, seed: int) -> Rows:
    """Joins the rows of several sources: one after the other, or drawn by weights till each has been seen whole once.

    What is drawn of the others may then repeat.
    """
    if len(parts) == 1:
        return parts[0]
    if weights is None:
        return datasets.concatenate_datasets(list(parts))
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(list(parts), shares, seed, stopping_strategy="all_exhausted")


def draw(rows: int, count: int, seed: int = 0) -> list[int]:
    """Draws the numbers of so many rows, in their order, as folders and tables are often in the order of their labels."""
    return sorted(torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count].tolist())


class NoExamples(ValueError):
    """There is a split whose rows make no example."""


class DatasetModule(pl.LightningDataModule):
    """Base of the data modules: splits from `datasets`, and loaders in a deterministic, resumable order."""

    def __init__(
        self,
        data: Data | Table | list[Data | Table] = "tiny",
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        streaming: bool = False,
        validation: float = 0.05,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_int("batch_size", batch_size)
        check_fraction("validation", validation)
        sources = data if isinstance(data, list) else [data]
        if not sources:
            raise ValueError("data=[] must name at least one source")
        for source in sources:
            check_data(source)
        check_weights(weights, len(sources))
        self.data, self.validation, self.weights = data, validation, weights
        self.batch_size, self.seed, self.num_workers, self.streaming = batch_size, seed, num_workers, streaming
        self.splits: dict[str, Rows] = {}
        self._resume: dict[str, int] = {}

    def name_of_model(self, needed: str) -> str:
        """Returns where the model in training came from, beside which what is needed is saved."""
        module = getattr(self.trainer, "lightning_module", None)
        name = None if module is None else find_transformer(module).config.name_or_path
        if not name:
            raise ValueError(f"{needed}: the model in training does not say where it came from; name a {needed}")
        return str(name)

    def prepare_data(self) -> None:
        """Reads, prepares and caches the data in one process, for the others to find in the cache."""
        if not self.streaming:
            self.setup("fit")

    def check(self, model: PreTrainedModel) -> None:
        """Raises `ValueError` if the batches are not what a model takes; called before anything is read."""

    def setup(self, stage: str) -> None:
        """Makes the splits, unless the model in training could not read them."""
        model = None
        with suppress(ValueError):  # there is none yet, or more than one
            model = find_transformer(getattr(self.trainer, "lightning_module", None) or nn.Identity())
        self.read(model)

    def read(self, model: PreTrainedModel | None = None) -> None:
        """Makes the splits, for a model that is to read them."""
        if model is not None:
            self.check(model)
        if self.splits:
            return
        sources = self.data if isinstance(self.data, list) else [self.data]
        loaded = [
            {split: rows for split, rows in load_splits(source, self.streaming).items() if split in SPLITS} for source in sources
        ]
        trains = ["train" in splits for splits in loaded]
        if self.weights is not None and not all(trains):
            raise ValueError("weights: each source in data needs a split 'train'")
        self.prepare(loaded, model)
        holds_out = self.validation > 0 and any(trains) and not any("validation" in splits for splits in loaded)
        encoded = [self._held_out(splits) if holds_out else self._encoded(splits) for splits in loaded]
        joined = dict[str, Rows]()
        for split in SPLITS:
            if parts := [splits[split] for splits in encoded if split in splits]:
                joined[split] = join(parts, self.weights if split == "train" else None, self.seed)
        self.splits = joined
        if holds_out:
            examples: Any = self.splits.get("validation", ())
            tell_held_out(self.validation, self.seed, len(examples))

    def _encoded(self, splits: dict[str, Rows]) -> dict[str, Rows]:
        return {split: self.encode(rows, split) for split, rows in splits.items()}

    def _held_out(self, splits: dict[str, Rows]) -> dict[str, Rows]:
        """Encodes splits with a validation split held out of the training rows, unless one of both would have no example."""
        parts = held_out(splits, self.validation, self.seed)
        if parts is not None:
            with suppress(NoExamples):
                return self._encoded(parts)
        return self._encoded(splits)

    def prepare(self, sources: Sequence[dict[str, Rows]], model: PreTrainedModel | None) -> None:
        """Looks at the rows of all sources before they are encoded."""

    @abstractmethod
    def encode(self, rows: Rows, split: str) -> Rows:
        """Turns rows of the data into examples."""

    @abstractmethod
    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the function that makes a batch of examples."""

    def train_dataloader(self) -> ResumableLoader:
        """Returns batches of the split `train`, in another order each epoch; examples that do not fill a batch are left out."""
        if "train" not in self.splits:
            raise ValueError(f"data has no split 'train'; it has {', '.join(sorted(self.splits)) or 'none that is used'}")
        begin = self._resume or {"epoch": 0 if self.trainer is None else self.trainer.current_epoch}
        self._resume = {}
        return self._loader("train", shuffle=True, **begin)

    def state_dict(self) -> dict[str, Any]:
        """Returns the place in the training data."""
        position = None if self.trainer is None else place_of(self.trainer)
        return {} if position is None else {"train": position}

    def fit_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the place in a checkpoint fit this batch size and number of devices, before it is loaded."""
        position = checkpoint.get(type(self).__qualname__, {}).get("train", {})
        if self.trainer is not None and "examples" in position:
            fit_place(position, checkpoint, self.batch_size * self.trainer.world_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved place, if a fit has begun."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._resume = {name: value for name, value in state_dict.get("train", {}).items() if name != "examples"}
        # whoever asked for the length of training before this had a loader made that starts at the beginning
        drop_training_loaders(self.trainer)

    def val_dataloader(self) -> list[ResumableLoader]:
        """Returns batches of the split `validation`, in order; none if the data has no such split."""
        return [self._loader("validation")] if "validation" in self.splits else []

    def test_dataloader(self) -> list[ResumableLoader]:
        """Returns batches of the split `test`, in order; of `validation` if there is no `test`."""
        return [self._loader("test")] if "test" in self.splits else self.val_dataloader()

    def predict_dataloader(self) -> list[ResumableLoader]:
        """Returns the batches of `test_dataloader`."""
        return self.test_dataloader()

    def _loader(self, split: str, shuffle: bool = False, **position: int) -> ResumableLoader:
        rows, trainer = self.splits[split], self.trainer
        world, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        sampler = None
        if isinstance(rows, datasets.IterableDataset):
            rows = split_dataset_by_node(rows.shuffle(self.seed) if shuffle else rows, rank=rank, world_size=world)
        elif shuffle and len(rows) // world < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}: the split '{split}' has only {len(rows)} examples for {world} device(s)"
            )
        else:
            # torch adds seed and epoch: without a factor, one seed's second epoch would be the next seed's first
            sampler = EpochSampler(rows, world, rank, shuffle=shuffle, seed=self.seed * 1_000_003, drop_last=shuffle)
        return ResumableLoader(
            rows,
            count=None if trainer is None else lambda: batches_seen(trainer),
            **position,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=shuffle,
            collate_fn=self.collate(),
            num_workers=self.num_workers,
        )


def names_in(splits: Mapping[str, Rows], column: str) -> list[str]:
    """Finds the names of labels: those that `datasets` knows of a column of numbers, or the words in it, sorted; else none."""
    words = set[str]()
    for rows in splits.values():
        kind = (rows.features or {}).get(column)
        if isinstance(kind, datasets.ClassLabel):
            return list(kind.names)
        if isinstance(rows, datasets.Dataset) and getattr(kind, "dtype", "").endswith("string"):
            words |= {word for word in rows.unique(column) if word is not None}
    return sorted(words)


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
    numbers = {number: label2id[name] for number, name in enumerate(kind.names)}
    return None if all(before == after for before, after in numbers.items()) else numbers


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
        if model is not None and self.label2id:  # what is saved says them, too
            model.config.id2label = {number: name for name, number in self.label2id.items()}
            model.config.label2id = dict(self.label2id)

    def prepare(self, sources: Sequence[dict[str, Rows]], model: PreTrainedModel | None) -> None:
        """Finds the names of labels."""
        self.names = [name for splits in sources for name in names_in(splits, self.label_column)]
        self.label2id = number_labels(self.names, None if model is None else model.config, self.label_column)
