"""LightningDataModules for language modeling, classification, and sequence-to-sequence."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

import datasets
from lightning_utilities.core.rank_zero import rank_zero_info
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from billhook.arguments import check_fraction, check_int, check_types
from billhook.calibration.conversations import find_text_columns, is_text, warn_of_empty_rows
from billhook.calibration.examples import (
    Batch,
    DeterministicMasking,
    PaddingCollator,
    classify,
    collate_packed,
    encode_separately,
    map_rows,
    pack,
    translate,
)
from billhook.calibration.generated import GENERATED, generated
from billhook.calibration.reading import Data, Rows, Table, check_columns, is_line_text
from billhook.fit.run import isolated_rng
from billhook.model import check_tokenizer, load_tokenizer
from billhook.training.dataset_module import DatasetModule, LabeledModule, NoExamples, label_numbers


class TokenizedModule(DatasetModule):
    """Base class of the data modules for text.

    Attributes:
        tokenizer_name: Name or folder of a tokenizer. None uses the tokenizer saved with the model in training.
    """

    tokenizer_name: str | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.tokenizer_name or self.model_name("tokenizer"))
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def check(self, model: PreTrainedModel) -> None:
        """Raises an error for a tokenizer with tokens that the model lacks."""
        check_tokenizer(model, self.tokenizer)


class TextDataModule(TokenizedModule):
    """Text, chats, or prompts and responses for language models, packed or padded.

    A row of a Hub dataset or of a .jsonl, .csv, or .parquet file has one of these columns. The first match is used:

    - the column `column`: a document, to which the end-of-sequence token (or separator) is appended, or a chat;
    - `messages` or `conversations`: a chat, as a list of messages with `role` and `content`, or with `from` (human, gpt, system,
      tool) and `value`. The tokenizer's chat template formats it, with the tools of a column `tools` if there is one;
    - `prompt` and `response` (or `completion`): a chat of two messages. Without a chat template, the two texts and the
      end-of-sequence token are concatenated.

    The lines of a .txt file are one continuous text. Null and blank rows are ignored. After every 10,000 rows, tokens that do
    not fill a block are dropped. Examples without a token in the loss are dropped too.

    Args:
        data: `"tiny"` or `"mixed"` (packaged text, the latter of eight kinds), `"generated"` (text that the teacher samples, or
            without one the model before training), a Hub name (`"name"` or `"name:config"`), a folder, a file, a glob of files
            (`"chats/*.jsonl"`), files by split, as in `{train: [a.jsonl, b.jsonl], validation: c.jsonl}`, or a list of these. In
            Python also a `Dataset` or `DatasetDict` of `datasets`, streaming or not.
        tokenizer: Name or folder of a tokenizer. Defaults to the tokenizer saved with the model in training.
        length: Tokens per example.
        batch_size: Number of blocks per batch and device.
        column: Column of the text.
        mlm_probability: Fraction of tokens to mask, for masked language models. The mask depends only on the blocks of a batch,
            so that results before and after a change are comparable. Defaults to 0, for all other models.
        seed: Seed for the order of the training blocks, which depends only on it and the epoch.
        num_workers: Number of processes that load batches. 0 loads in the main process.
        streaming: If True, reads data during training instead of preparing and caching it first.
        validation: Fraction of the training rows, in [0, 1), to hold out for validation if the data has no split `validation`
            and is not streamed. Rows are drawn by `seed`; a .txt file gives its last lines. 0 holds out nothing.
        loss_on: Tokens of chats and prompts in the loss: `"responses"` or `"all"`. Plain text always uses all tokens. Responses
            are the tokens that the chat template marks with `{% generation %}`, or else those that each assistant message adds.
        packing: If False, every row is one example, truncated to `length` tokens and padded within a batch.
        weights: Sampling weights, one per source in the list `data`. Sampling stops when every source was used in full, so
            that rows of other sources may repeat. Defaults to using every row once.

    Raises:
        ValueError: If a file is empty or missing, a column is missing, the text is shorter than one block, or the tokenizer has
            no chat template for chats, or one that does not separate responses.

    Example:
        >>> import billhook as bh
        >>> data = bh.TextDataModule("text.jsonl", tokenizer="tiny", length=128, batch_size=4)
        >>> data.length, data.data
        (128, 'text.jsonl')
    """

    def __init__(
        self,
        data: Data | Table | list[Data | Table] = "tiny",
        tokenizer: str | None = None,
        length: int = 256,
        batch_size: int = 8,
        column: str = "text",
        mlm_probability: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
        streaming: bool = False,
        validation: float = 0.05,
        loss_on: Literal["responses", "all"] = "responses",
        packing: bool = True,
        weights: Sequence[float] | None = None,
    ) -> None:
        check_types(TextDataModule, locals())
        super().__init__(data, batch_size, seed, num_workers, streaming, validation, weights)
        check_int("length", length, 2)  # an input token and the next one to predict
        check_fraction("mlm_probability", mlm_probability)
        self.tokenizer_name = tokenizer
        self.length, self.column, self.mlm_probability = length, column, mlm_probability
        self.loss_on, self.packing = loss_on, packing

    def check(self, model: PreTrainedModel) -> None:
        """Raises an error for a classifier, whose labels are not tokens."""
        if "Classification" in type(model).__name__:
            raise ValueError(
                f"TextDataModule cannot train {type(model).__name__}, which does not predict tokens. "
                "Use ClassificationDataModule."
            )
        super().check(model)

    def load(self, source: Data | Table, model: PreTrainedModel | None) -> dict[str, Rows]:
        """Loads the splits of a source, or generates its text.

        Raises:
            ValueError: If text is to be generated and there is no model, or it cannot generate.
        """
        if not (isinstance(source, str) and source == GENERATED):
            return super().load(source, model)
        teacher = getattr(getattr(self.trainer, "lightning_module", None), "teacher", None)
        writer = model if teacher is None else teacher.model
        if writer is None:
            raise ValueError("data='generated' is text of the model in training. Attach the data module to a Trainer first.")
        with isolated_rng():  # every process samples the same text, from the same weights and seed, also after a resume
            rows = generated(writer)
        texts = [self.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True) for batch in rows]
        return {"train": datasets.Dataset.from_dict({self.column: texts})}

    def encode(self, rows: Rows, split: str) -> Rows:
        """Tokenizes rows of text into examples of (at most) `length` tokens.

        Raises:
            ValueError: If there are no rows, or no example is long enough.
        """
        columns, documents = find_text_columns(rows, split, self.column), not is_line_text(rows)
        if not (documents or self.packing):
            raise ValueError("packing=False requires rows, but a .txt file is one continuous text. Use a .jsonl file.")
        if documents:
            warn_of_empty_rows(rows, split, columns)
        responses = self.loss_on == "responses" and not self.mlm_probability and not is_text(rows, columns)
        arguments = {"length": self.length, "columns": columns, "documents": documents, "responses": responses}
        examples = map_rows(rows, pack if self.packing else encode_separately, split, self.tokenizer, **arguments)
        if not isinstance(examples, datasets.Dataset):
            return examples
        if len(examples) == 0:
            if responses or not self.packing:
                problem = f"leaves no token in the loss of any example of the split '{split}'"
            else:
                problem = f"is longer than the text of the split '{split}'"
            fix = "Use a smaller length, or more text." if self.packing else "Use a larger length, or longer texts."
            raise NoExamples(f"length={self.length} {problem}. {fix}")
        dropped = len(rows) - len(examples)
        if dropped and not self.packing:
            rank_zero_info(
                f"billhook: dropped {dropped} of {len(rows)} rows of the split '{split}', because their first {self.length} "
                "tokens contain none in the loss"
            )
        return examples

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the collate function for blocks or padded rows, masked with `mlm_probability`.

        Raises:
            ValueError: If tokens are masked and the tokenizer has no mask token.
        """
        if not self.mlm_probability:
            return collate_packed if self.packing else PaddingCollator(self.tokenizer)
        if self.tokenizer.mask_token is None:
            raise ValueError(f"mlm_probability={self.mlm_probability} requires a tokenizer with a mask token. Use 0.")
        return DeterministicMasking(self.tokenizer, mlm_probability=self.mlm_probability)


class ClassificationDataModule(LabeledModule, TokenizedModule):
    """Labeled texts, or pairs of texts, for classifiers.

    Args:
        data: A Hub name (`"name"` or `"name:config"`), a folder, a file, a glob of files, or files by split. In Python also a
            `Dataset` or `DatasetDict` of `datasets`.
        tokenizer: Name or folder of a tokenizer. Defaults to the tokenizer saved with the model in training.
        text_columns: Column of the text, or two columns for pairs. Defaults to `["text"]`.
        label_column: Column of the label: integers from 0, or names. Names are numbered by the model's config (`label2id`), or
            else alphabetically. They are stored in the config and exported with the model.
        length: Maximum number of tokens; longer texts are truncated.
        batch_size: Number of texts per batch and device.
        seed: Seed for the order of the training texts, which depends only on it and the epoch.
        num_workers: Number of processes that load batches. 0 loads in the main process.
        validation: Fraction of the training rows, in [0, 1), to hold out for validation if the data has no split `validation`.
            Rows are drawn by `seed`. 0 holds out nothing.

    Raises:
        ValueError: If a file is empty or missing, a column is missing, or the number of label names differs from the model's
            number of classes.

    Example:
        >>> import billhook as bh
        >>> data = bh.training.ClassificationDataModule("nyu-mll/glue:rte", text_columns=["sentence1", "sentence2"])
        >>> data.length, data.batch_size
        (128, 32)
    """

    def __init__(
        self,
        data: Data | Table,
        tokenizer: str | None = None,
        text_columns: list[str] | None = None,
        label_column: str = "label",
        length: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        validation: float = 0.05,
    ) -> None:
        check_types(ClassificationDataModule, locals())
        super().__init__(data, batch_size, seed, num_workers, validation=validation)
        check_int("length", length)
        self.tokenizer_name, self.text_columns = tokenizer, text_columns or ["text"]
        self.label_column, self.length = label_column, length
        if len(self.text_columns) > 2:
            raise ValueError(f"text_columns={self.text_columns} must be one column, or two for pairs")

    def check(self, model: PreTrainedModel) -> None:
        """Raises an error for a language model, whose labels are tokens."""
        embeddings: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if embeddings is not None and "Classification" not in type(model).__name__:
            raise ValueError(
                f"ClassificationDataModule cannot train {type(model).__name__}, which predicts tokens. Load the model with "
                "task='sequence-classification', or use TextDataModule."
            )
        super().check(model)

    def encode(self, rows: Rows, split: str) -> Rows:
        """Tokenizes rows of text and label."""
        check_columns(rows, split, *self.text_columns, self.label_column)
        arguments = {"text_columns": self.text_columns, "label_column": self.label_column, "length": self.length}
        arguments |= {"numbers": label_numbers(rows, self.label_column, self.label2id)}
        return map_rows(rows, classify, split, self.tokenizer, **arguments)

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the collate function, which pads to the longest text."""
        collator: Callable[[list[Batch]], Batch] = DataCollatorWithPadding(self.tokenizer)
        return collator


class Seq2SeqDataModule(TokenizedModule):
    """Pairs of source and target texts for encoder-decoder models.

    Args:
        data: A Hub name (`"name"` or `"name:config"`), a folder, a file, a glob of files, or files by split. In Python also a
            `Dataset` or `DatasetDict` of `datasets`.
        tokenizer: Name or folder of a tokenizer. Defaults to the tokenizer saved with the model in training.
        source_column: Column of the source text.
        target_column: Column of the target text.
        max_source_length: Maximum number of source tokens; longer texts are truncated.
        max_target_length: Maximum number of target tokens; longer texts are truncated.
        batch_size: Number of pairs per batch and device.
        seed: Seed for the order of the training pairs, which depends only on it and the epoch.
        num_workers: Number of processes that load batches. 0 loads in the main process.
        validation: Fraction of the training rows, in [0, 1), to hold out for validation if the data has no split `validation`.
            Rows are drawn by `seed`. 0 holds out nothing.

    Raises:
        ValueError: If a file is empty or missing, or a column is missing.

    Example:
        >>> from billhook.training.data import Seq2SeqDataModule
        >>> data = Seq2SeqDataModule({"train": "pairs.csv"}, source_column="article", target_column="summary")
        >>> data.max_source_length, data.max_target_length
        (512, 128)
    """

    def __init__(
        self,
        data: Data | Table,
        tokenizer: str | None = None,
        source_column: str = "source",
        target_column: str = "target",
        max_source_length: int = 512,
        max_target_length: int = 128,
        batch_size: int = 16,
        seed: int = 0,
        num_workers: int = 0,
        validation: float = 0.05,
    ) -> None:
        check_types(Seq2SeqDataModule, locals())
        super().__init__(data, batch_size, seed, num_workers, validation=validation)
        check_int("max_source_length", max_source_length)
        check_int("max_target_length", max_target_length)
        self.tokenizer_name, self.source_column, self.target_column = tokenizer, source_column, target_column
        self.max_source_length, self.max_target_length = max_source_length, max_target_length

    def check(self, model: PreTrainedModel) -> None:
        """Raises an error for a model that is not an encoder-decoder."""
        if not model.config.is_encoder_decoder:
            raise ValueError(
                f"Seq2SeqDataModule cannot train {type(model).__name__}, which is not an encoder-decoder. Load one with "
                "task='seq2seq-lm', or use TextDataModule."
            )
        super().check(model)

    def encode(self, rows: Rows, split: str) -> Rows:
        """Tokenizes rows of source and target."""
        check_columns(rows, split, self.source_column, self.target_column)
        columns, lengths = (self.source_column, self.target_column), (self.max_source_length, self.max_target_length)
        return map_rows(rows, translate, split, self.tokenizer, columns=columns, lengths=lengths)

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the collate function, which pads pairs and excludes padding from the loss."""
        collator: Callable[[list[Batch]], Batch] = DataCollatorForSeq2Seq(self.tokenizer)
        return collator
