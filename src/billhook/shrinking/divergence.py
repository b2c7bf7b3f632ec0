"""Measures how far a changed model's predictions are from the dense model's: the KL divergence, on any batches."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from billhook.report.predictions import Predictions, logits_in
from billhook.running.batches import Run


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
        self._held = [(run, Predictions.of(logits_in(model, run), len(runs))) for run in runs]

    def by_source(self) -> dict[str, float]:
        """Measures the model as it is now: by source, the mean of KL(dense || now) over positions, in nats."""
        sums: dict[str, list[float]] = {}
        for run, dense in self._held:
            own = sums.setdefault(run.source, [0.0, 0.0])
            total = dense.divergence(logits_in(self._model, run))
            sums[run.source] = [own[0] + total, own[1] + len(dense.positions)]
        return {source: total / count for source, (total, count) in sums.items()}

    def mean(self) -> float:
        """Measures the model as it is now: the mean over sources."""
        return mean_of(self.by_source())


def mean_of(by_source: Mapping[str, float]) -> float:
    """Returns the mean over sources."""
    return sum(by_source.values()) / len(by_source)
