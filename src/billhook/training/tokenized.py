"""The part that data modules of text share: a tokenizer."""

from transformers import PreTrainedTokenizerBase

from billhook.model.preprocessors import load_tokenizer
from billhook.training.dataset_module import DatasetModule


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
