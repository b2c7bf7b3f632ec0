"""Batches of a larger vocabulary, in the tokens that are left of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from billhook.vocabulary.tokenizer import Vocabulary

IGNORED = -100
"""Label of a token that is not in the loss."""


class Respelling:
    """Rewrites batches of token ids for a tokenizer that lost tokens.

    Rows without removed tokens get new ids. Other rows are decoded and encoded again, where labels are ignored and where they are
    not apart, and cut at their former length. Labels stay with their text.

    Args:
        tokenizer: The tokenizer of the batches.
        kept: The remaining ids, ascending.

    Attributes:
        tokenizer: The tokenizer with only these ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> None:
        self._full, self.tokenizer = tokenizer, Vocabulary(tokenizer).without(np.array(kept))
        self._new = {old: number for number, old in enumerate(kept)}
        pad: Any = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        self._pad = int(pad or 0)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a batch with new `input_ids`, `attention_mask`, and `labels`.

        Raises:
            ValueError: If an entry has a number for each token that cannot be rewritten, or labels are other tokens than the
                inputs, as for masked language models.
        """
        ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
        aligned = isinstance(labels, Tensor) and labels.shape == ids.shape and bool(((labels == ids) | (labels == IGNORED)).all())
        known = {"input_ids", "attention_mask", "labels"}
        for name, value in batch.items():
            if name not in known and isinstance(value, Tensor) and value.shape == ids.shape:
                raise ValueError(f"tokens: batches have {name} for each token, which does not follow to a smaller vocabulary.")
        rows = self._rows(ids, mask, labels if isinstance(labels, Tensor) and aligned else torch.zeros_like(ids))
        width = max(len(row) for row, _ in rows) if mask is not None else ids.shape[1]
        changed = {"input_ids": self._padded([row for row, _ in rows], width, self._pad).to(ids)}
        if mask is not None or any(len(row) < width for row, _ in rows):
            changed["attention_mask"] = self._padded([[1] * len(row) for row, _ in rows], width, 0).to(
                ids if mask is None else mask
            )
        if aligned:
            changed["labels"] = self._padded([target for _, target in rows], width, IGNORED).to(ids)
        elif isinstance(labels, Tensor) and labels.dim() == 2:
            if labels.shape == ids.shape:
                raise ValueError(
                    "tokens: labels are other tokens than the inputs, so they do not follow to a smaller vocabulary."
                )
            targets = [row for row, _ in self._rows(labels, labels != IGNORED, torch.zeros_like(labels))]
            changed["labels"] = self._padded(targets, max(map(len, targets)), IGNORED).to(labels)
        return {**batch, **changed}

    def _rows(self, ids: Tensor, mask: Tensor | None, labels: Tensor) -> list[tuple[list[int], list[int]]]:
        """Returns the new ids and labels of each row, without padding."""
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = list[tuple[list[int], list[int]]]()
        for row, targets, real in zip(ids, labels, keep, strict=True):
            rows.append(self._row(row[real].tolist(), (targets[real] == IGNORED).tolist(), len(row)))
        return rows

    def _row(self, ids: list[int], ignored: list[bool], length: int) -> tuple[list[int], list[int]]:
        new, labels, start = list[int](), list[int](), 0
        for end in range(1, len(ids) + 1):
            if end < len(ids) and ignored[end] == ignored[start]:
                continue
            part = ids[start:end]
            if all(token in self._new for token in part):
                spelled = [self._new[token] for token in part]
            else:
                text = self._full.decode(part, clean_up_tokenization_spaces=False)
                spelled = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            new += spelled
            labels += [IGNORED] * len(spelled) if ignored[start] else spelled
            start = end
        return new[:length], labels[:length]

    @staticmethod
    def _padded(rows: list[list[int]], width: int, value: int) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])
