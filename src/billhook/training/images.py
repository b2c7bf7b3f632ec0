"""A LightningDataModule over `datasets` for classifiers of images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import default_collate
from transformers import BaseImageProcessor, PreTrainedModel

from billhook.arguments import annotated
from billhook.calibration.reading import Data, Rows, Table
from billhook.calibration.rows import Batch, numbered
from billhook.training.inputs.pictured import PicturedModule
from billhook.training.labelled import LabelledModule
from billhook.training.labels import numbers_of


class ImageDataModule(LabelledModule, PicturedModule):
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
        augment: Transforms of training images, called with an image of PIL before the processor is: those of torchvision, as in
            `[{class_path: torchvision.transforms.v2.TrivialAugmentWide}]` (`pip install torchvision`), or functions of your own.
            What they draw with torch depends on `seed`, the epoch and the image alone.

    Raises:
        ValueError: If a file is empty or missing, a split has no such column, the column holds no images, there are more or fewer
            labels by name than the model has classes, or the model in training reads no images.

    Example:
        >>> import billhook as bh
        >>> data = bh.ImageDataModule("photos", processor="google/vit-base-patch16-224", batch_size=8)
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
        augment: list[Callable[[Any], Any]] | None = None,
    ) -> None:
        annotated(ImageDataModule, locals())
        super().__init__(data, batch_size, seed, num_workers, validation=validation)
        self.processor_name, self.image_column, self.label_column = processor, image_column, label_column
        self.augment = augment or []

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a model that does not classify images."""
        if model.main_input_name != "pixel_values" or "Classification" not in type(model).__name__:
            raise ValueError(
                f"ImageDataModule: a {type(model).__name__} does not classify images: train a classifier of images "
                "(task='image-classification')"
            )

    def encode(self, rows: Rows, split: str) -> Rows:
        """Returns rows of image and label that become pixels and a number when they are read."""
        pictures = self.pictures(rows, split, self.label_column)
        return pictures.with_transform(self.preparation(pictures))

    def preparation(self, rows: Rows) -> "Prepared":
        """Returns what makes pixels and numbers of rows."""
        numbers = numbers_of(rows, self.label_column, self.label2id)
        return Prepared(self.image_processor, self.image_column, self.label_column, numbers)

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the function that makes a batch of examples."""
        collate: Callable[[list[Batch]], Batch] = default_collate
        return collate


@dataclass(frozen=True)
class Prepared:
    """Makes pixels and numbers of labels of rows that are read.

    Args:
        processor: The image processor.
        image_column: The column of the image.
        label_column: The column of the label.
        numbers: Of each label as it stands there; None where it is the number.
    """

    processor: BaseImageProcessor
    image_column: str
    label_column: str
    numbers: Mapping[Any, int] | None

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Returns `pixel_values`, float32 `[rows, channels, height, width]` as a rule, and `labels`."""
        pixels = self.processor(images=list(rows[self.image_column]), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": numbered(rows[self.label_column], self.label_column, self.numbers)}
