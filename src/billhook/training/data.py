"""LightningDataModules over `datasets`: text packed into blocks, sequence classification, sequence to sequence."""

from collections.abc import Callable

import datasets
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel

from billhook.arguments import annotated, fraction, whole
from billhook.calibration.rows import (
    Batch,
    Data,
    Rows,
    SteadyMasking,
    blocks_to_batch,
    check_columns,
    classify,
    map_rows,
    pack,
    runs_on,
    translate,
)
from billhook.training.dataset_module import DatasetModule


class TextDataModule(DatasetModule):
    """Text for language models, tokenised and packed into blocks of equal length.

    Each row of a hub data set, .jsonl, .csv or .parquet file is one document, and the tokenizer's end-of-sequence token
    (or separator) ends it; the lines of a .txt file run on. Null and blank rows do not count. Tokens that do not fill a block
    at the end of 10,000 rows are left out.

    Args:
        data: `"tiny"` (the embedded text), a hub name (`"name"` or `"name:config"`), a folder, or local files by split.
        tokenizer: A name or folder; by default the tokenizer saved with the model in training.
        block_size: Tokens in a block.
        batch_size: Blocks in a batch, per device.
        column: The column that holds the text.
        mlm_probability: Share of the tokens to mask, for masked language models; 0 for all others. A batch of the same
            blocks is always masked alike, so that figures before and after can be compared.
        seed: The order of the training blocks depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.
        streaming: Read while training instead of preparing and caching everything first.

    Raises:
        ValueError: If a file is empty or missing, a split has no such column, or the text is shorter than one block.

    Example:
        >>> import billhook as bh
        >>> data = bh.TextDataModule("text.jsonl", tokenizer="tiny", block_size=128, batch_size=4)
        >>> data.block_size, data.data
        (128, 'text.jsonl')
    """

    def __init__(
        self,
        data: Data = "tiny",
        tokenizer: str | None = None,
        block_size: int = 256,
        batch_size: int = 8,
        column: str = "text",
        mlm_probability: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
        streaming: bool = False,
    ) -> None:
        annotated(TextDataModule, locals())
        super().__init__(data, tokenizer, batch_size, seed, num_workers, streaming)
        whole("block_size", block_size, 2)  # a token to read and one to predict
        fraction("mlm_probability", mlm_probability)
        self.block_size, self.column, self.mlm_probability = block_size, column, mlm_probability

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a classifier, whose labels are no tokens."""
        if "Classification" in type(model).__name__:
            raise ValueError(
                f"TextDataModule: a {type(model).__name__} does not predict tokens: give it a ClassificationDataModule"
            )

    def encode(self, rows: Rows, split: str) -> Rows:
        """Turns rows of text into rows of `block_size` token ids."""
        check_columns(rows, split, self.column)
        arguments = {"block_size": self.block_size, "column": self.column, "documents": not runs_on(rows)}
        blocks = map_rows(rows, pack, split, self.tokenizer, **arguments)
        if isinstance(blocks, datasets.Dataset) and len(blocks) == 0:
            raise ValueError(f"block_size={self.block_size} is longer than the whole text of the split '{split}'")
        return blocks

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the function that makes a batch of blocks, masked with `mlm_probability`."""
        if not self.mlm_probability:
            return blocks_to_batch
        if self.tokenizer.mask_token is None:
            raise ValueError(f"mlm_probability={self.mlm_probability}: the tokenizer has no mask token")
        return SteadyMasking(self.tokenizer, mlm_probability=self.mlm_probability)


class ClassificationDataModule(DatasetModule):
    """Texts, or pairs of texts, with a label each.

    Args:
        data: A hub name (`"name"` or `"name:config"`), a folder, or local files by split.
        tokenizer: A name or folder; by default the tokenizer saved with the model in training.
        text_columns: The column of the text; two columns for pairs.
        label_column: The column of the label: whole numbers from 0.
        max_length: Longer texts are cut to so many tokens.
        batch_size: Texts in a batch, per device.
        seed: The order of the training texts depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.

    Raises:
        ValueError: If a file is empty or missing, or a split has no such column.

    Example:
        >>> import billhook as bh
        >>> data = bh.ClassificationDataModule("nyu-mll/glue:rte", text_columns=["sentence1", "sentence2"])
        >>> data.max_length, data.batch_size
        (128, 32)
    """

    def __init__(
        self,
        data: Data,
        tokenizer: str | None = None,
        text_columns: list[str] | None = None,
        label_column: str = "label",
        max_length: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        annotated(ClassificationDataModule, locals())
        super().__init__(data, tokenizer, batch_size, seed, num_workers)
        whole("max_length", max_length)
        self.text_columns, self.label_column, self.max_length = text_columns or ["text"], label_column, max_length
        if len(self.text_columns) > 2:
            raise ValueError(f"text_columns={self.text_columns}: one column, or two for pairs")

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a language model, whose labels are tokens."""
        embeddings: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if embeddings is not None and "Classification" not in type(model).__name__:
            raise ValueError(
                f"ClassificationDataModule: a {type(model).__name__} predicts tokens and no classes: train a classifier "
                "(task='sequence-classification')"
            )

    def encode(self, rows: Rows, split: str) -> Rows:
        """Turns rows of text and label into rows of token ids and labels."""
        check_columns(rows, split, *self.text_columns, self.label_column)
        arguments = {"text_columns": self.text_columns, "label_column": self.label_column, "max_length": self.max_length}
        return map_rows(rows, classify, split, self.tokenizer, **arguments)

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the function that makes a batch of texts, padded to the longest."""
        collator: Callable[[list[Batch]], Batch] = DataCollatorWithPadding(self.tokenizer)
        return collator


class Seq2SeqDataModule(DatasetModule):
    """Pairs of source and target texts.

    Args:
        data: A hub name (`"name"` or `"name:config"`), a folder, or local files by split.
        tokenizer: A name or folder; by default the tokenizer saved with the model in training.
        source_column: The column of the text to read.
        target_column: The column of the text to write.
        max_source_length: Longer sources are cut to so many tokens.
        max_target_length: Longer targets are cut to so many tokens.
        batch_size: Pairs in a batch, per device.
        seed: The order of the training pairs depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.

    Raises:
        ValueError: If a file is empty or missing, or a split has no such column.

    Example:
        >>> from billhook.training.data import Seq2SeqDataModule
        >>> data = Seq2SeqDataModule({"train": "pairs.csv"}, source_column="article", target_column="summary")
        >>> data.max_source_length, data.max_target_length
        (512, 128)
    """

    def __init__(
        self,
        data: Data,
        tokenizer: str | None = None,
        source_column: str = "source",
        target_column: str = "target",
        max_source_length: int = 512,
        max_target_length: int = 128,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        annotated(Seq2SeqDataModule, locals())
        super().__init__(data, tokenizer, batch_size, seed, num_workers)
        whole("max_source_length", max_source_length)
        whole("max_target_length", max_target_length)
        self.source_column, self.target_column = source_column, target_column
        self.max_source_length, self.max_target_length = max_source_length, max_target_length

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a model without an encoder and a decoder."""
        if not model.config.is_encoder_decoder:
            raise ValueError(
                f"Seq2SeqDataModule: a {type(model).__name__} does not turn one text into another: train an encoder-decoder "
                "(task='seq2seq-lm'), or give it text (TextDataModule)"
            )

    def encode(self, rows: Rows, split: str) -> Rows:
        """Turns rows of source and target into rows of token ids."""
        check_columns(rows, split, self.source_column, self.target_column)
        columns, lengths = (self.source_column, self.target_column), (self.max_source_length, self.max_target_length)
        return map_rows(rows, translate, split, self.tokenizer, columns=columns, lengths=lengths)

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the function that makes a batch of pairs, padded to the longest; padded labels do not count in the loss."""
        collator: Callable[[list[Batch]], Batch] = DataCollatorForSeq2Seq(self.tokenizer)
        return collator
