"""The vocabulary in a search: savings and losses of smaller vocabularies."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from billhook.engine.batches import Batch, inputs_of, source_of
from billhook.engine.state import evaluating_without_grad
from billhook.linalg import Indices
from billhook.pruning.amount import MULTIPLES
from billhook.report.texts import ExampleText, example_loss
from billhook.shrinking.divergence import mean_over_sources
from billhook.shrinking.result import Candidate
from billhook.tracing.trace import trace
from billhook.units.find import units_of
from billhook.vocabulary.respelling import Respelling
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
        losses: Increase of the loss on held-out text by source, in bits per byte.
        densities: Tokens per byte of this text by source.
    """

    kept: Indices
    saved: int
    losses: Mapping[str, float]
    densities: Mapping[str, float]

    @property
    def loss(self) -> float:
        """The mean loss over sources, in bits per byte."""
        return mean_over_sources(self.losses)

    @property
    def bits(self) -> float:
        """Bits per byte of a nat per token, as the mean over sources."""
        return mean_over_sources(self.densities) / math.log(2)

    def with_units(self, divergence: Mapping[str, float]) -> dict[str, float]:
        """Returns the loss by source in bits per byte, with that of units in nats per token."""
        return {name: loss + self.densities[name] * divergence[name] / math.log(2) for name, loss in self.losses.items()}

    def beside(self, units: Candidate) -> Candidate:
        """Returns units with this vocabulary, with losses in bits per byte."""
        predicted, measured = (self.loss + self.bits * loss for loss in (units.predicted, units.measured))
        return replace(units, left=units.left - self.saved, predicted=predicted, measured=measured)


@dataclass(frozen=True, eq=False)
class SmallerVocabularies:
    """The smaller vocabularies of a model.

    Attributes:
        where: Name of the token units.
        size: Number of tokens.
        token_cost: What each token costs of the budget.
        required: Ids that stay.
        others: All other ids, the most used first.
        vocabulary: The tokens of the tokenizer.
    """

    where: str
    size: int
    token_cost: int
    required: Sequence[int]
    others: Sequence[int]
    vocabulary: Vocabulary

    @classmethod
    def find(cls, model: PreTrainedModel, target: str, text: VocabularyText, held_out: Iterable[Any] = ()) -> Self:
        """Finds the smaller vocabularies of a model for a budget of `"params"` or `"bytes"`.

        Examples of the text that are held out are not counted, because losses are measured on them. Raises a ValueError if the
        model has no vocabulary, or the tokenizer cannot lose tokens.
        """
        structure = trace(model)
        units = units_of(model, structure, ["token"])
        if not units:
            raise ValueError(f"tokens=True: {type(model).__name__} has no vocabulary that can be smaller.")
        where, layer = next(iter(units.items()))
        group = next(group for group in structure.groups if group.leaf in layer.leaves)
        size, vocabulary = layer.count(), Vocabulary(text.tokenizer)
        rows = {tuple(ids.tolist()) for batch in held_out for ids in inputs_of(batch)["input_ids"]}
        counted = [
            batch for batch in text.batches if not any(tuple(ids.tolist()) in rows for ids in inputs_of(batch)["input_ids"])
        ]
        required, others = order_tokens(model, size, vocabulary, counted)
        return cls(where, size, {"params": group.entries, "bytes": group.bytes}[target], required, others, vocabulary)

    @property
    def most_saved(self) -> int:
        """The cost that the smallest vocabulary saves."""
        return self.token_cost * (self.size - min(self._counts(), default=self.size))

    def measure(self, model: PreTrainedModel, held_out: Iterable[Any], excess: int) -> list[VocabularyLevel]:
        """Measures the savings and losses of smaller vocabularies, the largest first.

        The loss is that of the same text in the tokens that are left, with all others excluded from the predictions, which is the
        loss of the smaller model. The model does not change.

        Args:
            model: The dense model.
            held_out: Batches to measure on.
            excess: What the budget requires to save: no vocabulary saves more than needed.
        """
        enough = (self.size - -(-excess // self.token_cost)) // MULTIPLES[-1] * MULTIPLES[-1]
        return self._measured(model, held_out, {max(count, enough) for count in self._counts() if enough < self.size})

    def filled(self, model: PreTrainedModel, held_out: Iterable[Any], level: VocabularyLevel, spare: int) -> VocabularyLevel:
        """Measures a level that fills the rest of the budget with tokens."""
        count = min(self.size, (len(level.kept) + spare // self.token_cost) // MULTIPLES[-1] * MULTIPLES[-1])
        return self._measured(model, held_out, {count})[-1] if count > len(level.kept) else level

    def _measured(self, model: PreTrainedModel, held_out: Iterable[Any], fewer: Collection[int]) -> list[VocabularyLevel]:
        """Measures the full and smaller vocabularies, the largest first."""
        texts, size = _texts(held_out, self.vocabulary.tokenizer), dict[str, int]()
        for source, text in texts:
            size[source] = size.get(source, 0) + text.bytes
        levels, dense = list[VocabularyLevel](), dict[str, float]()
        for count in sorted({self.size, *fewer}, reverse=True):
            kept = np.sort(np.array([*self.required, *self.others[: count - len(self.required)]]))
            tokenizer = self.vocabulary.without(kept) if count < self.size else self.vocabulary.tokenizer
            losses, tokens = _losses(model, tokenizer, texts, kept)
            dense = dense or losses
            more = {source: (losses[source] - dense[source]) / math.log(2) / size[source] for source in size}
            densities = {source: tokens[source] / size[source] for source in size}
            levels.append(VocabularyLevel(kept, self.token_cost * (self.size - count), more, densities))
        return levels

    def respell(self, batches: Iterable[Any], level: VocabularyLevel) -> list[Any]:
        """Returns batches in the tokens of a level, with the ids of the dense model."""
        if not level.saved:
            return list(batches)
        respelled, old = Respelling(self.vocabulary.tokenizer, level.kept.tolist()), torch.from_numpy(level.kept)
        changed = []
        for batch in batches:
            inputs = respelled(batch)
            for name in {"input_ids", "labels"} & inputs.keys():
                ids = inputs[name]
                inputs[name] = torch.where(ids < 0, ids, old.to(ids.device)[ids.clamp(min=0)])
            changed.append(Batch(inputs, source_of(batch)))
        return changed

    def _counts(self) -> list[int]:
        """Returns the numbers of tokens that may be left, at most one for each sixteenth."""
        counts = []
        for sixteenth in range(1, SIXTEENTHS):
            count = (self.size - self.size * sixteenth // SIXTEENTHS) // MULTIPLES[0] * MULTIPLES[0]
            counts += [count] if len(self.required) <= count < self.size else []
        return counts


def _texts(batches: Iterable[Any], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, ExampleText]]:
    """Returns the texts of examples, with the names of their sources."""
    texts = []
    for batch in batches:
        texts += [(source_of(batch), ExampleText.of(ids.cpu(), tokenizer)) for ids in inputs_of(batch)["input_ids"]]
    return texts


def _losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ExampleText]], kept: Indices
) -> tuple[dict[str, float], dict[str, int]]:
    """Returns the loss of texts in nats and the number of their predicted tokens, by source.

    `tokenizer` has the kept ids alone.
    """
    sums, tokens, columns = dict[str, float](), dict[str, int](), torch.from_numpy(kept).to(model.device)
    with evaluating_without_grad(model):
        for source, text in texts:
            example = text.encoded(tokenizer)
            sums[source] = sums.get(source, 0.0) + example_loss(model, example, columns)
            tokens[source] = tokens.get(source, 0) + example.predicted
    return sums, tokens
