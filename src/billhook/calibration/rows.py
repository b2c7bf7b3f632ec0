"""Texts to token rows, with `datasets`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import torch
from datasets.fingerprint import Hasher
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, default_data_collator

from billhook.assets import text_files

SPLITS = ("train", "validation", "test")
FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
ROWS_AT_ONCE = 10_000

Data: TypeAlias = str | dict[str, str | list[str]]
Batch: TypeAlias = dict[str, Any]
Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


def load_splits(data: Data, streaming: bool = False) -> dict[str, Rows]:
    """Loads the splits of `data` with `datasets`: a folder may be a hub data set, and a file alone is the split `train`."""
    if data == "tiny":
        return _read("parquet", text_files(), streaming)
    if isinstance(data, str) and _kind(data) is not None and not Path(data).is_dir():
        data = {"train": data}
    if isinstance(data, dict):
        _check_files(data)
        return _read(_one_kind(data), data, streaming)
    name, _, config = (data, "", "") if Path(data).is_dir() else data.partition(":")
    found = dict(datasets.load_dataset(name, config or None, streaming=streaming))
    if any(runs_on(rows) for rows in found.values()):
        found = dict(datasets.load_dataset(name, config or None, streaming=streaming, keep_linebreaks=True))
    return found


def runs_on(rows: Rows) -> bool:
    """Says whether a row is a line of a .txt file, not a document."""
    return bool(rows.info.builder_name == "text")


def _read(kind: str, files: Any, streaming: bool) -> dict[str, Rows]:  # noqa: ANN401 - what `load_dataset` takes
    options = {"keep_linebreaks": True} if kind == "text" else {}
    try:
        return dict(datasets.load_dataset(kind, data_files=files, streaming=streaming, **options))
    except Exception as error:
        raise _unreadable(f"the files {files} cannot be read as {kind}", error) from error


def _unreadable(what: str, error: Exception) -> ValueError:
    return ValueError(f"data: {what}, or hold no rows ({error.__cause__ or error or type(error).__name__})")


def _kind(file: str) -> str | None:
    """Returns the format of a file by its ending; one more ending may name its compression."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _one_kind(files: dict[str, str | list[str]]) -> str:
    kinds = {_kind(name) for names in files.values() for name in _as_list(names)}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        raise ValueError(f"data: files of one kind, ending in one of {', '.join(FORMATS)}, are needed; got {files}")
    return kind


def _check_files(files: dict[str, str | list[str]]) -> None:
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


def check_columns(rows: Rows, split: str, *columns: str) -> None:
    """Refuses a split without one of the columns, or without any row."""
    found = _column_names(rows)
    for column in columns:
        if column not in found:
            raise ValueError(f"the split '{split}' has no column '{column}'; it has {', '.join(found) or 'no rows'}")


def _column_names(rows: Rows) -> list[str]:
    """Returns the columns; reads the first row of a stream that does not know them."""
    if rows.column_names:
        return list(rows.column_names)
    try:
        return list(next(iter(rows), {}))
    except Exception as error:
        raise _unreadable("the stream cannot be read", error) from error


def map_rows(
    rows: Rows,
    function: Callable[..., Batch],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    **arguments: Any,  # noqa: ANN401
) -> Rows:
    """Runs `rows.map(function)`, cached by everything that decides the result (a tokenizer's own hash changes with use)."""
    options = {
        "batched": True,
        "batch_size": ROWS_AT_ONCE,
        "remove_columns": _column_names(rows),
        "fn_kwargs": {"tokenizer": tokenizer, **arguments},
    }
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(function, **options)
    source = Path(__file__).read_text(encoding="utf-8")
    parts = [rows._fingerprint, source, function.__name__, arguments, _identity(tokenizer)]
    return rows.map(function, **options, new_fingerprint=Hasher.hash(parts), desc=f"Tokenising {split}")


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """Returns everything that decides a tokenizer's output, without the padding and truncation of its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [repr(tokenizer), tokenizer.get_vocab()]
    return [repr(tokenizer), json.loads(backend.to_str()) | {"truncation": None, "padding": None}]


def pack(rows: Batch, tokenizer: PreTrainedTokenizerBase, block_size: int, column: str, documents: bool) -> Batch:
    """Packs texts, each of them a document, a chat or else a line that runs on, into blocks of `block_size` token ids.

    Null and blank texts do not count, and tokens that do not fill the last block are left out.
    """
    given = [text for text in rows[column] if text is not None]
    if given and isinstance(given[0], list):  # chats, whose template says where they end
        given, documents = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in given], False
        given = ["".join(given)]
    texts = [text for text in _texts(given if documents else ["".join(given)], column) if text and not text.isspace()]
    if not texts:
        return {"input_ids": []}
    last = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    end = [last] if documents and last is not None else []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ids = [token for document in encoded for token in document + end]
    return {"input_ids": [ids[i : i + block_size] for i in range(0, len(ids) - block_size + 1, block_size)]}


def classify(
    rows: Batch, tokenizer: PreTrainedTokenizerBase, text_columns: list[str], label_column: str, max_length: int
) -> Batch:
    """Encodes texts, or pairs of texts, with their labels."""
    labels = rows[label_column]
    if wrong := [label for label in labels if not isinstance(label, int)]:
        raise ValueError(f"the column '{label_column}' must hold labels, whole numbers from 0; it holds {wrong[0]!r}")
    texts = (_texts(rows[column], column) for column in text_columns)
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    return {**encoded, "labels": labels}


def translate(rows: Batch, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], lengths: Sequence[int]) -> Batch:
    """Encodes sources, with the token ids of the targets as labels."""
    source, target = (_texts(rows[column], column) for column in columns)
    encoded = tokenizer(source, truncation=True, max_length=lengths[0])
    labels = tokenizer(text_target=target, truncation=True, max_length=lengths[1])
    return {**encoded, "labels": labels["input_ids"]}


def _texts(values: list[Any], column: str) -> list[str]:
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"the column '{column}' must hold text in every row; it holds {value!r}")
    return values


def blocks_to_batch(blocks: list[Batch]) -> Batch:
    """Makes a batch of blocks of token ids in which every token is a label."""
    batch: Batch = default_data_collator(blocks)
    return {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()}


class SteadyMasking(DataCollatorForLanguageModeling):
    """Collator that makes a masked batch of blocks of token ids; the masks depend on the blocks alone.

    So they are the same in each evaluation and after a resume, and differ between epochs that shuffle.
    """

    def __call__(self, blocks: list[Batch], return_tensors: str | None = None) -> Batch:
        """Returns a masked batch."""
        tokens = torch.tensor([block["input_ids"] for block in blocks]).flatten()
        self.generator = torch.Generator().manual_seed(int((tokens * torch.arange(len(tokens))).sum()))
        batch: Batch = super().__call__(blocks, return_tensors)
        return batch
