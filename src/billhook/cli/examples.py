"""Data options of one-shot commands, and labeled data for classifiers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from billhook.arguments import check_fraction, check_int
from billhook.calibration.calibration import MIXED
from billhook.calibration.examples import draw
from billhook.calibration.generated import DEFAULT_LENGTH, GENERATED
from billhook.calibration.reading import Data, check_available
from billhook.engine import Batch
from billhook.model import text_config
from billhook.private_paths import without_folders

if TYPE_CHECKING:
    from billhook.training.dataset_module import DatasetModule

IMAGE_COLUMN = "image"
"""Default column of images."""
EXAMPLES = 128
"""Default number of calibration examples from files."""


@dataclass(frozen=True)
class TextOptions:
    """Text for calibration and evaluation, and the device.

    Args:
        data: Calibration data (split train) and evaluation data (split test, else validation, else other examples): "generated"
            for self-generated text, "mixed" for packaged text of eight kinds, "tiny", a file or glob, a Hub name, a folder, files
            by split such as '{train: a.txt, test: b.txt}', or several of these with equal shares, such as `generated a.txt`. For
            a text classifier, a table with texts and labels. For an image classifier, a folder with one subfolder per class, or a
            table such as `.parquet` files. Defaults to "mixed" and "generated" in equal parts, or "mixed" with `stream`.
        also: Further text files to evaluate on.
        tokenizer: Folder or Hub name of the tokenizer, if `model` has none. It is saved with the result.
        column: Column of the text. Without it, chats in `messages` or `conversations`, or `prompt` and `response`, are used.
        length: Tokens per example. Defaults to the model's maximum, but at most 512, or 2048 for `prune` with `data`.
        examples: Number of calibration examples, drawn with `seed`. Defaults to 128, or 80 without `data`.
        supplement: Share of "mixed" and "generated" examples next to the texts of `data`, in [0, 1); only "mixed" with `stream`.
            Defaults to 0.5 if layers are refitted or KV heads are fitted, so that these texts are not all they fit, otherwise 0.
            Not with "mixed" or "generated" in `data`.
        batch_size: Examples per batch. Block-wise reconstruction of a language model always uses 1.
        evaluate: Number of examples of each text to measure perplexity or accuracy on. 0 disables it.
        seed: Seed for drawing examples and for self-generated text.
        dtype: Data type of the weights: "auto" (as saved), "float32", "bfloat16", or "float16".
        device: Device to compute on. "auto" uses an accelerator that supports float64 (Apple's do not), else the CPU. Blocks of
            a streamed model run there one at a time; with "auto" on the CPU.
        stream: If true, loads one block at a time from disk and writes it back once it has changed. If the command is
            interrupted, run it again to continue.
        memory: Memory limit of the process with `stream`, such as "8GiB", without file pages that the system can reclaim. Block
            outputs that do not fit are spilled to files next to `out`. Defaults to no limit.

    Raises:
        ValueError: If an option is out of range.
    """

    max_length: ClassVar[int] = 2048

    data: Data | list[Data] | None = None
    also: list[str] | None = None
    tokenizer: str | None = None
    column: str = "text"
    length: int | None = None
    examples: int | None = None
    supplement: float | None = None
    batch_size: int = 1
    evaluate: int = 64
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    stream: bool = False
    memory: str | None = None

    def __post_init__(self) -> None:
        if self.memory is not None and not self.stream:
            raise ValueError(f"memory={self.memory!r} requires stream=True. Add --stream, or remove --memory.")
        check_int("examples", 1 if self.examples is None else self.examples)
        check_int("batch_size", self.batch_size)
        check_int("evaluate", self.evaluate, 0)
        if self.supplement is not None:
            check_fraction("supplement", self.supplement, "[0, 1)")
            if self.supplement and not self.only_files:
                raise ValueError(
                    f"supplement={self.supplement} is a share next to text files, but data={self.data!r}. Pass a file with "
                    "--data, or remove --supplement."
                )

    @property
    def only_files(self) -> bool:
        """True if texts are given, and none of them is "mixed" or "generated"."""
        texts = self.data if isinstance(self.data, list) else [self.data]
        return self.data is not None and MIXED not in texts and GENERATED not in texts

    def check_sources(self) -> None:
        """Raises if a text does not exist."""
        for name, sources in (("data", self.data), ("also", self.also)):
            for source in sources if isinstance(sources, list) else [sources]:
                if source not in (None, GENERATED):
                    check_available(source, name)

    def length_for(self, model: PreTrainedModel) -> int:
        """Returns the number of tokens per example."""
        limit: int | None = getattr(text_config(model.config), "max_position_embeddings", None)
        if self.length is None:
            max_length = self.max_length if self.data is not None else DEFAULT_LENGTH
            return min(max_length, limit or max_length)
        if self.length < 2 or (limit and self.length > limit):
            legal = f"from 2 to {limit}, the model's maximum" if limit else "at least 2"
            raise ValueError(f"length={self.length} must be {legal}.")
        return self.length


@dataclass(frozen=True)
class LabeledOptions(TextOptions):
    """Text, or labeled images for an image classifier, and the device.

    Args:
        label_column: Column of a classifier's labels: integers from 0, or names, numbered as in the model's config.
    """

    label_column: str = "label"


@dataclass(frozen=True)
class Examples(LabeledOptions):
    """Text or images, with labels for a classifier, and the device."""

    max_length: ClassVar[int] = 512

    batch_size: int = 8


@dataclass(eq=False)
class LabeledData:
    """A table of labeled texts or images, loaded on first use.

    Args:
        options: Names the table.
        model: The classifier.
        preprocessor: Folder of its tokenizer or image processor.
        length: Maximum number of tokens per example.
    """

    options: TextOptions
    model: PreTrainedModel
    preprocessor: str
    length: int

    @cached_property
    def data(self) -> "DatasetModule":
        """The table by splits. It must have a split 'train'."""
        # Lightning, which takes seconds to import, is needed for tables alone
        from billhook.training.data import ClassificationDataModule
        from billhook.training.images import ImageDataModule

        options = self.options
        if not isinstance(options, LabeledOptions) or options.data is None or isinstance(options.data, list):
            kind, what = type(self.model).__name__, "images" if self.of_images else "texts"
            raise ValueError(f"data={options.data!r}: {kind} needs one table of labeled {what}. Pass it with --data.")
        data: DatasetModule
        if self.of_images:
            column = IMAGE_COLUMN if options.column == TextOptions.column else options.column
            data = ImageDataModule(options.data, self.preprocessor, column, options.label_column, options.batch_size)
        else:
            columns, size = [options.column], options.batch_size
            data = ClassificationDataModule(options.data, self.preprocessor, columns, options.label_column, self.length, size)
        data.read(self.model)
        if "train" not in data.splits:
            raise ValueError(f"data={options.data!r} has no split 'train' to calibrate on, only {', '.join(data.splits)}.")
        return data

    @property
    def is_classifier(self) -> bool:
        """True for a classifier of texts or images."""
        return "Classification" in type(self.model).__name__

    @property
    def of_images(self) -> bool:
        """True for an image classifier."""
        return self.is_classifier and self.model.main_input_name == "pixel_values"

    @property
    def count(self) -> int:
        """Number of calibration examples, if the split is long enough."""
        return self.options.examples or EXAMPLES

    @property
    def split(self) -> str:
        """The evaluation split."""
        return "test" if "test" in self.data.splits else "validation"

    def source(self, split: str) -> str:
        """Names the data and a split, such as "reviews.csv, split 'train'"."""
        data = self.options.data
        files = data.get(split, data.get("train")) if isinstance(data, dict) else data  # validation may be a part of train
        names = without_folders(files if isinstance(files, list) else [files])
        return f"{' + '.join(map(str, names))}, split '{split}'"

    def used(self, calibrates: bool, evaluates: bool) -> list[str]:
        """Returns lines on the calibration and evaluation data."""
        lines = []
        if calibrates:
            lines.append(f"Calibration data: {self.source('train')}, {self.to_json()['examples']} examples")
        if evaluates:
            lines.append(f"Evaluation data: {self.source(self.split)}, {len(self.measured_rows)} examples")
        return lines

    def calibration_batches(self) -> Iterator[Batch]:
        """Draws the calibration examples."""
        rows: Any = self.data.splits["train"]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.options.seed))
        return self._batches(rows, order[: self.count].tolist())

    def measured_batches(self) -> Iterator[Batch] | None:
        """Returns the evaluation examples, or None without an evaluation split."""
        rows: Any = self.data.splits.get(self.split)
        return None if rows is None else self._batches(rows, self.measured_rows)

    @property
    def measured_rows(self) -> list[int]:
        """Numbers of the evaluation examples."""
        return draw(len(self.data.splits.get(self.split, ())), self.options.evaluate, self.options.seed)

    def training_loader(self, batch_size: int, generator: torch.Generator) -> DataLoader[Any]:
        """Returns the training split, shuffled."""
        rows: Any = self.data.splits["train"]
        return DataLoader(rows, batch_size, shuffle=True, collate_fn=self.data.collate(), generator=generator)

    def to_json(self) -> dict[str, Any]:
        """Returns the calibration settings for the record."""
        rows: Any = self.data.splits["train"]
        settings = {"data": without_folders(self.options.data), "examples": min(self.count, len(rows))}
        if not self.of_images:
            settings["length"] = self.length
        return settings | {"batch_size": self.options.batch_size, "seed": self.options.seed}

    def _batches(self, rows: Any, numbers: Sequence[int]) -> Iterator[Batch]:  # noqa: ANN401 - `datasets` types rows as a list too
        collate, size = self.data.collate(), self.options.batch_size
        for start in range(0, len(numbers), size):
            yield Batch(collate([rows[number] for number in numbers[start : start + size]]))
