"""Measures how many times its perplexity a changed model has on batches."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from billhook.engine.batches import Run
from billhook.engine.state import undisturbed


class Perplexity:
    """The loss of a dense model on batches, to compare a changed one's with.

    Args:
        model: The dense model.
        runs: Runs of it that return the loss, with the names of their sources.
        agreed: Returns, of what several ranks have measured alike, that of the first.

    Raises:
        ValueError: If a loss is not finite.
    """

    def __init__(self, model: PreTrainedModel, runs: Sequence[Run], agreed: Callable[[Any], Any] = lambda value: value) -> None:
        self._model, self._runs, self._agreed = model, runs, agreed
        self._dense = self._losses()
        if not all(map(math.isfinite, self._dense)):
            raise ValueError(f"batches: the loss of this {type(model).__name__} is NaN or infinite on a batch")

    def ratio(self) -> float:
        """Measures the model as it is now: exp of how much its loss has risen, the mean over sources."""
        rises: dict[str, list[float]] = {}
        for run, before, after in zip(self._runs, self._dense, self._losses(), strict=True):
            rises.setdefault(run.source, []).append(after - before)
        mean = sum(sum(own) / len(own) for own in rises.values()) / len(rises)
        return math.exp(mean) if mean < math.log(1e9) else math.inf

    def _losses(self) -> list[float]:
        with undisturbed(self._model):
            losses: list[float] = self._agreed([float(run.forward()) for run in self._runs])
        return losses
