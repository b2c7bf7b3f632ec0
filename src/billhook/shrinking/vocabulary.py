"""The vocabulary in a search: savings and losses of smaller vocabularies."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.engine.batches import Run, source_of
from billhook.engine.state import evaluating_without_grad
from billhook.model.repeat_kv import Indices
from billhook.report.texts import ExampleText, example_loss
from billhook.serving.engines import MULTIPLES
from billhook.shrinking.divergence import mean_over_sources
from billhook.tracing.trace import trace
from billhook.units.find import units_of
from billhook.vocabulary.scores import order_tokens
from billhook.vocabulary.tokenizer import Vocabulary

SIXTEENTHS = 16
"""Levels are multiples of a sixteenth of the vocabulary."""


@dataclass(frozen=True)
class VocabularyText:
    """The tokenizer of a model, and text to count its tokens in.

    Args:
        tokenizer: The tokenizer.
        batches: Text, `{"input_ids": [batch, length]}`. The more text, the better it is known which tokens it needs.
    """

    tokenizer: PreTrainedTokenizerBase
    batches: Sequence[Any]


@dataclass(frozen=True, eq=False)
class VocabularyLevel:
    """A smaller vocabulary.

    Attributes:
        kept: The remaining ids, ascending.
        saved: What it saves of the budget.
        loss: Increase of the loss on held-out text, in nats per token of the dense model, as the mean over sources.
    """

    kept: Indices
    saved: int
    loss: float


@dataclass(frozen=True, eq=False)
class VocabularyLevels:
    """All levels of a vocabulary, the largest first, of the tokens in `where`."""

    where: str
    size: int
    levels: Sequence[VocabularyLevel]


def find_levels(model: PreTrainedModel, target: str, text: VocabularyText, held_out: Iterable[Any]) -> VocabularyLevels:
    """Measures savings and losses of smaller vocabularies, without changing the model.

    The loss is that of the same text in the tokens that are left, with all others excluded from the predictions, which is the
    loss of the smaller model.

    Args:
        model: The dense model.
        target: `"params"` or `"bytes"`.
        text: Its tokenizer, and text to count tokens in.
        held_out: Batches to measure on.

    Raises:
        ValueError: If the model has no vocabulary, or the tokenizer cannot lose tokens.
    """
    structure = trace(model)
    units = units_of(model, structure, ["token"])
    if not units:
        raise ValueError(f"tokens=True: {type(model).__name__} has no vocabulary that can be smaller.")
    where, layer = next(iter(units.items()))
    group = next(group for group in structure.groups if group.leaf in layer.leaves)
    each, size = {"params": group.entries, "bytes": group.bytes}[target], layer.count()
    vocabulary = Vocabulary(text.tokenizer)
    required, others = order_tokens(model, size, vocabulary, text.batches)
    texts = _texts(held_out, text.tokenizer)
    dense, levels = _losses(model, text.tokenizer, texts, np.arange(size)), [VocabularyLevel(np.arange(size), 0, 0.0)]
    tokens = Counter[str]()
    for source, example in texts:
        tokens[source] += example.encoded(text.tokenizer).predicted
    for sixteenth in range(1, SIXTEENTHS):
        count = (size - size * sixteenth // SIXTEENTHS) // MULTIPLES[0] * MULTIPLES[0] or size
        if not len(required) <= count < len(levels[-1].kept):
            continue
        kept = np.sort(np.array(required + others[: count - len(required)]))
        losses = _losses(model, vocabulary.without(kept), texts, kept)
        more = {source: (losses[source] - dense[source]) / tokens[source] for source in dense}
        levels.append(VocabularyLevel(kept, each * (size - count), mean_over_sources(more)))
    return VocabularyLevels(where, size, levels)


def _texts(batches: Iterable[Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, ExampleText]]:
    """Returns the texts of examples, with the names of their sources."""
    texts = list[tuple[str, ExampleText]]()
    for batch in batches:
        inputs = batch.batch if isinstance(batch, Run) else batch
        texts += [(source_of(batch), ExampleText.of(ids.cpu(), tokenizer)) for ids in inputs["input_ids"]]
    return texts


def _losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ExampleText]], kept: Indices
) -> dict[str, float]:
    """Returns the loss of texts by source, in nats, with the tokenizer of the kept ids."""
    sums, columns = dict[str, float](), torch.from_numpy(kept).to(model.device)
    with evaluating_without_grad(model):
        for source, text in texts:
            sums[source] = sums.get(source, 0.0) + example_loss(model, text.encoded(tokenizer), columns)
    return sums
