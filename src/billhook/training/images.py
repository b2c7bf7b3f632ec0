"""LightningDataModule for image classification."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import datasets
from torch.utils.data import default_collate
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from billhook.arguments import check_types
from billhook.calibration.examples import Batch, label_ids
from billhook.calibration.reading import Data, Rows, Table, check_columns
from billhook.model import load_preprocessor
from billhook.training.dataset_module import LabeledModule, label_numbers

RGB = datasets.Image(mode="RGB")  # images of any mode, decoded to three channels


class ImageDataModule(LabeledModule):
    """Labeled images, preprocessed by a transformers image processor when they are loaded.

    Args:
        data: A folder of images (`train/cat/1.png`, `validation/dog/2.png`, or only `cat/1.png`), a Hub name (`"name"` or
            `"name:config"`), a .parquet file, a glob of such files, or files by split. In Python also a `Dataset` or
            `DatasetDict` of `datasets`.
        processor: Name or folder of an image processor. Defaults to the processor saved with the model in training.
        image_column: Column of the image.
        label_column: Column of the label: integers from 0, or names. Names are numbered by the model's config (`label2id`), or
            else alphabetically. They are stored in the config and exported with the model.
        batch_size: Number of images per batch and device.
        seed: Seed for the order of the training images, which depends only on it and the epoch.
        num_workers: Number of processes that load batches. 0 loads in the main process.
        validation: Fraction of the training rows, in [0, 1), to hold out for validation if the data has no split `validation`.
            Rows are drawn by `seed`. 0 holds out nothing.

    Raises:
        ValueError: If a file is empty or missing, a column is missing or contains no images, the number of label names differs
            from the model's number of classes, or the model in training does not classify images.

    Example:
        >>> import billhook as bh
        >>> data = bh.training.ImageDataModule("photos", processor="google/vit-base-patch16-224", batch_size=8)
        >>> data.image_column, data.label_column
        ('image', 'label')
    """

    def __init__(
        self,
        data: Data | Table,
        processor: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        validation: float = 0.05,
    ) -> None:
        check_types(ImageDataModule, locals())
        super().__init__(data, batch_size, seed, num_workers, validation=validation)
        self.processor_name, self.image_column, self.label_column = processor, image_column, label_column

    @cached_property
    def image_processor(self) -> BaseImageProcessor:
        """The image processor, loaded on first use.

        Raises:
            ValueError: If the processor is not for images.
        """
        name = self.processor_name or self.model_name("processor")
        loaded = load_preprocessor(name, AutoImageProcessor)
        if not isinstance(loaded, BaseImageProcessor):
            raise ValueError(f"processor={name!r} is not an image processor but {type(loaded).__name__}. Name another one.")
        return loaded

    def check(self, model: PreTrainedModel) -> None:
        """Raises an error for a model that does not classify images."""
        if model.main_input_name != "pixel_values" or "Classification" not in type(model).__name__:
            raise ValueError(
                f"ImageDataModule cannot train {type(model).__name__}, which does not classify images. Load the model with "
                "task='image-classification'."
            )

    def encode(self, rows: Rows, split: str) -> Rows:
        """Returns rows whose images and labels are converted to tensors on access.

        Raises:
            ValueError: If data is streamed, or the column has no images.
        """
        check_columns(rows, split, self.image_column, self.label_column)
        if not isinstance(rows, datasets.Dataset):
            raise ValueError("data: streaming is not supported for images. Pass a folder, files, or a Dataset.")
        try:
            images = rows.select_columns([self.image_column, self.label_column]).cast_column(self.image_column, RGB)
        except (TypeError, ValueError, NotImplementedError) as error:  # of arrow
            raise ValueError(f"image_column='{self.image_column}' of the split '{split}' contains no images: {error}") from error
        numbers = label_numbers(images, self.label_column, self.label2id)
        columns = (self.image_column, self.label_column)
        return images.with_transform(partial(pixels_and_labels, self.image_processor, columns, numbers))

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the collate function."""
        collate: Callable[[list[Batch]], Batch] = default_collate
        return collate


def pixels_and_labels(
    processor: BaseImageProcessor, columns: tuple[str, str], numbers: Mapping[Any, int] | None, rows: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """Converts rows to `pixel_values`, usually `[rows, 3, height, width]`, and `labels`.

    Args:
        processor: The image processor.
        columns: Columns of the image and of the label.
        numbers: Class number of each label value. None if the values are class numbers.
        rows: Rows to convert.
    """
    images, labels = (rows[column] for column in columns)
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": label_ids(labels, columns[1], numbers)}
