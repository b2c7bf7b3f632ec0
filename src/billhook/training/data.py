"""LightningDataModules over `datasets`: text packed into blocks, sequence classification, sequence to sequence."""

from collections.abc import Callable, Sequence
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
from billhook.calibration.reading import Data, Rows, Table, check_columns, is_line_text
from billhook.model.preprocessors import load_tokenizer
from billhook.training.dataset_module import DatasetModule, LabelledModule, NoExamples, numbers_of


class TokenizedModule(DatasetModule):
    """Base of the data modules of text.

    Attributes:
        tokenizer_name: A name or folder; None where the tokenizer is the one saved with the model in training.
    """

    tokenizer_name: str | None = None
    _tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.tokenizer_name or self.name_of_model("tokenizer"))
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            self._tokenizer = tokenizer
        return self._tokenizer


class TextDataModule(TokenizedModule):
    """Text, chats, or prompts and responses for language models, tokenised and packed into blocks of equal length, or padded.

    A row of a hub data set, .jsonl, .csv or .parquet file has one of these, in this order:

    - the column `column`: a document, which the tokenizer's end-of-sequence token (or separator) ends, or a chat;
    - `messages` or `conversations`: a chat, a list of messages with `role` and `content`, or `from` (human, gpt, system, tool)
      and `value`, which the tokenizer's chat template writes, with the tools of a column `tools` if there is one;
    - `prompt` and `response` (or `completion`): a chat of two messages, or, where the tokenizer has no chat template, the one
      after the other and the end token.

    The lines of a .txt file run on. Null and blank rows do not count. Tokens that do not fill a block at the end of 10,000 rows
    are left out, as are examples in which nothing is learnt.

    Args:
        data: `"tiny"` (the embedded text), a hub name (`"name"` or `"name:config"`), a folder, a file or a glob of files
            (`"chats/*.jsonl"`), or files by split, as in `{train: [a.jsonl, b.jsonl], validation: c.jsonl}`; or a list of
            several of these. In Python also a `Dataset` or `DatasetDict` of `datasets`, or one that streams.
        tokenizer: A name or folder; by default the tokenizer saved with the model in training.
        block_size: Tokens in a block.
        batch_size: Blocks in a batch, per device.
        column: The column that holds the text.
        mlm_probability: Share of the tokens to mask, for masked language models; 0 for all others. A batch of the same
            blocks is always masked alike, so that figures before and after can be compared.
        seed: The order of the training blocks depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.
        streaming: Read while training instead of preparing and caching everything first.
        validation: Share of the training rows, in [0, 1), that are held out, drawn by `seed`, to validate on where the data has
            no split `validation` and does not stream; of a .txt file the last lines. 0 for none.
        loss_on: Tokens of chats and of prompts that are learnt: those of "responses", or "all". Of plain text all are. Responses
            are what the chat template marks by `{% generation %}`, or else what each message of the assistant adds to the chat.
        packing: False for an example of each row: longer ones are cut to `block_size` tokens, and those of a batch are padded.
        weights: Shares of the training blocks, one for each in the list `data`: they are drawn so till each source has been seen
            whole, and what is drawn of others may repeat. By default each gives all that it has, once.

    Raises:
        ValueError: If a file is empty or missing, a split has no such column, the text is shorter than one block, there is no
            chat template for chats, or it does not show which tokens are responses.

    Example:
        >>> import billhook as bh
        >>> data = bh.TextDataModule("text.jsonl", tokenizer="tiny", block_size=128, batch_size=4)
        >>> data.block_size, data.data
        (128, 'text.jsonl')
    """

    def __init__(
        self,
        data: Data | Table | list[Data | Table] = "tiny",
        tokenizer: str | None = None,
        block_size: int = 256,
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
        check_int("block_size", block_size, 2)  # a token to read and one to predict
        check_fraction("mlm_probability", mlm_probability)
        self.tokenizer_name = tokenizer
        self.block_size, self.column, self.mlm_probability = block_size, column, mlm_probability
        self.loss_on, self.packing = loss_on, packing

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a classifier, whose labels are no tokens."""
        if "Classification" in type(model).__name__:
            raise ValueError(
                f"TextDataModule: a {type(model).__name__} does not predict tokens: give it a ClassificationDataModule"
            )

    def encode(self, rows: Rows, split: str) -> Rows:
        """Turns rows of text into rows of `block_size` token ids, or at most so many."""
        columns, documents = find_text_columns(rows, split, self.column), not is_line_text(rows)
        if not (documents or self.packing):
            raise ValueError("packing=False: the lines of a .txt file run on, and are no examples: give it rows (.jsonl, ...)")
        if documents:
            warn_of_empty_rows(rows, split, columns)
        responses = self.loss_on == "responses" and not self.mlm_probability and not is_text(rows, columns)
        arguments = {"block_size": self.block_size, "columns": columns, "documents": documents, "responses": responses}
        examples = map_rows(rows, pack if self.packing else encode_separately, split, self.tokenizer, **arguments)
        if not isinstance(examples, datasets.Dataset):
            return examples
        if len(examples) == 0:
            what = (
                "no example of the split '{}' has a token to learn within block_size={}" if responses or not self.packing else ""
            )
            what = what or "block_size={1} is longer than the whole text of the split '{0}'"
            raise NoExamples(what.format(split, self.block_size))
        if not self.packing and (left := len(rows) - len(examples)):
            rank_zero_info(
                f"billhook: {left} of {len(rows)} rows of the split '{split}' are left out, since there is nothing to learn in "
                f"their first {self.block_size} tokens"
            )
        return examples

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the function that makes a batch of blocks, or of padded rows, masked with `mlm_probability`."""
        if not self.mlm_probability:
            return collate_packed if self.packing else PaddingCollator(self.tokenizer)
        if self.tokenizer.mask_token is None:
            raise ValueError(f"mlm_probability={self.mlm_probability}: the tokenizer has no mask token")
        return DeterministicMasking(self.tokenizer, mlm_probability=self.mlm_probability)


class ClassificationDataModule(LabelledModule, TokenizedModule):
    """Texts, or pairs of texts, with a label each.

    Args:
        data: A hub name (`"name"` or `"name:config"`), a folder, a file or a glob of files, or files by split; in Python also a
            `Dataset` or `DatasetDict` of `datasets`.
        tokenizer: A name or folder; by default the tokenizer saved with the model in training.
        text_columns: The column of the text; two columns for pairs.
        label_column: The column of the label: whole numbers from 0, or words, which are numbered as the model's config does
            (`label2id`), or else in the order of the alphabet. The names are kept in the config, and so are exported.
        max_length: Longer texts are cut to so many tokens.
        batch_size: Texts in a batch, per device.
        seed: The order of the training texts depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.
        validation: Share of the training rows, in [0, 1), that are held out, drawn by `seed`, to validate on where the data has
            no split `validation`. 0 for none.

    Raises:
        ValueError: If a file is empty or missing, a split has no such column, or there are more or fewer labels by name than the
            model has classes.

    Example:
        >>> import billhook as bh
        >>> data = bh.training.ClassificationDataModule("nyu-mll/glue:rte", text_columns=["sentence1", "sentence2"])
        >>> data.max_length, data.batch_size
        (128, 32)
    """

    def __init__(
        self,
        data: Data | Table,
        tokenizer: str | None = None,
        text_columns: list[str] | None = None,
        label_column: str = "label",
        max_length: int = 128,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        validation: float = 0.05,
    ) -> None:
        check_types(ClassificationDataModule, locals())
        super().__init__(data, batch_size, seed, num_workers, validation=validation)
        check_int("max_length", max_length)
        self.tokenizer_name, self.text_columns = tokenizer, text_columns or ["text"]
        self.label_column, self.max_length = label_column, max_length
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
        arguments |= {"numbers": numbers_of(rows, self.label_column, self.label2id)}
        return map_rows(rows, classify, split, self.tokenizer, **arguments)

    def collate(self) -> Callable[[list[Batch]], Batch]:
        """Returns the function that makes a batch of texts, padded to the longest."""
        collator: Callable[[list[Batch]], Batch] = DataCollatorWithPadding(self.tokenizer)
        return collator


class Seq2SeqDataModule(TokenizedModule):
    """Pairs of source and target texts.

    Args:
        data: A hub name (`"name"` or `"name:config"`), a folder, a file or a glob of files, or files by split; in Python also a
            `Dataset` or `DatasetDict` of `datasets`.
        tokenizer: A name or folder; by default the tokenizer saved with the model in training.
        source_column: The column of the text to read.
        target_column: The column of the text to write.
        max_source_length: Longer sources are cut to so many tokens.
        max_target_length: Longer targets are cut to so many tokens.
        batch_size: Pairs in a batch, per device.
        seed: The order of the training pairs depends on this seed and the epoch alone.
        num_workers: Processes that load batches; 0 loads in the main process.
        validation: Share of the training rows, in [0, 1), that are held out, drawn by `seed`, to validate on where the data has
            no split `validation`. 0 for none.

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
