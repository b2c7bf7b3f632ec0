"""Predictions of a dense model, KL divergence from them, and the text of examples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from billhook.engine import Run, evaluating_without_grad, token_logits

ELEMENTS = 2**22
"""Number of logits to process at once."""
BYTES = 2**28
"""Memory for a dense model's predictions in all runs, at evenly spaced positions."""


class Comparison(NamedTuple):
    """Means over positions of a comparison of predictions p of a dense model with q of a changed one.

    Attributes:
        kl: KL(p || q), in nats.
        agreement: Share of positions with the same most likely token.
        acceptance: Sum of min(p, q): the share of drafted tokens that speculative sampling accepts
            (https://arxiv.org/abs/2211.17192, corollary 3.6).
    """

    kl: float
    agreement: float
    acceptance: float


@dataclass(frozen=True)
class Predictions:
    """Log-probabilities of a run, float32, `[positions, classes]`, and their positions.

    They are stored on the device of the logits, or on the CPU if the device is out of memory.
    """

    positions: Tensor
    logs: Tensor

    @classmethod
    def of(cls, logits: Tensor, runs: int) -> Self:
        """Stores predictions from logits, `[positions, classes]`, in this run's share of `BYTES`."""
        limit = max(BYTES // (4 * logits.shape[-1] * runs), 1)
        positions = torch.linspace(0, len(logits) - 1, min(limit, len(logits))).round().long().to(logits.device)
        try:
            logs = torch.empty(len(positions), logits.shape[-1], device=logits.device)
        except torch.OutOfMemoryError:
            logs = torch.empty(len(positions), logits.shape[-1])
        for part in _parts(logs):
            logs[part] = _log_probs(logits, positions[part], logs.device)
        return cls(positions, logs)

    def divergence(self, logits: Tensor) -> float:
        """Returns the sum of KL(dense || changed) over the stored positions, in nats, by logits.

        They are `[positions, classes]`.
        """
        return _sum([kl_div(now, then, reduction="sum", log_target=True) for now, then in self._pairs(logits)])

    def compare(self, logits: Tensor) -> Comparison:
        """Compares a changed model's logits, `[positions, classes]`, at the stored positions."""
        sums = list[Tensor]()
        for now, then in self._pairs(logits):
            kl = kl_div(now, then, reduction="sum", log_target=True)
            same = (now.argmax(-1) == then.argmax(-1)).sum()
            sums.append(torch.stack([kl, same.to(kl), torch.minimum(now, then).exp().sum()]))
        return Comparison(*(value / len(self.positions) for value in torch.stack(sums).cpu().double().sum(0).tolist()))

    def _pairs(self, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields log-probabilities of the changed and of the dense model, part by part."""
        for part in _parts(self.logs):
            yield _log_probs(logits, self.positions[part], self.logs.device), self.logs[part]


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


def _log_probs(logits: Tensor, positions: Tensor, device: torch.device) -> Tensor:
    return logits[positions.to(logits.device)].to(device).float().log_softmax(-1)


def eval_logits(model: PreTrainedModel, run: Run) -> Tensor:
    """Returns logits at non-padding positions, `[positions, classes]`, in evaluation mode."""
    with evaluating_without_grad(model):
        return compute_logits(model, run)


def compute_logits(model: PreTrainedModel, run: Run) -> Tensor:
    """Returns the logits as `eval_logits` does, for a model in evaluation mode.

    Raises:
        ValueError: If the model has none.
    """
    logits = token_logits(run)
    if logits is None:
        raise ValueError(f"model: {type(model).__name__} has no logits, so its loss cannot be measured.")
    return logits


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
