"""LightningDataModules over `datasets`: text packed into blocks, sequence classification, sequence to sequence."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import datasets
import lightning.pytorch as pl
from datasets.distributed import split_dataset_by_node
from lightning.pytorch.trainer.states import TrainerFn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from billhook.checkpoints.pretrained import load_tokenizer
from billhook.fit.lightning_internals import drop_training_loaders
from billhook.model.find import find_transformer
from billhook.training.loader import EpochSampler, ResumableLoader, batches_seen, fit_place, place_of
from billhook.training.rows import (
    SPLITS,
    Batch,
    Data,
    Rows,
    SteadyMasking,
    blocks_to_batch,
    check_columns,
    classify,
    load_splits,
    map_rows,
    pack,
    runs_on,
    translate,
)


class DatasetModule(pl.LightningDataModule):
    """What the data modules below share: splits from `datasets`, a tokenizer, loaders in a deterministic, resumable order.

    Args:
        data: `"tiny"` (the embedded text), a hub name (`"name"` or `"name:config"`) or a folder of that form, or local files
            by split, as in `{train: a.jsonl, validation: [b.jsonl, c.jsonl]}` (.txt, .json, .jsonl, .csv, .parquet; may be
            compressed). The name of one file is that of the split `train`.
        tokenizer: A name or folder; by default the tokenizer that lies beside the model in training.
        batch_size: Examples in a batch, per device.
        seed: The order of the training examples depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.
        streaming: Read while training instead of preparing and caching everything first.

    Raises:
        ValueError: If a file is empty, is missing or has an unknown ending, or a split has no such column.
    """

    def __init__(
        self,
        data: Data = "tiny",
        tokenizer: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        streaming: bool = False,
    ) -> None:
        super().__init__()
        _at_least_one(batch_size=batch_size)
        self.data, self.tokenizer_name = data, tokenizer
        self.batch_size, self.seed, self.num_workers, self.streaming = batch_size, seed, num_workers, streaming
        self.splits: dict[str, Rows] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._resume: dict[str, int] = {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            name = self.tokenizer_name or self._name_beside_model()
            tokenizer: PreTrainedTokenizerBase = load_tokenizer(name)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            self._tokenizer = tokenizer
        return self._tokenizer

    def _name_beside_model(self) -> str:
        module = getattr(self.trainer, "lightning_module", None)
        name = None if module is None else find_transformer(module).config.name_or_path
        if not name:
            raise ValueError("tokenizer: there is no model in training that says where it came from; name a tokenizer")
        return str(name)

    def prepare_data(self) -> None:
        """Reads, tokenises and caches on one process, so that the others find it in the cache."""
        if not self.streaming:
            self.setup("fit")

    def setup(self, stage: str) -> None:
        """Makes the splits."""
        if not self.splits:
            rows = load_splits(self.data, self.streaming)
            self.splits = {split: self.encode(rows[split], split) for split in SPLITS if split in rows}

    @abstractmethod
    def encode(self, rows: Rows, split: str) -> Rows:
        """Rows of text to rows of token ids."""

    @abstractmethod
    def collate(self) -> Callable[[list[Batch]], Batch]:
        """What makes a batch of examples."""

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the split `train`, shuffled anew each epoch; what does not fill a batch is left out.

        Raises:
            ValueError: If there is no such split, or it does not fill one batch.
        """
        if "train" not in self.splits:
            raise ValueError(f"data has no split 'train'; it has {', '.join(sorted(self.splits)) or 'none that is used'}")
        begin = self._resume or {"epoch": 0 if self.trainer is None else self.trainer.current_epoch}
        self._resume = {}
        return self._loader("train", shuffle=True, **begin)

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data."""
        place = None if self.trainer is None else place_of(self.trainer)
        return {} if place is None else {"train": place}

    def fit_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the place in a checkpoint fit this batch size and number of devices, before it is loaded."""
        place = checkpoint.get(type(self).__qualname__, {}).get("train", {})
        if self.trainer is not None and "examples" in place:
            fit_place(place, checkpoint, self.batch_size * self.trainer.world_size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there in the fit that has begun."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._resume = {name: value for name, value in state_dict.get("train", {}).items() if name != "examples"}
        # whoever asked for the length of training before this had a loader made that starts at the beginning
        drop_training_loaders(self.trainer)

    def val_dataloader(self) -> list[ResumableLoader]:
        """Batches of the split `validation`, in order; none where the data has no such split."""
        return [self._loader("validation")] if "validation" in self.splits else []

    def test_dataloader(self) -> list[ResumableLoader]:
        """Batches of the split `test`, in order; of `validation` where there is no `test`."""
        return [self._loader("test")] if "test" in self.splits else self.val_dataloader()

    def predict_dataloader(self) -> list[ResumableLoader]:
        """The batches of `test_dataloader`."""
        return self.test_dataloader()

    def _loader(self, split: str, shuffle: bool = False, **place: int) -> ResumableLoader:
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
            **place,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=shuffle,
            collate_fn=self.collate(),
            num_workers=self.num_workers,
        )


def _at_least_one(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


class TextDataModule(DatasetModule):
    """Text for language models, tokenised and packed into blocks of equal length.

    Each row of a hub data set, .jsonl, .csv or .parquet file is one document, and the tokenizer's end-of-sequence token
    (or separator) ends it; the lines of a .txt file run on. Null and blank rows do not count. What does not fill a block
    at the end of 10,000 rows is left out.

    Args:
        data: `"tiny"` (the embedded text), a hub name (`"name"` or `"name:config"`), a folder, or local files by split.
        tokenizer: A name or folder; by default the tokenizer that lies beside the model in training.
        block_size: Tokens in a block.
        batch_size: Blocks in a batch, per device.
        column: The column that holds the text.
        mlm_probability: Share of the tokens to mask, for masked language models; 0 for all others. A batch of the same
            blocks is always masked alike, so that figures before and after can be compared.
        seed: The order of the training blocks depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.
        streaming: Read while training instead of preparing and caching everything first.

    Raises:
        ValueError: If a file is empty or missing, a split has no such column, or the text is shorter than one block.
    """

    def __init__(
        self,
        data: Data = "tiny",
        tokenizer: str | None = None,
        block_size: int = 256,
        batch_size: int = 8,
        column: str = "text",
        mlm_probability: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
        streaming: bool = False,
    ) -> None:
        super().__init__(data, tokenizer, batch_size, seed, num_workers, streaming)
        if block_size < 2:
            raise ValueError(f"block_size={block_size} must be at least 2: a token to read and one to predict")
        if not 0.0 <= mlm_probability < 1.0:
            raise ValueError(f"mlm_probability={mlm_probability} must be in [0, 1)")
        self.block_size, self.column, self.mlm_probability = block_size, column, mlm_probability

    def encode(self, rows: Rows, split: str) -> Rows:
        """Rows of text to rows of `block_size` token ids."""
        check_columns(rows, split, self.column)
        arguments = {"block_size": self.block_size, "column": self.column, "documents": not runs_on(rows)}
        blocks = map_rows(rows, pack, split, self.tokenizer, **arguments)
        if isinstance(blocks, datasets.Dataset) and len(blocks) == 0:
            raise ValueError(f"block_size={self.block_size} is longer than the whole text of the split '{split}'")
        return blocks

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Blocks to a batch; with `mlm_probability`, masked."""
        if not self.mlm_probability:
            return blocks_to_batch
        if self.tokenizer.mask_token is None:
            raise ValueError(f"mlm_probability={self.mlm_probability}: the tokenizer has no mask token")
        return SteadyMasking(self.tokenizer, mlm_probability=self.mlm_probability)


class ClassificationDataModule(DatasetModule):
    """Texts, or pairs of texts, with a label each.

    Args:
        data: A hub name (`"name"` or `"name:config"`), a folder, or local files by split.
        tokenizer: A name or folder; by default the tokenizer that lies beside the model in training.
        text_columns: The column of the text; two columns for pairs.
        label_column: The column of the label: whole numbers from 0.
        max_length: Longer texts are cut to so many tokens.
        batch_size: Texts in a batch, per device.
        seed: The order of the training texts depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.

    Raises:
        ValueError: If a file is empty or missing, or a split has no such column.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: str | None = None,
        text_columns: list[str] | None = None,
        label_column: str = "label",
        max_length: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(data, tokenizer, batch_size, seed, num_workers)
        _at_least_one(max_length=max_length)
        self.text_columns, self.label_column, self.max_length = text_columns or ["text"], label_column, max_length
        if len(self.text_columns) > 2:
            raise ValueError(f"text_columns={self.text_columns}: one column, or two for pairs")

    def encode(self, rows: Rows, split: str) -> Rows:
        """Rows of text and label to rows of token ids and labels."""
        check_columns(rows, split, *self.text_columns, self.label_column)
        arguments = {"text_columns": self.text_columns, "label_column": self.label_column, "max_length": self.max_length}
        return map_rows(rows, classify, split, self.tokenizer, **arguments)

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Texts to a batch, padded to the longest."""
        collator: Callable[[list[Batch]], Batch] = DataCollatorWithPadding(self.tokenizer)
        return collator


class Seq2SeqDataModule(DatasetModule):
    """Pairs of source and target texts.

    Args:
        data: A hub name (`"name"` or `"name:config"`), a folder, or local files by split.
        tokenizer: A name or folder; by default the tokenizer that lies beside the model in training.
        source_column: The column of the text to read.
        target_column: The column of the text to write.
        max_source_length: Longer sources are cut to so many tokens.
        max_target_length: Longer targets are cut to so many tokens.
        batch_size: Pairs in a batch, per device.
        seed: The order of the training pairs depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.

    Raises:
        ValueError: If a file is empty or missing, or a split has no such column.
    """

    def __init__(
        self,
        data: Data,
        tokenizer: str | None = None,
        source_column: str = "source",
        target_column: str = "target",
        max_source_length: int = 512,
        max_target_length: int = 128,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(data, tokenizer, batch_size, seed, num_workers)
        _at_least_one(max_source_length=max_source_length, max_target_length=max_target_length)
        self.source_column, self.target_column = source_column, target_column
        self.max_source_length, self.max_target_length = max_source_length, max_target_length

    def encode(self, rows: Rows, split: str) -> Rows:
        """Rows of source and target to rows of token ids."""
        check_columns(rows, split, self.source_column, self.target_column)
        columns, lengths = (self.source_column, self.target_column), (self.max_source_length, self.max_target_length)
        return map_rows(rows, translate, split, self.tokenizer, columns=columns, lengths=lengths)

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Pairs to a batch, padded to the longest; padded labels do not count in the loss."""
        collator: Callable[[list[Batch]], Batch] = DataCollatorForSeq2Seq(self.tokenizer)
        return collator
