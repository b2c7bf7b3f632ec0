"""Base classes of the data modules: splits, resumable loaders, and label numbers."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import datasets
import lightning.pytorch as pl
from datasets.distributed import split_dataset_by_node
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from billhook.arguments import check_fraction, check_int, check_number
from billhook.calibration.examples import Batch
from billhook.calibration.reading import SPLITS, Data, Rows, Table, check_data, is_line_text, load_splits
from billhook.fit.lightning_internals import batch_progress, drop_training_loaders, saved_progress
from billhook.model import find_transformer
from billhook.training.loader import EpochSampler, ResumableLoader, batches_seen


def join(parts: Sequence[Rows], weights: Sequence[float] | None, seed: int) -> Rows:
    """Concatenates the rows of all sources, or samples them by weight.

    Sampling stops when every source was used in full, so rows of other sources may repeat.
    """
    if len(parts) == 1:
        return parts[0]
    if weights is None:
        return datasets.concatenate_datasets(list(parts))
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(list(parts), shares, seed, stopping_strategy="all_exhausted")


class NoExamples(ValueError):
    """Error for a split without a usable example."""


class DatasetModule(pl.LightningDataModule):
    """Base class of the data modules, with deterministic, resumable loaders."""

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
        for weight in weights or ():
            check_number("weights", weight, above=0)
        if weights is not None and len(weights) != len(sources):
            raise ValueError(f"weights={weights!r} must have a number for each of the {len(sources)} sources in data")
        self.data, self.validation, self.weights = data, validation, weights
        self.batch_size, self.seed, self.num_workers, self.streaming = batch_size, seed, num_workers, streaming
        self.splits: dict[str, Rows] = {}
        self._resume: dict[str, int] = {}

    def model_name(self, argument: str) -> str:
        """Returns the name or folder of the model in training, for its tokenizer or processor.

        Raises:
            ValueError: If it has none.
        """
        module = getattr(self.trainer, "lightning_module", None)
        name = None if module is None else find_transformer(module).config.name_or_path
        if not name:
            raise ValueError(f"{argument}=None: the model in training has no name or folder to load it from. Pass {argument}=.")
        return str(name)

    def prepare_data(self) -> None:
        """Prepares and caches the data in a single process, before the others load it."""
        if not self.streaming:
            self.setup("fit")

    def check(self, model: PreTrainedModel) -> None:
        """Raises `ValueError` if a model cannot train on the batches, before data is loaded."""

    def setup(self, stage: str) -> None:
        """Prepares the splits, after checking that the model in training can use them."""
        model = None
        with suppress(ValueError):  # no model yet, or several
            model = find_transformer(getattr(self.trainer, "lightning_module", None) or nn.Identity())
        self.read(model)

    def read(self, model: PreTrainedModel | None = None) -> None:
        """Prepares the splits for a model.

        Raises:
            ValueError: If data cannot be read, or a weighted source has no split `train`.
        """
        if model is not None:
            self.check(model)
        if self.splits:
            return
        sources = self.data if isinstance(self.data, list) else [self.data]
        loaded = []
        for source in sources:
            splits = self.load(source, model)
            loaded.append({split: rows for split, rows in splits.items() if split in SPLITS})
        with_train = ["train" in splits for splits in loaded]
        if self.weights is not None and not all(with_train):
            raise ValueError("weights: every source in data needs a split 'train'. Add the split, or remove weights.")
        self.prepare(loaded, model)
        splits_train = self.validation > 0 and any(with_train) and not any("validation" in splits for splits in loaded)
        encoded, joined = list(map(self._encode_with_validation if splits_train else self._encode_all, loaded)), {}
        for split in SPLITS:
            if parts := [splits[split] for splits in encoded if split in splits]:
                joined[split] = join(parts, self.weights if split == "train" else None, self.seed)
        self.splits = joined
        if splits_train:
            held_out: Any = self.splits.get("validation", ())
            message = (
                f"holding out {len(held_out)} examples of 'train' for validation ({self.validation:.3g} of its rows, seed "
                f"{self.seed}), because the data has no split 'validation'. A data module with validation=0 trains on all rows."
                if len(held_out)
                else "no validation, because the data has no split 'validation' and 'train' is streamed or too short to split. "
                "Name a split 'validation' in data."
            )
            rank_zero_info(f"billhook: {message}")

    def _encode_all(self, splits: dict[str, Rows]) -> dict[str, Rows]:
        return {split: self.encode(rows, split) for split, rows in splits.items()}

    def _encode_with_validation(self, splits: dict[str, Rows]) -> dict[str, Rows]:
        """Encodes splits after holding out validation rows, if both splits have examples."""
        rows = splits.get("train")
        if isinstance(rows, datasets.Dataset) and len(rows) > 1:
            # drawn by the seed; continuous text gives its last lines
            parts = rows.train_test_split(test_size=self.validation, seed=self.seed, shuffle=not is_line_text(rows))
            with suppress(NoExamples):
                return self._encode_all({**splits, "train": parts["train"], "validation": parts["test"]})
        return self._encode_all(splits)

    def load(self, source: Data | Table, model: PreTrainedModel | None) -> dict[str, Rows]:
        """Loads the splits of a source."""
        return load_splits(source, self.streaming)

    def prepare(self, sources: Sequence[dict[str, Rows]], model: PreTrainedModel | None) -> None:
        """Inspects the rows of all sources before they are encoded."""

    @abstractmethod
    def encode(self, rows: Rows, split: str) -> Rows:
        """Converts rows of the data to examples."""

    @abstractmethod
    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the collate function."""

    def train_dataloader(self) -> ResumableLoader:
        """Returns training batches, reshuffled every epoch; an incomplete last batch is dropped.

        Raises:
            ValueError: If there is no split `train`.
        """
        if "train" not in self.splits:
            raise ValueError(f"data has no split 'train'. Splits: {', '.join(sorted(self.splits)) or 'none'}.")
        begin = self._resume or {"epoch": 0 if self.trainer is None else self.trainer.current_epoch}
        self._resume = {}
        return self._loader("train", shuffle=True, **begin)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the training data."""
        trainer = self.trainer
        if trainer is None or not isinstance(loader := trainer.train_dataloader, ResumableLoader):
            return {}
        progress, seen = batch_progress(trainer), batches_seen(trainer)
        if not loader.begun or loader.seen == seen:
            position = {"epoch": loader.epoch, "batch": loader.batch, "seen": loader.seen}
        else:
            epoch_ended = progress.is_last_batch
            batch = 0 if epoch_ended else int(progress.current.processed)
            position = {"epoch": loader.epoch + int(epoch_ended), "batch": batch, "seen": seen}
        return {"train": position | {"examples": position["batch"] * (loader.batch_size or 1) * trainer.world_size}}

    def fit_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Converts the saved position to the current batch size and number of devices.

        Examples of an incomplete batch are used again.
        """
        position = checkpoint.get(type(self).__qualname__, {}).get("train", {})
        if self.trainer is None or "examples" not in position:
            return
        batch = position["examples"] // (self.batch_size * self.trainer.world_size)
        if batch != position["batch"]:
            position["batch"], current = batch, saved_progress(checkpoint)
            completed = batch - current["processed"] + current["completed"]
            current.update(ready=batch, started=batch, processed=batch, completed=completed)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved position, if training has begun."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._resume = {name: value for name, value in state_dict.get("train", {}).items() if name != "examples"}
        # computing the length of training may have created a loader before this, which starts at the beginning
        drop_training_loaders(self.trainer)

    def val_dataloader(self) -> list[ResumableLoader]:
        """Returns validation batches in order, or an empty list without a split `validation`."""
        return [self._loader("validation")] if "validation" in self.splits else []

    def test_dataloader(self) -> list[ResumableLoader]:
        """Returns test batches in order, or validation batches without a split `test`."""
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
                f"batch_size={self.batch_size} is too large: the split '{split}' has {len(rows)} examples for {world} device(s). "
                "Use a smaller batch_size, or more data."
            )
        else:
            # torch adds seed and epoch: without the factor, the second epoch of a seed would equal the first of the next seed
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


def label_names(splits: Mapping[str, Rows], column: str) -> list[str]:
    """Returns the class names stored for a column, or its sorted strings, if any."""
    words = set()
    for rows in splits.values():
        kind = (rows.features or {}).get(column)
        if isinstance(kind, datasets.ClassLabel):
            return list(kind.names)
        if isinstance(rows, datasets.Dataset) and getattr(kind, "dtype", "").endswith("string"):
            words |= {word for word in rows.unique(column) if word is not None}
    return sorted(words)


def number_labels(names: Sequence[str], config: PretrainedConfig | None, column: str) -> dict[str, int]:
    """Numbers labels by name as in a config that has all names, or else in order.

    Raises:
        ValueError: If the model has a different number of classes.
    """
    known: dict[str, int] = {} if config is None else dict(config.label2id or {})  # type: ignore[arg-type]
    if names and set(names) <= known.keys():
        return {name: int(known[name]) for name in sorted(known, key=known.__getitem__)}
    if names and config is not None and len(names) != config.num_labels:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"label_column='{column}' has {len(names)} labels ({shown}), but the model has {config.num_labels} classes. Pass "
            f"num_labels={len(names)} to TransformerModule."
        )
    return {name: number for number, name in enumerate(names)}


def label_numbers(rows: Rows, column: str, label2id: Mapping[str, int]) -> dict[Any, int] | None:
    """Returns the class number of each value of a column, or None if values are class numbers."""
    kind = (rows.features or {}).get(column)
    if not isinstance(kind, datasets.ClassLabel):
        return dict(label2id) or None
    numbers = {number: label2id[name] for number, name in enumerate(kind.names)}
    return None if all(before == after for before, after in numbers.items()) else numbers


class LabeledModule(DatasetModule):
    """Base class of the data modules for classifiers, which number labels as the model does.

    The label names are stored in the config of the model in training.

    Attributes:
        label_column: Column of the label.
        names: Label names in the data.
        label2id: Class number of each label name.
    """

    label_column: str
    names: Sequence[str] = ()
    label2id: Mapping[str, int] = {}

    def read(self, model: PreTrainedModel | None = None) -> None:
        """Prepares the splits with the model's label numbers, and stores names in its config."""
        if model is not None and number_labels(self.names, model.config, self.label_column) != self.label2id:
            self.splits = {}  # prepared for a model with other label numbers
        super().read(model)
        if model is not None and self.label2id:  # exported with the model
            model.config.id2label = {number: name for name, number in self.label2id.items()}
            model.config.label2id = dict(self.label2id)

    def prepare(self, sources: Sequence[dict[str, Rows]], model: PreTrainedModel | None) -> None:
        """Finds and numbers the label names."""
        self.names = [name for splits in sources for name in label_names(splits, self.label_column)]
        self.label2id = number_labels(self.names, None if model is None else model.config, self.label_column)
