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
    not apart. If the full tokenizer encodes a text otherwise, as that of a row that begins inside a word, each of its removed
    tokens is encoded alone. Rows are cut at their former length. Labels stay with their text.

    Args:
        tokenizer: The tokenizer of the batches.
        kept: The remaining ids, ascending.

    Attributes:
        tokenizer: The tokenizer with only these ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> None:
        vocabulary = Vocabulary(tokenizer)
        self._full, self.tokenizer = tokenizer, vocabulary.without(np.array(kept))
        self._tokens = {number: token for token, number in vocabulary.ids.items()}
        self._new = {old: number for number, old in enumerate(kept)}
        self._model: Any = getattr(self.tokenizer, "backend_tokenizer").model  # noqa: B009 - of fast tokenizers
        pad: Any = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        self._pad = int(pad or 0)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a batch with new `input_ids`, `attention_mask`, and `labels`.

        Raises:
            ValueError: If another entry has a number for each token, or labels are other tokens than the inputs.
        """
        ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
        if labels is not None and (labels.shape != ids.shape or bool(((labels != ids) & (labels != IGNORED)).any())):
            raise ValueError("tokens: labels are other tokens than the inputs, so they do not follow to a smaller vocabulary.")
        for name, value in batch.items():
            known = name in ("input_ids", "attention_mask", "labels")
            if not known and isinstance(value, Tensor) and value.shape == ids.shape:
                raise ValueError(f"tokens: batches have {name} for each token, which does not follow to a smaller vocabulary.")
        rows = []
        for row, targets, real in zip(
            ids,
            torch.zeros_like(ids) if labels is None else labels,
            torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool(),
            strict=True,
        ):
            rows.append(self._row(row[real].tolist(), (targets[real] == IGNORED).tolist(), len(row)))
        width = max(len(row) for row, _ in rows) if mask is not None else ids.shape[1]
        changed = {"input_ids": self._padded([row for row, _ in rows], width, self._pad).to(ids)}
        if mask is not None or any(len(row) < width for row, _ in rows):
            changed["attention_mask"] = self._padded([[1] * len(row) for row, _ in rows], width, 0).to(
                ids if mask is None else mask
            )
        if labels is not None:
            changed["labels"] = self._padded([target for _, target in rows], width, IGNORED).to(ids)
        return {**batch, **changed}

    def _row(self, ids: list[int], ignored: list[bool], length: int) -> tuple[list[int], list[int]]:
        """Returns the new ids and labels of a row, without padding."""
        new, labels, start = list[int](), list[int](), 0
        for end in range(1, len(ids) + 1):
            if end < len(ids) and ignored[end] == ignored[start]:
                continue
            spelled = self._spelled(ids[start:end])
            new += spelled
            labels += [IGNORED] * len(spelled) if ignored[start] else spelled
            start = end
        return new[:length], labels[:length]

    def _spelled(self, ids: list[int]) -> list[int]:
        """Returns the new ids of a text."""
        if not all(token in self._new for token in ids):
            text = self._full.decode(ids, clean_up_tokenization_spaces=False)
            if self._full(text, add_special_tokens=False)["input_ids"] == ids:
                spelled: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
                return spelled
        spelled = []
        for token in ids:
            spelled += [self._new[token]] if token in self._new else self._alone(self._tokens.get(token, ""))
        return spelled

    def _alone(self, token: str) -> list[int]:
        """Returns the ids of the tokens that spell a removed one."""
        suffix = getattr(self._model, "end_of_word_suffix", None) or ""
        if not token.endswith(suffix):  # encoding would end a word
            return [self._model.token_to_id(character) for character in token]
        return [piece.id for piece in self._model.tokenize(token.removesuffix(suffix))]

    @staticmethod
    def _padded(rows: list[list[int]], width: int, value: int) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])
