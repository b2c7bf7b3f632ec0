"""Turns rows of `datasets` into examples of token ids."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from billhook.calibration import conversations
from billhook.calibration.conversations import ROWS_AT_ONCE, check_texts, encode
from billhook.calibration.reading import Rows, column_names

IGNORE_INDEX = -100
"""Label of a token that the loss ignores."""

Batch = dict[str, Any]


def map_rows(
    rows: Rows,
    function: Callable[..., Batch],
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    **arguments: Any,  # noqa: ANN401
) -> Rows:
    """Runs `rows.map(function)`, cached by everything that determines the result.

    The hash that `datasets` makes of a tokenizer changes with use, so the cache key is computed here.

    Args:
        rows: The rows.
        function: Converts a batch of rows.
        split: Name of the split, for progress.
        tokenizer: Tokenizer, an argument of the function.
        arguments: Its other arguments.
    """
    import datasets
    from datasets.fingerprint import Hasher

    options = {
        "batched": True,
        "batch_size": ROWS_AT_ONCE,
        "remove_columns": column_names(rows),
        "fn_kwargs": {"tokenizer": tokenizer, **arguments},
    }
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(function, **options)
    source = [Path(file).read_text(encoding="utf-8") for file in (__file__, conversations.__file__)]
    # private: the fingerprint by which `datasets` caches these rows
    parts = [rows._fingerprint, source, function.__name__, arguments, repr(tokenizer)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts.append(tokenizer.get_vocab())
    else:  # without the padding and truncation of its last call
        parts += [tokenizer.chat_template, json.loads(backend.to_str()) | {"truncation": None, "padding": None}]
    return rows.map(function, **options, new_fingerprint=Hasher.hash(parts), desc=f"Tokenizing {split}")


def pack(
    rows: Batch, tokenizer: PreTrainedTokenizerBase, length: int, columns: Sequence[str], documents: bool, responses: bool = False
) -> Batch:
    """Tokenizes rows and packs them into examples of `length` tokens, and drops the rest.

    Args:
        rows: The rows.
        tokenizer: The tokenizer.
        length: Number of tokens of an example.
        columns: Columns of text or chats.
        documents: Whether each row is a document, which ends with the end-of-text token.
        responses: Whether only responses have labels.
    """
    ids = []
    learned = []
    for row in encode(rows, tokenizer, columns, documents, responses):
        ids += row.ids
        learned += row.learned
    starts = range(0, len(ids) - length + 1, length)
    return _examples([(ids[i : i + length], learned[i : i + length]) for i in starts], responses)


def encode_separately(
    rows: Batch, tokenizer: PreTrainedTokenizerBase, length: int, columns: Sequence[str], documents: bool, responses: bool = False
) -> Batch:
    """Tokenizes each row into an example of at most `length` tokens; otherwise like `pack`."""
    encoded = encode(rows, tokenizer, columns, documents, responses)
    return _examples([(row.ids[:length], row.learned[:length]) for row in encoded], responses)


def _examples(examples: list[tuple[list[int], list[bool]]], labelled: bool) -> Batch:
    """Returns examples, optionally with labels, if the loss covers a token beyond the first."""
    batch: Batch = {"input_ids": [], **({"labels": []} if labelled else {})}
    for ids, learned in examples:
        if any(learned[1:]):
            batch["input_ids"].append(ids)
            if labelled:
                batch["labels"].append([token if counts else IGNORE_INDEX for token, counts in zip(ids, learned, strict=True)])
    return batch


def classify(
    rows: Batch,
    tokenizer: PreTrainedTokenizerBase,
    text_columns: list[str],
    label_column: str,
    length: int,
    numbers: dict[Any, int] | None = None,
) -> Batch:
    """Tokenizes texts or text pairs with their labels.

    Args:
        rows: The rows.
        tokenizer: The tokenizer.
        text_columns: One or two columns of text.
        label_column: Column of the labels.
        length: Maximum number of tokens.
        numbers: Ids of label names. None if labels are ids.
    """
    labels = label_ids(rows[label_column], label_column, numbers)
    encoded = tokenizer(*(check_texts(rows[column], column) for column in text_columns), truncation=True, max_length=length)
    return {**encoded, "labels": labels}


def label_ids(labels: Sequence[Any], column: str, numbers: Mapping[Any, int] | None) -> list[int]:
    """Returns labels as ids, mapped by `numbers` if given; raises if a label is no integer."""
    by_number = [label if numbers is None else numbers.get(label, label) for label in labels]
    for label in by_number:
        if not isinstance(label, int):
            known = f", or one of {', '.join(map(str, numbers))}" if numbers else ""
            raise ValueError(f"the column '{column}' must hold labels: integers from 0{known}. Got {label!r}.")
    return by_number


def translate(rows: Batch, tokenizer: PreTrainedTokenizerBase, columns: Sequence[str], lengths: Sequence[int]) -> Batch:
    """Tokenizes source texts, with the token ids of the targets as labels.

    Args:
        rows: The rows.
        tokenizer: The tokenizer.
        columns: Columns of the source and of the target.
        lengths: Maximum numbers of tokens of both.
    """
    source, target = (check_texts(rows[column], column) for column in columns)
    encoded = tokenizer(source, truncation=True, max_length=lengths[0])
    return {**encoded, "labels": tokenizer(text_target=target, truncation=True, max_length=lengths[1])["input_ids"]}


def collate_packed(blocks: list[Batch]) -> Batch:
    """Makes a batch of examples of equal length; by default every token is a label."""
    labelled = _labelled(blocks)
    return {name: torch.tensor([block[name] for block in labelled]) for name in ("input_ids", "labels")}


def _labelled(examples: list[Batch]) -> list[Batch]:
    return [{"input_ids": row["input_ids"], "labels": row.get("labels") or row["input_ids"]} for row in examples]


class PaddingCollator:
    """Collator that pads examples to the longest; the loss ignores padding."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE_INDEX)

    def __call__(self, examples: list[Batch]) -> Batch:
        """Returns a batch with an attention mask."""
        return dict(self.collator(_labelled(examples)))


class DeterministicMasking(DataCollatorForLanguageModeling):
    """Collator for masked language modeling, whose masks depend on the examples only."""

    def __call__(self, blocks: list[Batch], return_tensors: str | None = None) -> Batch:
        """Returns a masked batch."""
        blocks = [{"input_ids": block["input_ids"]} for block in blocks]
        tokens = torch.tensor([token for block in blocks for token in block["input_ids"]])
        self.generator = torch.Generator().manual_seed(int((tokens * torch.arange(len(tokens))).sum()))
        batch: Batch = super().__call__(blocks, return_tensors)
        return batch


def draw(rows: int, count: int, seed: int = 0) -> list[int]:
    """Draws `count` random row numbers, sorted, from data that may be sorted by label."""
    return sorted(torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count].tolist())
