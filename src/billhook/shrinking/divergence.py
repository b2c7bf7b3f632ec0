"""Measures how far a changed model's predictions are from the dense model's: the KL divergence, on any batches."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from billhook.running.batches import Run
from billhook.running.undisturbed import undisturbed

BYTES = 2**28
"""How much of the dense model's predictions is held: evenly spaced positions."""


class Divergence:
    """Predictions of a dense model on batches, held so that a changed one can be compared with it.

    Args:
        model: The dense model.
        runs: Runs of it, without a loss, with the names of their sources.

    Raises:
        ValueError: If it predicts nothing, as it has no `logits`.
    """

    def __init__(self, model: PreTrainedModel, runs: Sequence[Run]) -> None:
        self._model = model
        self._held = [(run, *self._read(run, len(runs))) for run in runs]

    def by_source(self) -> dict[str, float]:
        """Measures the model as it is now: by source, the mean of KL(dense || now) over positions, in nats."""
        sums: dict[str, list[float]] = {}
        for run, positions, dense in self._held:
            now = self._logits(run)[positions].float().cpu().log_softmax(-1)
            total = float(kl_div(now, dense, reduction="sum", log_target=True))
            own = sums.setdefault(run.source, [0.0, 0.0])
            sums[run.source] = [own[0] + total, own[1] + len(positions)]
        return {source: total / count for source, (total, count) in sums.items()}

    def mean(self) -> float:
        """Measures the model as it is now: the mean over sources."""
        return mean_of(self.by_source())

    def _read(self, run: Run, runs: int) -> tuple[Tensor, Tensor]:
        logits = self._logits(run)
        few = max(BYTES // (4 * logits.shape[-1] * runs), 1)
        positions = torch.linspace(0, len(logits) - 1, min(few, len(logits))).round().long()
        return positions, logits[positions].float().cpu().log_softmax(-1)

    def _logits(self, run: Run) -> Tensor:
        """Returns the logits at all positions that count, `[positions, classes]`."""
        with undisturbed(self._model):
            logits = getattr(run.forward(), "logits", None)
        if not isinstance(logits, Tensor):
            raise ValueError(f"model: {type(self._model).__name__} predicts nothing (it has no logits), so no loss can be told")
        mask = run.tokens.get("decoder_attention_mask", run.tokens.get("attention_mask"))
        counts = mask is not None and mask.shape == logits.shape[:-1]
        return logits[mask] if counts else logits.flatten(0, -2)


def mean_of(by_source: Mapping[str, float]) -> float:
    """Returns the mean over sources."""
    return sum(by_source.values()) / len(by_source)
