"""A LightningDataModule over `datasets` for models that compare images with captions."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import default_collate
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from billhook.arguments import annotated, whole
from billhook.calibration.conversations import check_texts
from billhook.calibration.reading import Data, Rows, Table
from billhook.calibration.rows import Batch
from billhook.model.config_fields import text_config
from billhook.training.dataset_module import TokenizedModule
from billhook.training.images import PicturedModule


class CaptionDataModule(PicturedModule, TokenizedModule):
    """Images with a caption each, for models such as CLIP, which learn which caption belongs to which image of a batch.

    Args:
        data: A folder of images with a `metadata.jsonl` (`{"file_name": "1.png", "text": "A dog"}`), a hub name (`"name"` or
            `"name:config"`), a .parquet file or a glob of such, or files by split; in Python also a `Dataset` or `DatasetDict` of
            `datasets`.
        processor: The name or folder of an image processor and a tokenizer; by default those saved with the model in training.
        image_column: The column of the image.
        text_column: The column of the caption.
        max_length: Tokens of a caption: longer ones are cut, shorter ones padded. By default as many as the model reads.
        batch_size: Images in a batch, per device; each is told apart from the others there.
        seed: The order of the training images depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.
        validation: Share of the training rows, in [0, 1), that are held out, drawn by `seed`, to validate on where the data has
            no split `validation`. 0 for none.
        augment: Transforms of training images, as of `ImageDataModule`.

    Raises:
        ValueError: If a file is empty or missing, a split has no such column, the column holds no images, or the model in
            training does not compare images with captions.

    Example:
        >>> from billhook.training.captions import CaptionDataModule
        >>> data = CaptionDataModule("photos", processor="openai/clip-vit-base-patch32", batch_size=64)
        >>> data.image_column, data.text_column
        ('image', 'text')
    """

    def __init__(
        self,
        data: Data | Table,
        processor: str | None = None,
        image_column: str = "image",
        text_column: str = "text",
        max_length: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        validation: float = 0.05,
        augment: list[Callable[[Any], Any]] | None = None,
    ) -> None:
        annotated(CaptionDataModule, locals())
        super().__init__(data, batch_size, seed, num_workers, validation=validation)
        whole("max_length", 1 if max_length is None else max_length)
        whole("batch_size", batch_size, 2)  # a caption to tell from another
        self.processor_name = self.tokenizer_name = processor
        self.image_column, self.text_column, self.max_length = image_column, text_column, max_length
        self.augment, self._longest = augment or [], None

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a model that does not compare images with captions."""
        takes = inspect.signature(model.forward).parameters
        if not {"pixel_values", "input_ids", "return_loss"} <= takes.keys():
            raise ValueError(
                f"CaptionDataModule: a {type(model).__name__} does not compare images with captions: train a model such as CLIP "
                "(task='feature-extraction')"
            )
        self._longest = getattr(text_config(model.config), "max_position_embeddings", None)

    def encode(self, rows: Rows, split: str) -> Rows:
        """Returns rows of image and caption that become pixels and tokens when they are read."""
        pictures = self.pictures(rows, split, self.text_column)
        return pictures.with_transform(self.preparation(pictures))

    def preparation(self, rows: Rows) -> "Captioned":
        """Returns what makes pixels and tokens of rows."""
        length = self.max_length or self._longest or self.tokenizer.model_max_length
        return Captioned(self.image_processor, self.tokenizer, self.image_column, self.text_column, length)

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the function that makes a batch of examples, of which a model returns the loss."""
        return compared


def compared(examples: list[Batch]) -> Batch:
    """Makes a batch of which a model returns the loss."""
    batch: Batch = default_collate(examples)
    return batch | {"return_loss": True}


@dataclass(frozen=True)
class Captioned:
    """Makes pixels of images and tokens of captions of rows that are read."""

    processor: BaseImageProcessor
    tokenizer: PreTrainedTokenizerBase
    image_column: str
    text_column: str
    max_length: int

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Returns `pixel_values`, and the tokenizer's `input_ids` and `attention_mask`, `[rows, max_length]`."""
        texts = list(rows[self.text_column])
        check_texts(texts, self.text_column)
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt")
        pixels = self.processor(images=list(rows[self.image_column]), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, **tokens}
