"""Stored predictions of a dense model, and the KL divergence of a changed model from them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel
from typing_extensions import Self

from billhook.engine.batches import Run, token_logits
from billhook.engine.state import evaluating_without_grad

ELEMENTS = 2**22
"""Number of logits to process at once."""
BYTES = 2**28
"""Memory for a dense model's predictions in all runs, at evenly spaced positions."""


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
        device = self.logs.device
        each = ((_log_probs(logits, self.positions[part], device), self.logs[part]) for part in _parts(self.logs))
        return _sum([kl_div(now, then, reduction="sum", log_target=True) for now, then in each])


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
