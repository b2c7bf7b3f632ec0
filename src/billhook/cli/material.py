"""What one-shot commands calibrate and measure on: text of a language model, labelled text of a classifier."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.assets import model_path
from billhook.cli.prune import length_of, perplexity, splits_of
from billhook.training.data import ClassificationDataModule, DatasetModule, TextDataModule
from billhook.training.rows import Data


class Material:
    """Examples to calibrate on (split train) and to measure on (split test, or else validation).

    Args:
        model: The model, which says whether it is a classifier and how much it reads.
        name: Its name or folder, for the tokenizer.
        data: "tiny", a hub name, a folder, or files by split.
        column: The column that holds the text.
        label_column: The column that holds a classifier's labels.
        length: Tokens of an example; by default 512, or as many as the model reads.
        batch_size: Examples in a batch.

    Raises:
        ValueError: If there is nothing to calibrate on, or the model does not read so many tokens.

    Attributes:
        metric: What is measured: `"perplexity"` or `"accuracy"`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        data: Data,
        column: str = "text",
        label_column: str = "label",
        length: int | None = None,
        batch_size: int = 8,
    ) -> None:
        self.length, self.data, self.batch_size = length_of(model, length, longest=512), data, batch_size
        self.metric = "accuracy" if "Classification" in type(model).__name__ else "perplexity"
        self._given: DatasetModule = (
            ClassificationDataModule(data, model_path(name), [column], label_column, self.length, batch_size)
            if self.metric == "accuracy"
            else TextDataModule(data, model_path(name), block_size=self.length, column=column)
        )
        self._train, self._held_out = splits_of(self._given)

    def batches(self, examples: int, seed: int) -> list[dict[str, Tensor]]:
        """Batches of some examples, drawn by a seed."""
        order = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(seed))[:examples]
        return list(self._batches(self._train, order.tolist()))

    def said(self, examples: int, seed: int) -> dict[str, Any]:
        """What `batches` were made of, for a record."""
        number = min(examples, len(self._train))
        return {"data": self.data, "examples": number, "length": self.length, "batch_size": self.batch_size, "seed": seed}

    def measure(self, model: PreTrainedModel, examples: int) -> float | None:
        """The metric on the first examples; None of a model that has none, and of no examples."""
        if self.metric == "perplexity":
            return perplexity(model, self._held_out, examples)
        return self._accuracy(model, examples)

    @torch.no_grad()
    def _accuracy(self, model: PreTrainedModel, examples: int) -> float | None:
        """The share of the first examples whose label has the highest logit."""
        if self._held_out is None or not examples:
            return None
        numbers, right = range(min(examples, len(self._held_out))), 0
        for batch in self._batches(self._held_out, numbers):
            labels = batch.pop("labels")
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
            right += int((logits.argmax(-1).cpu() == labels).sum())
        return right / len(numbers)

    def _batches(self, rows: Any, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:  # noqa: ANN401 - `datasets` types rows as a list too
        collate = self._given.collate()
        for start in range(0, len(numbers), self.batch_size):
            yield dict(collate([rows[number] for number in numbers[start : start + self.batch_size]]))
