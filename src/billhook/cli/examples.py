"""The data that one-shot commands calibrate and measure on: their options, and tables with labels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from billhook.arguments import check_fraction, check_int
from billhook.calibration.generated import DEFAULT_LENGTH, GENERATED
from billhook.calibration.reading import Data, check_available
from billhook.engine.batches import Batch
from billhook.model.config_fields import text_config
from billhook.private_paths import without_folders
from billhook.training.data import ClassificationDataModule
from billhook.training.dataset_module import DatasetModule, draw
from billhook.training.images import ImageDataModule

EXAMPLES = 128
"""How many examples of a text scores are taken from, if no number is asked for."""
NONE = "no text, as it needs none"
"""What is said of a method that is shown nothing."""


@dataclass(frozen=True)
class Text:
    """Text to calibrate and to measure on, and the place to compute.

    Args:
        data: What scores are taken from (split train) and what is measured on (split test, or else validation, or else other
            rows): "generated", which is what the model itself writes, "tiny", a file or a glob, a hub name, a folder, or files by
            split, as in '{train: a.txt, test: b.txt}'; or several, as in `generated a.txt`, of equal shares. By default what
            the model writes. For a classifier, tables with a text and a label; of images, a folder of these by class, or
            such tables as `.parquet` files.
        also: Files of other text to measure on.
        tokenizer: The folder or hub name of the tokenizer, if `model` has none: texts are read by it, and it is saved along.
        column: The column that holds the text; without it, chats in `messages` or `conversations`, or
            `prompt` and `response`, are read.
        length: Tokens of an example; by default as many as the model reads, but at most 512, or 2048 for `prune` with `data`.
        examples: Examples that scores are taken from, drawn by `seed`; by default 128, as in most papers, or 40 that the model
            writes.
        generated: Share of the examples that the model writes beside the texts of `data`, in [0, 1); they share the rest equally.
            By default a quarter where linears are refitted, so that they do not serve these texts alone, and otherwise none. Not
            with "generated" among `data`, which then has an equal share.
        batch_size: Examples in a batch.
        evaluate: Examples of each text that are measured on: perplexity, or accuracy; 0 for none.
        seed: Which examples are drawn.
        dtype: Of the weights: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: Where it is computed: "auto" takes an accelerator if there is one with float64, which Apple's lack. Of a streamed
            model, blocks compute there, one at a time; with "auto" on the CPU.
        stream: Whether the model stays in its files: blocks are read when they compute, one at a time, and written as soon as
            they have changed; stopped and called again, the command goes on where it was.
        memory: How much memory the process may take with `stream`, such as "8GiB", beside pages of files, which the system takes
            back when it needs the room: what the model's modules give lies in files next to `out` if it does not fit; by default
            it stays in memory.

    Raises:
        ValueError: If a number is out of range.
    """

    longest: ClassVar[int] = 2048

    data: Data | list[Data] | None = None
    also: list[str] | None = None
    tokenizer: str | None = None
    column: str = "text"
    length: int | None = None
    examples: int | None = None
    generated: float | None = None
    batch_size: int = 1
    evaluate: int = 64
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    stream: bool = False
    memory: str | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and not self.stream:
            raise ValueError(f"memory={self.memory!r} says how much a streamed model may take: give stream, too")
        check_int("examples", 1 if self.examples is None else self.examples)
        check_int("batch_size", self.batch_size)
        check_int("evaluate", self.evaluate, 0)
        if self.generated is not None:
            check_fraction("generated", self.generated, "[0, 1)")
            if self.generated and not self.alone:
                raise ValueError(f"generated={self.generated} is what the model writes beside texts, and data={self.data!r}")

    @property
    def alone(self) -> bool:
        """Tells whether texts are given, and the model's own text is none of them."""
        return self.data is not None and GENERATED not in (self.data if isinstance(self.data, list) else [self.data])

    def check_there(self) -> None:
        """Refuses texts that are not there."""
        for name, sources in (("data", self.data), ("also", self.also)):
            for source in sources if isinstance(sources, list) else [sources]:
                if source not in (None, GENERATED):
                    check_available(source, name)

    def length_for(self, model: PreTrainedModel) -> int:
        """Returns how many tokens an example has."""
        most: int | None = getattr(text_config(model.config), "max_position_embeddings", None)
        if self.length is None:
            longest = self.longest if self.data is not None else DEFAULT_LENGTH
            return min(longest, most or longest)
        if self.length < 2 or (most and self.length > most):
            raise ValueError(f"length={self.length} must be in 2..{most or 'any'}: the model reads no more tokens at once")
        return self.length


@dataclass(frozen=True)
class Pictures(Text):
    """Text, or images with labels for a classifier of these, to calibrate and to measure on, and the place to compute.

    Args:
        label_column: The column that holds a classifier's labels: whole numbers from 0, or words, numbered as its config does it.
    """

    label_column: str = "label"


@dataclass(frozen=True)
class Examples(Pictures):
    """Text or images, with labels for a classifier, to calibrate and to measure on, and the place to compute."""

    longest: ClassVar[int] = 512

    batch_size: int = 8


IMAGE = "image"
"""The column of images, where no other is asked for."""


class Labelled:
    """A table of texts, or images, with labels, which is read once it is needed.

    Args:
        examples: It names the table.
        model: The classifier.
        preprocessor: The folder of its tokenizer, or image processor.
        length: The most tokens of an example.
    """

    def __init__(self, examples: Text, model: PreTrainedModel, preprocessor: str, length: int) -> None:
        self.examples, self.model, self.preprocessor, self.length = examples, model, preprocessor, length

    @cached_property
    def data(self) -> DatasetModule:
        """The table, by splits; it needs one to calibrate on."""
        examples = self.examples
        if not isinstance(examples, Pictures) or examples.data is None or isinstance(examples.data, list):
            what = "images" if self.of_images else "texts"
            raise ValueError(f"data={examples.data!r}: a {type(self.model).__name__} needs one table with {what} and labels")
        data: DatasetModule
        if self.of_images:
            column = IMAGE if examples.column == Text.column else examples.column
            data = ImageDataModule(examples.data, self.preprocessor, column, examples.label_column, examples.batch_size)
        else:
            columns, size = [examples.column], examples.batch_size
            data = ClassificationDataModule(examples.data, self.preprocessor, columns, examples.label_column, self.length, size)
        data.read(self.model)
        if "train" not in data.splits:
            raise ValueError(f"data: calibration needs a split 'train'; there is {', '.join(data.splits)}")
        return data

    @property
    def is_classifier(self) -> bool:
        """True for a classifier of any kind."""
        return "Classification" in type(self.model).__name__

    @property
    def of_images(self) -> bool:
        """True for a classifier of images."""
        return self.is_classifier and self.model.main_input_name == "pixel_values"

    @property
    def count(self) -> int:
        """How many examples are shown, if there are as many."""
        return self.examples.examples or EXAMPLES

    @property
    def split(self) -> str:
        """The split that is measured on."""
        return "test" if "test" in self.data.splits else "validation"

    def shown(self) -> Iterator[Batch]:
        """Draws the examples to calibrate on."""
        rows: Any = self.data.splits["train"]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.examples.seed))
        return self._batched(rows, order[: self.count].tolist())

    def measured(self) -> Iterator[Batch] | None:
        """Draws the examples to measure on; None where there is no split for that."""
        rows: Any = self.data.splits.get(self.split)
        return None if rows is None else self._batched(rows, self.drawn)

    @property
    def drawn(self) -> list[int]:
        """The numbers of the examples that are measured on, as many as are asked for where there are so many."""
        return draw(len(self.data.splits.get(self.split, ())), self.examples.evaluate, self.examples.seed)

    def loader(self, batch_size: int, chance: torch.Generator) -> DataLoader[Any]:
        """Returns what is trained on, shuffled."""
        rows: Any = self.data.splits["train"]
        return DataLoader(rows, batch_size, shuffle=True, collate_fn=self.data.collate(), generator=chance)

    def to_json(self) -> dict[str, Any]:
        """Says what is calibrated on."""
        rows: Any = self.data.splits["train"]
        read = {"data": without_folders(self.examples.data), "examples": min(self.count, len(rows))} | (
            {} if self.of_images else {"length": self.length}
        )
        return read | {"batch_size": self.examples.batch_size, "seed": self.examples.seed}

    def _batched(self, rows: Any, numbers: Sequence[int]) -> Iterator[Batch]:  # noqa: ANN401 - `datasets` types rows as a list too
        collate, size = self.data.collate(), self.examples.batch_size
        for start in range(0, len(numbers), size):
            yield Batch(collate([rows[number] for number in numbers[start : start + size]]))
