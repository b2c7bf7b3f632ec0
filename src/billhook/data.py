"""LightningDataModules over `datasets`: text packed into blocks, sequence classification, sequence to sequence."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import lightning.pytorch as pl
from datasets.distributed import split_dataset_by_node
from datasets.fingerprint import Hasher
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from billhook.assets import model_path, text_files
from billhook.loader import EpochSampler, ResumableLoader

SPLITS = ("train", "validation", "test")
FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
ROWS_AT_ONCE = 10_000

Batch = dict[str, Any]
Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


class DatasetModule(pl.LightningDataModule):
    """What the data modules below share: splits from `datasets`, a tokenizer, loaders in a deterministic, resumable order.

    Args:
        data: `"tiny"` (the embedded text), a hub name (`"name"` or `"name:config"`), or local files by split, as in
            `{train: a.txt, validation: [b.jsonl, c.jsonl]}` (.txt, .json, .jsonl, .csv, .parquet; may be compressed).
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
        data: str | dict[str, str | list[str]] = "tiny",
        tokenizer: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int = 0,
        streaming: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.data, self.tokenizer_name = data, tokenizer
        self.batch_size, self.seed, self.num_workers, self.streaming = batch_size, seed, num_workers, streaming
        self.splits: dict[str, Rows] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._train_loader: ResumableLoader | None = None
        self._resume: dict[str, int] | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            name = self.tokenizer_name or self._name_beside_model()
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path(name))
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            self._tokenizer = tokenizer
        return self._tokenizer

    def _name_beside_model(self) -> str:
        model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
        if not name:
            raise ValueError("tokenizer: the model in training does not say where it came from; name a tokenizer")
        return name

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
        """Batches of the split `train`, shuffled anew each epoch."""
        if "train" not in self.splits:
            raise ValueError(f"data has no split 'train'; it has {sorted(self.splits)}")
        self._train_loader = self._loader("train", shuffle=True)
        if self._resume is not None:
            self._train_loader.load_state_dict(self._resume)
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """Where the training loader is (Lightning restores a loader's own state too late for a schedule that asks its length)."""
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there in the next fit."""
        self._resume = state_dict.get("train")

    def val_dataloader(self) -> list[ResumableLoader]:
        """Batches of the split `validation`, in order; none where the data has no such split."""
        return [self._loader("validation")] if "validation" in self.splits else []

    def test_dataloader(self) -> list[ResumableLoader]:
        """Batches of the split `test`, in order; of `validation` where there is no `test`."""
        return [self._loader("test")] if "test" in self.splits else self.val_dataloader()

    def predict_dataloader(self) -> list[ResumableLoader]:
        """The batches of `test_dataloader`."""
        return self.test_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:  # noqa: ANN401 - Lightning's signature
        """Counts the training batches, so that a resumed run goes on with the next one."""
        if self._train_loader is not None and self.trainer is not None and self.trainer.training:
            self._train_loader.consumed += 1
        return batch

    def _loader(self, split: str, shuffle: bool = False) -> ResumableLoader:
        rows = self.splits[split]
        world = 1 if self.trainer is None else self.trainer.world_size
        rank = 0 if self.trainer is None else self.trainer.global_rank
        if isinstance(rows, datasets.IterableDataset):
            rows = split_dataset_by_node(rows.shuffle(self.seed) if shuffle else rows, rank=rank, world_size=world)
            sampler = None
        else:
            sampler = EpochSampler(rows, world, rank, shuffle=shuffle, seed=self.seed, drop_last=shuffle)
        return ResumableLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=shuffle,
            collate_fn=self.collate(),
            num_workers=self.num_workers,
        )


class TextDataModule(DatasetModule):
    """Text for language models, tokenised and packed into blocks of equal length.

    A document ends with the tokenizer's end-of-sequence token: each row of a hub data set, .jsonl, .csv or .parquet file
    is one document; the lines of a .txt file run on. What does not fill a block at the end of 10,000 rows is left out.

    Args:
        data: `"tiny"`, a hub name (`"name"` or `"name:config"`), or local files by split.
        tokenizer: A name or folder; by default the tokenizer that lies beside the model in training.
        block_size: Tokens in a block.
        batch_size: Blocks in a batch, per device.
        column: The column that holds the text.
        mlm_probability: Share of the tokens to mask, for masked language models; 0 for all others.
        seed: The order of the training blocks depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.
        streaming: Read while training instead of preparing and caching everything first.

    Raises:
        ValueError: If a file is empty or missing, a split has no such column, or the text is shorter than one block.
    """

    def __init__(
        self,
        data: str | dict[str, str | list[str]] = "tiny",
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
        _check_columns(rows, split, self.column)
        arguments = {
            "tokenizer": self.tokenizer,
            "block_size": self.block_size,
            "column": self.column,
            "documents": _file_format(self.data) != "text",
        }
        blocks = _map_cached(rows, _pack, arguments, split)
        if isinstance(blocks, datasets.Dataset) and len(blocks) == 0:
            raise ValueError(f"block_size={self.block_size} is longer than the whole text of the split '{split}'")
        return blocks

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Blocks to a batch; with `mlm_probability`, masked."""
        if not self.mlm_probability:
            return _blocks_to_batch
        collator: Callable[[list[Batch]], Batch] = DataCollatorForLanguageModeling(
            self.tokenizer, mlm_probability=self.mlm_probability
        )
        return collator


class ClassificationDataModule(DatasetModule):
    """Texts, or pairs of texts, with a label each.

    Args:
        data: A hub name (`"name"` or `"name:config"`), or local files by split.
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
        data: str | dict[str, str | list[str]],
        tokenizer: str | None = None,
        text_columns: list[str] | None = None,
        label_column: str = "label",
        max_length: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(data, tokenizer, batch_size, seed, num_workers)
        self.text_columns, self.label_column, self.max_length = text_columns or ["text"], label_column, max_length
        if len(self.text_columns) > 2:
            raise ValueError(f"text_columns={self.text_columns}: one column, or two for pairs")

    def encode(self, rows: Rows, split: str) -> Rows:
        """Rows of text and label to rows of token ids and labels."""
        _check_columns(rows, split, *self.text_columns, self.label_column)
        arguments = {
            "tokenizer": self.tokenizer,
            "text_columns": self.text_columns,
            "label_column": self.label_column,
            "max_length": self.max_length,
        }
        return _map_cached(rows, _classify, arguments, split)

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Texts to a batch, padded to the longest."""
        collator: Callable[[list[Batch]], Batch] = DataCollatorWithPadding(self.tokenizer)
        return collator


class Seq2SeqDataModule(DatasetModule):
    """Pairs of source and target texts.

    Args:
        data: A hub name (`"name"` or `"name:config"`), or local files by split.
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
        data: str | dict[str, str | list[str]],
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
        self.source_column, self.target_column = source_column, target_column
        self.max_source_length, self.max_target_length = max_source_length, max_target_length

    def encode(self, rows: Rows, split: str) -> Rows:
        """Rows of source and target to rows of token ids."""
        _check_columns(rows, split, self.source_column, self.target_column)
        arguments = {
            "tokenizer": self.tokenizer,
            "columns": (self.source_column, self.target_column),
            "lengths": (self.max_source_length, self.max_target_length),
        }
        return _map_cached(rows, _translate, arguments, split)

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Pairs to a batch, padded to the longest; padded labels do not count in the loss."""
        collator: Callable[[list[Batch]], Batch] = DataCollatorForSeq2Seq(self.tokenizer)
        return collator


def load_splits(data: str | dict[str, str | list[str]], streaming: bool = False) -> dict[str, Rows]:
    """The splits that `data` names, as `datasets` gives them (see `DatasetModule`)."""
    if isinstance(data, dict) or data == "tiny":
        files = text_files() if isinstance(data, str) else data
        _check_files(files)
        extra = {"keep_linebreaks": True} if _file_format(data) == "text" else {}
        found = datasets.load_dataset(_file_format(data), data_files=files, streaming=streaming, **extra)
    else:
        name, _, config = data.partition(":")
        found = datasets.load_dataset(name, config or None, streaming=streaming)
    return dict(found)


def _file_format(data: str | dict[str, str | list[str]]) -> str | None:
    """What kind of files `data` names; None for a hub name."""
    if data == "tiny":
        return "parquet"
    if isinstance(data, str):
        return None
    suffixes = {s for files in data.values() for f in _as_list(files) for s in Path(f).suffixes if s in FORMATS}
    if len(suffixes) != 1:
        raise ValueError(f"data: files of one kind, ending in one of {', '.join(FORMATS)}, are needed; got {data}")
    return FORMATS[suffixes.pop()]


def _check_files(files: dict[str, str | list[str]] | dict[str, str]) -> None:
    for split, names in files.items():
        if split not in SPLITS:
            raise ValueError(f"data: unknown split '{split}'; a split is one of {', '.join(SPLITS)}")
        for name in _as_list(names):
            if not Path(name).is_file():
                raise ValueError(f"data: the file '{name}' of the split '{split}' does not exist")
            if Path(name).stat().st_size == 0:
                raise ValueError(f"data: the file '{name}' of the split '{split}' is empty")


def _as_list(files: str | list[str]) -> list[str]:
    return [files] if isinstance(files, str) else files


def _check_columns(rows: Rows, split: str, *columns: str) -> None:
    for column in columns:
        if rows.column_names is not None and column not in rows.column_names:
            raise ValueError(f"the split '{split}' has no column '{column}'; it has {', '.join(rows.column_names)}")


def _map_cached(rows: Rows, function: Callable[..., Batch], arguments: dict[str, Any], split: str) -> Rows:
    """`rows.map(function)`, cached under what the result depends on (a tokenizer's own hash changes with use)."""
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(function, batched=True, remove_columns=rows.column_names, fn_kwargs=arguments)
    plain = {k: v for k, v in arguments.items() if k != "tokenizer"}
    tokenizer = arguments["tokenizer"].backend_tokenizer.to_str()
    fingerprint = Hasher.hash([rows._fingerprint, function.__name__, plain, tokenizer])
    return rows.map(
        function,
        batched=True,
        batch_size=ROWS_AT_ONCE,
        remove_columns=rows.column_names,
        fn_kwargs=arguments,
        new_fingerprint=fingerprint,
        desc=f"Tokenising {split}",
    )


def _pack(
    rows: Batch, tokenizer: PreTrainedTokenizerBase, block_size: int, column: str, documents: bool
) -> dict[str, list[list[int]]]:
    texts = rows[column] if documents else ["".join(rows[column])]
    end = [tokenizer.eos_token_id] if documents and tokenizer.eos_token_id is not None else []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [token for document in encoded for token in document + end]
    return {"input_ids": [ids[i : i + block_size] for i in range(0, len(ids) - block_size + 1, block_size)]}


def _blocks_to_batch(blocks: list[Batch]) -> Batch:
    batch: Batch = default_data_collator(blocks)
    return {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()}


def _classify(
    rows: Batch, tokenizer: PreTrainedTokenizerBase, text_columns: list[str], label_column: str, max_length: int
) -> Batch:
    encoded = tokenizer(*(rows[column] for column in text_columns), truncation=True, max_length=max_length)
    return {**encoded, "labels": rows[label_column]}


def _translate(rows: Batch, tokenizer: PreTrainedTokenizerBase, columns: tuple[str, str], lengths: tuple[int, int]) -> Batch:
    encoded = tokenizer(rows[columns[0]], truncation=True, max_length=lengths[0])
    target = tokenizer(text_target=rows[columns[1]], truncation=True, max_length=lengths[1])
    return {**encoded, "labels": target["input_ids"]}
