"""Holds what a dense model predicts, so that a changed one can be compared with it: the KL divergence."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel
from typing_extensions import Self

from billhook.engine.batches import Run
from billhook.engine.state import evaluating_without_grad

ELEMENTS = 2**22
"""How many logits are worked on at once."""
BYTES = 2**28
"""How much of a dense model's predictions is held, of all runs together: evenly spaced positions."""


@dataclass(frozen=True)
class Predictions:
    """Log-probabilities in one run, float32, `[positions, classes]`, and the positions.

    They lie on the device of the logits, where they are compared; on the CPU if there is no memory for them.
    """

    positions: Tensor
    logs: Tensor

    @classmethod
    def of(cls, logits: Tensor, runs: int) -> Self:
        """Holds a share, one of so many, of what fits."""
        few = max(BYTES // (4 * logits.shape[-1] * runs), 1)
        positions = torch.linspace(0, len(logits) - 1, min(few, len(logits))).round().long().to(logits.device)
        try:
            logs = torch.empty(len(positions), logits.shape[-1], device=logits.device)
        except torch.OutOfMemoryError:
            logs = torch.empty(len(positions), logits.shape[-1])
        for some in _parts(logs):
            logs[some] = _logs(logits, positions[some], logs.device)
        return cls(positions, logs)

    def divergence(self, logits: Tensor) -> float:
        """Adds up KL(dense || now) over the positions held, in nats."""
        device = self.logs.device
        each = ((_logs(logits, self.positions[some], device), self.logs[some]) for some in _parts(self.logs))
        return _sum([kl_div(now, then, reduction="sum", log_target=True) for now, then in each])


def mean_loss(logits: Tensor, labels: Tensor) -> float:
    """Returns the mean cross-entropy of logits, `[positions, classes]`, in float32, a few positions at a time."""
    return _sum([cross_entropy(logits[some].float(), labels[some], reduction="sum") for some in _parts(logits)]) / len(logits)


def _sum(sums: Sequence[Tensor]) -> float:
    """Adds up numbers of a device in double precision, which come to the host together."""
    return sum(torch.stack(list(sums)).tolist(), 0.0) if sums else 0.0


def _parts(logits: Tensor) -> Iterator[slice]:
    """Yields a few positions at a time, so that what is computed of them is small beside the logits."""
    step = max(ELEMENTS // logits.shape[-1], 1)
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def _logs(logits: Tensor, positions: Tensor, device: torch.device) -> Tensor:
    return logits[positions.to(logits.device)].to(device).float().log_softmax(-1)


def eval_logits(model: PreTrainedModel, run: Run) -> Tensor:
    """Returns the logits at all positions that count, `[positions, classes]`; refuses a model without logits."""
    with evaluating_without_grad(model):
        return compute_logits(model, run)


def compute_logits(model: PreTrainedModel, run: Run) -> Tensor:
    """Returns the logits as `eval_logits` does, of a model that is in evaluation mode already."""
    logits = getattr(run.forward(), "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"model: {type(model).__name__} predicts nothing (it has no logits), so no loss can be told")
    mask = run.tokens.get("decoder_attention_mask", run.tokens.get("attention_mask"))
    counts = mask is not None and mask.shape == logits.shape[:-1]
    return logits[mask] if counts else logits.flatten(0, -2)
