"""Loads tokenizers, processors, and feature extractors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoProcessor,
    AutoTokenizer,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils.hub import cached_file

from billhook.assets import model_path
from billhook.model.shaped import readable

Preprocessor = PreTrainedTokenizerBase | ProcessorMixin | ImageProcessingMixin | FeatureExtractionMixin
"""A tokenizer, processor, image processor, or feature extractor."""
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "vocab.txt",
    "vocab.json",
)
"""Preprocessor files. Without any of them, transformers creates an empty tokenizer."""
VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "spm.model", "merges.txt")
"""Vocabulary files that older folders may have instead."""


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder, Hub name, or `"tiny"`, without running its code.

    Raises:
        ValueError: If there is none, or it requires custom code.
    """
    if not may_have_preprocessor(name):
        raise ValueError(f"'{name}' has no tokenizer: name another folder, or a hub name, as tokenizer (--tokenizer NAME)")
    with readable(name), _without_code(name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path(name), trust_remote_code=False)
    return tokenizer


def may_have_preprocessor(name: str) -> bool:
    """Returns whether a folder has preprocessor files. True for Hub names."""
    folder = Path(model_path(name))
    return not folder.is_dir() or any((folder / file).is_file() for file in (*FILES, *VOCABULARIES))


@contextmanager
def _without_code(name: str) -> Iterator[None]:
    """Replaces transformers' advice about trust_remote_code in errors."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"'{name}': its tokenizer or processor is code that comes with it, which billhook does not run: name another as "
            "tokenizer (--tokenizer NAME)"
        ) from error


def tokenizer_of(model: PreTrainedModel, name: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer by name, or from the source of a model."""
    if not (name or model.config.name_or_path):
        raise ValueError(f"tokenizer=None: {type(model).__name__} does not say where it came from: name a tokenizer")
    return load_tokenizer(name or str(model.config.name_or_path))


def load_preprocessor(name: str, auto: Any = AutoProcessor) -> Preprocessor:  # noqa: ANN401 - an auto class
    """Loads a preprocessor with an auto class, without running its code."""
    with readable(name), _without_code(name):
        paths = (cached_file(model_path(name), file, _raise_exceptions_for_missing_entries=False) for file in FILES)
        if not any(paths):
            raise ValueError(f"'{name}' has no tokenizer or processor: none of {', '.join(FILES)}")
        loaded: Preprocessor = auto.from_pretrained(model_path(name), trust_remote_code=False)
    return loaded
