"""Outputs of a dense model and their comparison with a changed model's."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from billhook.engine import Outputs, Run, evaluating_without_grad, runs_of, token_outputs
from billhook.report.generation import generates

ELEMENTS = 2**22
"""Number of logits to process at once."""
BYTES = 2**28
"""Memory for a dense model's predictions in all runs, at evenly spaced positions."""


class Comparison(NamedTuple):
    """Mean differences, over positions, between outputs of a dense and a changed model.

    With logits, their predictions p and q are compared, else their token states. What does not apply is NaN.

    Attributes:
        kl: KL(p || q), in nats.
        agreement: Share of positions with the same most likely token.
        acceptance: Sum of min(p, q): the share of drafted tokens that speculative sampling accepts
            (https://arxiv.org/abs/2211.17192, corollary 3.6).
        cosine: Cosine of the token states.
    """

    kl: float = math.nan
    agreement: float = math.nan
    acceptance: float = math.nan
    cosine: float = math.nan


@dataclass(frozen=True)
class Predictions:
    """Log-probabilities or token states of a run, float32, `[positions, size]`.

    They are stored on the device of the outputs, or on the CPU if the device is out of memory.
    """

    positions: Tensor
    values: Tensor
    is_logits: bool

    @classmethod
    def of(cls, outputs: Outputs, runs: int) -> Self:
        """Stores a run's outputs in its share of `BYTES`."""
        count, size = outputs.values.shape
        device = outputs.values.device
        limit = max(BYTES // (4 * size * runs), 1)
        positions = torch.linspace(0, count - 1, min(limit, count)).round().long().to(device)
        try:
            values = torch.empty(len(positions), size, device=device)
        except torch.OutOfMemoryError:
            values = torch.empty(len(positions), size)
        for part in _parts(values):
            values[part] = _stored(outputs, positions[part], values.device)
        return cls(positions, values, outputs.is_logits)

    def divergence(self, logits: Tensor) -> float:
        """Returns the sum of KL(dense || changed) over the stored positions, in nats, by logits.

        They are `[positions, classes]`.
        """
        pairs = self._pairs(Outputs(logits, is_logits=True))
        return _sum([kl_div(now, then, reduction="sum", log_target=True) for now, then in pairs])

    def compare(self, outputs: Outputs) -> Comparison:
        """Compares outputs at the stored positions; all NaN if they differ in size."""
        if outputs.is_logits != self.is_logits or outputs.values.shape[-1] != self.values.shape[-1]:
            return Comparison()
        sums = list[Tensor]()
        for now, then in self._pairs(outputs):
            if self.is_logits:
                kl = kl_div(now, then, reduction="sum", log_target=True)
                same = (now.argmax(-1) == then.argmax(-1)).sum()
                sums.append(torch.stack([kl, same.to(kl), torch.minimum(now, then).exp().sum()]))
            else:
                sums.append(cosine_similarity(now, then, -1).sum()[None])
        means = [value / len(self.positions) for value in torch.stack(sums).cpu().double().sum(0).tolist()]
        return Comparison(*means) if self.is_logits else Comparison(cosine=means[0])

    def _pairs(self, outputs: Outputs) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields values of the changed and of the dense model, part by part."""
        for part in _parts(self.values):
            yield _stored(outputs, self.positions[part], self.values.device), self.values[part]


def mean_loss(logits: Tensor, labels: Tensor) -> float:
    """Returns the mean cross-entropy of logits, `[positions, classes]`, computed in float32."""
    return _sum([cross_entropy(logits[part].float(), labels[part], reduction="sum") for part in _parts(logits)]) / len(logits)


def _sum(sums: Sequence[Tensor]) -> float:
    """Sums scalars in double precision after a single transfer to the host."""
    return sum(torch.stack(list(sums)).tolist(), 0.0) if sums else 0.0


def _parts(logits: Tensor) -> Iterator[slice]:
    """Yields slices of positions, so that intermediate results are small."""
    step = max(ELEMENTS // logits.shape[-1], 1)
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def _stored(outputs: Outputs, positions: Tensor, device: torch.device) -> Tensor:
    """Returns log-probabilities, or token states, at some positions."""
    values = outputs.values[positions.to(outputs.values.device)].to(device).float()
    return values.log_softmax(-1) if outputs.is_logits else values


OutputsKind = Literal["next-token predictions", "logits", "token states"]
"""What of a model's outputs is compared."""


def outputs_kind(model: PreTrainedModel) -> tuple[OutputsKind, int]:
    """Returns the kind and size of compared outputs; size 0 for next-token predictions.

    Raises:
        ValueError: If there is nothing.
    """
    if generates(model):
        return "next-token predictions", 0
    with evaluating_without_grad(model):
        probe = {"input_ids": torch.zeros(1, 2, dtype=torch.int64)}  # every vocabulary has token 0
        outputs = compared_outputs(model, runs_of(model, [probe])[0])
    return "logits" if outputs.is_logits else "token states", outputs.values.shape[-1]


def compared_outputs(model: PreTrainedModel, run: Run) -> Outputs:
    """Runs a model, and returns its logits or token states at non-padding positions.

    Raises:
        ValueError: If the model has neither.
    """
    outputs = token_outputs(run)
    if outputs is None:
        raise ValueError(f"model: {type(model).__name__} has neither logits nor token states (last_hidden_state) to compare.")
    return outputs


def eval_logits(model: PreTrainedModel, run: Run) -> Tensor:
    """Returns logits at non-padding positions, `[positions, classes]`, in evaluation mode.

    Raises:
        ValueError: If the model has none.
    """
    with evaluating_without_grad(model):
        outputs = token_outputs(run)
    if outputs is None or not outputs.is_logits:
        raise ValueError(f"model: {type(model).__name__} has no logits, so its loss cannot be measured.")
    return outputs.values


@dataclass(frozen=True)
class Example:
    """Token ids of an example, and the number of its first tokens that are not predicted."""

    ids: Tensor
    first: int = 1

    @property
    def predicted(self) -> int:
        """The number of tokens that are predicted."""
        return len(self.ids) - self.first


@dataclass(frozen=True)
class ExampleText:
    """The text of an example: that of its first token, and the rest, which is predicted."""

    first: str
    rest: str

    @classmethod
    def of(cls, ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Decodes an example, `[tokens]`."""
        parts = (tokenizer.decode(part.tolist(), clean_up_tokenization_spaces=False) for part in (ids[:1], ids[1:]))
        return cls(*map(str, parts))

    def encoded(self, tokenizer: PreTrainedTokenizerBase) -> Example:
        """Returns the tokens of the text."""
        first, rest = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (self.first, self.rest))
        return Example(torch.tensor(first + rest), max(len(first), 1))

    @property
    def bytes(self) -> int:
        """The number of bytes that are predicted."""
        return len(self.rest.encode())
