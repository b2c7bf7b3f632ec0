"""A LightningDataModule over `datasets` for classifiers of images."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
from torch.utils.data import default_collate
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from billhook.arguments import check_types
from billhook.calibration.examples import Batch, label_ids
from billhook.calibration.reading import Data, Rows, Table, check_columns
from billhook.model.preprocessors import load_preprocessor
from billhook.training.dataset_module import LabelledModule, numbers_of

RGB = datasets.Image(mode="RGB")
"""Images of any kind, read in three colours."""


class ImageDataModule(LabelledModule):
    """Images with a label each, prepared by an image processor of transformers when they are loaded.

    Args:
        data: A folder of images (`train/cat/1.png`, `validation/dog/2.png`, or `cat/1.png` alone), a hub name (`"name"` or
            `"name:config"`), a .parquet file or a glob of such, or files by split; in Python also a `Dataset` or `DatasetDict` of
            `datasets`.
        processor: The name or folder of an image processor; by default the one saved with the model in training.
        image_column: The column of the image.
        label_column: The column of the label: whole numbers from 0, or words, which are numbered as the model's config does
            (`label2id`), or else in the order of the alphabet. The names are kept in the config, and so are exported.
        batch_size: Images in a batch, per device.
        seed: The order of the training images depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.
        validation: Share of the training rows, in [0, 1), that are held out, drawn by `seed`, to validate on where the data has
            no split `validation`. 0 for none.

    Raises:
        ValueError: If a file is empty or missing, a split has no such column, the column holds no images, there are more or fewer
            labels by name than the model has classes, or the model in training reads no images.

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
        self._processor: BaseImageProcessor | None = None

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

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a model that does not classify images."""
        if model.main_input_name != "pixel_values" or "Classification" not in type(model).__name__:
            raise ValueError(
                f"ImageDataModule: a {type(model).__name__} does not classify images: train a classifier of images "
                "(task='image-classification')"
            )

    def encode(self, rows: Rows, split: str) -> Rows:
        """Returns rows of image and label that become pixels and a number when they are read."""
        check_columns(rows, split, self.image_column, self.label_column)
        if not isinstance(rows, datasets.Dataset):
            raise ValueError("data: images are not read from a stream: give a folder, files or a Dataset")
        try:
            pictures = rows.select_columns([self.image_column, self.label_column]).cast_column(self.image_column, RGB)
        except (TypeError, ValueError, NotImplementedError) as error:  # as arrow has them
            raise ValueError(f"image_column='{self.image_column}' of the split '{split}' holds no images: {error}") from error
        numbers = numbers_of(pictures, self.label_column, self.label2id)
        columns = (self.image_column, self.label_column)
        return pictures.with_transform(partial(pixels_and_labels, self.image_processor, columns, numbers))

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the function that makes a batch of examples."""
        collate: Callable[[list[Batch]], Batch] = default_collate
        return collate


def pixels_and_labels(
    processor: BaseImageProcessor,
    columns: tuple[str, str],
    numbers: Mapping[Any, int] | None,
    rows: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """Returns `pixel_values`, float32 `[rows, channels, height, width]` as a rule, and `labels` of rows that are read.

    Args:
        processor: The image processor.
        columns: Those of the image and the label.
        numbers: Of each label as it stands there; None where it is the number.
        rows: The rows.
    """
    images, labels = (rows[column] for column in columns)
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": label_ids(labels, columns[1], numbers)}
