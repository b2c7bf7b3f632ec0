"""Loads what makes a model's inputs of text, images or sound."""

from typing import Any

from transformers import (
    AutoProcessor,
    AutoTokenizer,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils.hub import cached_file

from billhook.assets import model_path
from billhook.model.shapes.shaped import readable

Preprocessor = PreTrainedTokenizerBase | ProcessorMixin | ImageProcessingMixin | FeatureExtractionMixin
"""What makes a model's inputs of text, images or sound, and saves itself beside the model."""
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "vocab.txt",
    "vocab.json",
)
"""Files of which a folder with a preprocessor has one; without any, transformers makes up an empty tokenizer."""


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder, a hub name or `"tiny"`; no code that it brings is run."""
    with readable(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path(name), trust_remote_code=False)
    return tokenizer


def load_preprocessor(name: str, auto: Any = AutoProcessor) -> Preprocessor:  # noqa: ANN401 - an auto class
    """Loads what an auto class finds in a folder or under a hub name, if there is anything; no code that it brings is run."""
    with readable(name):
        held = (cached_file(model_path(name), file, _raise_exceptions_for_missing_entries=False) for file in FILES)
        if not any(held):
            raise ValueError(f"'{name}' has no tokenizer or processor: none of {', '.join(FILES)}")
        loaded: Preprocessor = auto.from_pretrained(model_path(name), trust_remote_code=False)
    return loaded
