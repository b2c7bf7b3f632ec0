"""Loads tokenizers, processors, and feature extractors."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
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
from billhook.model.config_fields import nested_configs
from billhook.model.shaped import readable
from billhook.model.token_ids import vocabulary_sizes

Preprocessor = PreTrainedTokenizerBase | ProcessorMixin | ImageProcessingMixin | FeatureExtractionMixin
"""A tokenizer, processor, image processor, or feature extractor."""
FILES = (
    "tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
    "vocab.txt", "vocab.json",
)  # fmt: skip
"""Preprocessor files. Without any of them, transformers creates an empty tokenizer."""
VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "spm.model", "merges.txt")
"""Vocabulary files that older folders may have instead."""
LOST_TOKENS = "_lost_tokens"
"""Attribute of a model whose vocabulary has shrunk since it was loaded: the `vocabulary_fingerprint` of the ids that it kept."""
TRIMMED = "billhook_kept_tokens"  # setting of a trimmed tokenizer, saved with it: the same fingerprint
FIX = "After a removal of tokens, pass plan.trim_tokenizer(tokenizer), or the folder where it is saved (--tokenizer FOLDER)."


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
    """Loads a tokenizer by name, or from the source of a model.

    Raises:
        ValueError: If there is none, or the model lacks tokens that it has.
    """
    origin = str(model.config.name_or_path)
    if not (name or origin):
        raise ValueError(f"tokenizer=None: {type(model).__name__} does not say where it came from: name a tokenizer")
    tokenizer = load_tokenizer(name or origin)
    check_tokenizer(model, tokenizer)
    return tokenizer


def vocabulary_fingerprint(kept: NDArray[np.int64], before: int) -> int:
    """Returns a checksum of the ids that removals kept; unchanged if no id is renumbered.

    Args:
        kept: Ids that the last removal keeps, ascending: `[tokens]`.
        before: The number for the removals before, or 0.
    """
    return before if np.array_equal(kept, np.arange(len(kept))) else zlib.crc32(kept.astype("<i8").tobytes(), before)


def check_tokenizer(model: PreTrainedModel, preprocessor: Preprocessor) -> None:
    """Raises for a tokenizer with tokens that the model lacks, or with other ids.

    If the model has not lost tokens, added ones may be beyond its vocabulary: some models are published without them.
    """
    tokenizer: Any = getattr(preprocessor, "tokenizer", preprocessor)  # of a processor
    size = num_tokens(model)
    if not size or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    lost = getattr(model, LOST_TOKENS, None)
    count = tokenizer.vocab_size if lost is None else max(tokenizer.get_vocab().values(), default=-1) + 1
    if count > size:
        raise ValueError(f"tokenizer: it has {count:,} tokens, but the model only {size:,}. {FIX}")
    if lost is not None and tokenizer.init_kwargs.get(TRIMMED, 0) != lost:
        raise ValueError(f"tokenizer: this {type(model).__name__} has lost tokens, so its ids are not the tokenizer's. {FIX}")


def check_ids(model: PreTrainedModel, ids: Tensor) -> None:
    """Raises if a text has a token that the model lacks."""
    size = num_tokens(model)
    if size and ids.numel() and int(ids.max()) >= size:
        raise ValueError(f"tokenizer: the text has the token {int(ids.max()):,}, but the model only {size:,} tokens. {FIX}")


def num_tokens(model: PreTrainedModel) -> int:
    """Returns the size of the largest vocabulary in the configs of a model, or 0."""
    return max((size for _, config in nested_configs(model.config) for size in vocabulary_sizes(config).values()), default=0)


def load_preprocessor(name: str, auto: Any = AutoProcessor) -> Preprocessor:  # noqa: ANN401 - an auto class
    """Loads a preprocessor with an auto class, without running its code."""
    with readable(name), _without_code(name):
        if not any(cached_file(model_path(name), file, _raise_exceptions_for_missing_entries=False) for file in FILES):
            raise ValueError(f"'{name}' has no tokenizer or processor: none of {', '.join(FILES)}")
        loaded: Preprocessor = auto.from_pretrained(model_path(name), trust_remote_code=False)
    return loaded
