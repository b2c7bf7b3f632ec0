"""The frame of one-shot commands: load, calibrate, measure, change, measure, record, save, print."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.arguments import whole
from billhook.assets import model_path
from billhook.calibration.rows import Data, Rows
from billhook.checkpoints.place import check_target
from billhook.checkpoints.save import load, save
from billhook.cli.machine import device_of
from billhook.cli.metrics import accuracy, perplexity
from billhook.model.linears import prunable
from billhook.model.preprocessors import load_tokenizer
from billhook.running.offload import offloaded
from billhook.running.walk import find_sites
from billhook.training.data import ClassificationDataModule, TextDataModule
from billhook.training.dataset_module import DatasetModule


@dataclass(frozen=True)
class Text:
    """Text to calibrate and to measure on, and the place to compute.

    Args:
        data: What scores are taken from (split train) and the metric (split test, or else validation): "tiny", a hub name, a
            folder, or files by split, as in '{train: a.txt, test: b.txt}'. For a classifier, tables with a text and a label.
        column: The column that holds the text.
        length: Tokens of an example; by default as many as the model reads, but at most 512, or 2048 for `prune`.
        examples: Examples that scores are taken from, drawn by `seed`; most papers take 128.
        batch_size: Examples in a batch.
        evaluate: Examples on which the metric is taken, the first ones: perplexity, or accuracy; 0 for none.
        seed: Which examples are drawn.
        dtype: Of the weights: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: Where it is computed: "auto" takes an accelerator if there is one.

    Raises:
        ValueError: If a number is out of range.
    """

    longest: ClassVar[int] = 2048

    data: Data = "tiny"
    column: str = "text"
    length: int | None = None
    examples: int = 128
    batch_size: int = 1
    evaluate: int = 64
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        whole("examples", self.examples)
        whole("batch_size", self.batch_size)
        whole("evaluate", self.evaluate, 0)

    def length_for(self, model: PreTrainedModel) -> int:
        """Returns how many tokens an example has."""
        most: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if self.length is None:
            return min(self.longest, most or self.longest)
        if self.length < 2 or (most and self.length > most):
            raise ValueError(f"length={self.length} must be in 2..{most or 'any'}: the model reads no more tokens at once")
        return self.length


@dataclass(frozen=True)
class Examples(Text):
    """Text, with labels for a classifier, to calibrate and to measure on, and the place to compute.

    Args:
        label_column: The column that holds a classifier's labels, whole numbers from 0.
    """

    longest: ClassVar[int] = 512

    batch_size: int = 8
    label_column: str = "label"


class OneShot:
    """A checkpoint that becomes a smaller one, on the data that it is scored and measured on.

    With `offload` the model stays in the CPU's memory, and is measured block by block on the device.
    """

    def __init__(self, name: str, out: str, given: Text, offload: bool = False) -> None:
        check_target(out)
        self.name, self.out, self.given, self.device = name, out, given, device_of(given.device)
        self.model = load(name, given.dtype)
        self._visiting: list[nn.Module] = []
        if offload:
            self._visiting = [site.module for site in find_sites(self.model, prunable(self.model), "block")]
        else:
            self.model.to(self.device)  # type: ignore[arg-type]
        self.length = given.length_for(self.model)
        classifies = isinstance(given, Examples) and "Classification" in type(self.model).__name__
        self.metric = "accuracy" if classifies else "perplexity"

    @cached_property
    def _data(self) -> DatasetModule:
        """Data that is ready to be read; it needs a split to calibrate on."""
        given, path = self.given, model_path(self.name)
        data: DatasetModule = TextDataModule(given.data, path, block_size=self.length, column=given.column)
        if self.metric == "accuracy" and isinstance(given, Examples):
            data = ClassificationDataModule(given.data, path, [given.column], given.label_column, self.length, given.batch_size)
        data.setup("fit")
        if "train" not in data.splits:
            raise ValueError(f"data: calibration needs a split 'train'; there is {', '.join(data.splits)}")
        return data

    def batches(self) -> list[dict[str, Tensor]]:
        """Draws the batches to calibrate on."""
        rows: Any = self._data.splits["train"]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.given.seed))
        return list(self._batched(rows, order[: self.given.examples].tolist()))

    def measure(self) -> float | None:
        """Measures the metric on the first examples; None for a model that has none, and without examples."""
        splits, most = self._data.splits, self.given.evaluate
        held_out: Rows | None = splits.get("test", splits.get("validation"))
        with offloaded(self._visiting, self.device):
            if self.metric == "perplexity" or held_out is None:
                return perplexity(self.model, held_out, most)
            rows: Any = held_out
            return accuracy(self.model, self._batched(rows, range(min(most, len(rows)))))

    def save(self, before: float | None, record: Mapping[str, Any], *says: object) -> None:
        """Measures again, saves the model with a record of what was done, and prints `says` and both."""
        after, given = self.measure(), self.given
        rows: Any = self._data.splits["train"]
        calibration = {"data": given.data, "examples": min(given.examples, len(rows)), "length": self.length}
        calibration |= {"batch_size": given.batch_size, "seed": given.seed}
        figures = {"before": before, "after": after, "examples": given.evaluate}
        record = {**record, "calibration": calibration, self.metric: figures}
        saved = save(self.model, self.out, load_tokenizer(self.name), record)
        for line in says:
            print(line)
        if before is not None and after is not None:
            print(f"{self.metric} {before:,.4g} before, {after:,.4g} after")
        print(f"{saved.folder} ({saved.megabytes:.1f} MB): {saved.says}; largest difference of logits {saved.difference:.3g}")

    def _batched(self, rows: Any, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:  # noqa: ANN401 - `datasets` types rows as a list too
        collate, size = self._data.collate(), self.given.batch_size
        for start in range(0, len(numbers), size):
            yield dict(collate([rows[number] for number in numbers[start : start + size]]))
