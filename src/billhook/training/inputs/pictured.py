"""The part that data modules of images share: an image processor, and what changes training images."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
from transformers import AutoImageProcessor, BaseImageProcessor

from billhook.calibration.reading import Rows, check_columns
from billhook.model.preprocessors import load_preprocessor
from billhook.training.dataset_module import DatasetModule
from billhook.training.inputs.augmented import Augmented

RGB = datasets.Image(mode="RGB")
"""Images of any kind, read in three colours."""


class PicturedModule(DatasetModule):
    """Base of the data modules of images.

    Attributes:
        processor_name: A name or folder; None where the image processor is the one saved with the model in training.
        image_column: The column of the image.
        augment: Transforms of training images.
    """

    processor_name: str | None = None
    image_column: str
    augment: Sequence[Callable[[Any], Any]] = ()
    _processor: BaseImageProcessor | None = None

    @property
    def image_processor(self) -> BaseImageProcessor:
        """The image processor, loaded when first asked for."""
        if self._processor is None:
            name = self.processor_name or self.name_of_model("processor")
            loaded = load_preprocessor(name, AutoImageProcessor)
            if not isinstance(loaded, BaseImageProcessor):
                raise ValueError(f"processor={name!r}: a {type(loaded).__name__} prepares no images")
            self._processor = loaded
        return self._processor

    def pictures(self, rows: Rows, split: str, other: str) -> datasets.Dataset:
        """Returns rows of an image in three colours and of another column."""
        check_columns(rows, split, self.image_column, other)
        if not isinstance(rows, datasets.Dataset):
            raise ValueError("data: images are not read from a stream: give a folder, files or a Dataset")
        try:
            return rows.select_columns([self.image_column, other]).cast_column(self.image_column, RGB)
        except (TypeError, ValueError, NotImplementedError) as error:  # as arrow has them
            raise ValueError(f"image_column='{self.image_column}' of the split '{split}' holds no images: {error}") from error

    @abstractmethod
    def preparation(self, rows: Rows) -> Callable[[Mapping[str, Sequence[Any]]], dict[str, Any]]:
        """Returns what makes examples of rows that are read."""

    def examples(self, split: str) -> Any:  # noqa: ANN401 - what a DataLoader reads by number
        """Returns the examples of a split, those of `train` with what `augment` changes."""
        rows: Any = self.splits[split]
        if split != "train" or not self.augment:
            return rows
        return Augmented(rows.with_format(None), self.image_column, self.augment, self.preparation(rows), self.seed)
