"""Scores units by an importance, from batches."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from billhook.arguments import annotated
from billhook.calibration.calibration import Batches, batches_of
from billhook.engine.batches import Loss, Run, run_with_loss
from billhook.engine.comm import ALONE, Comm, Reduce
from billhook.engine.state import resting
from billhook.engine.store import store_of
from billhook.importance.base import Importance, Sums
from billhook.importance.gradients import recomputing
from billhook.model.find import find_transformer
from billhook.model.values import check_values
from billhook.units.find import check_held, numbered
from billhook.units.units import Per, Units


@dataclass(frozen=True, eq=False)
class Scoring:
    """Scores the units of a model, whatever the batches; see `score` for what these are."""

    model: nn.Module
    units: Mapping[str, Units]
    importance: Importance
    loss: Loss | None = None
    normalize: bool = False
    per: Per = "head"
    comm: Comm = ALONE

    def __post_init__(self) -> None:
        numbered(self.units, {}, self.per)
        check_values(self.model, coming=True)
        check_trains(self.model, self.importance)
        check_held(self.model, self.units)

    def sums(self, batches: Iterable[Any]) -> Sums:
        """Sums over batches; of an importance that needs none, over nothing."""
        given = batches if self.importance.needs_data else ()
        turns = store_of(self.model).apart(self.comm) if self.importance.in_turn else store_of(self.model).all_here()
        with resting(self.model), turns, recomputing(self.model) if self.importance.needs_gradients else nullcontext():
            runs = [run_of(self.model, self.units, batch, self.loss) for batch in given]
            return self.importance.sums(self.model, self.units, self.per, runs)

    def scores(self, sums: Sums) -> dict[str, Tensor]:
        """Returns the scores of each place, of the sums of all ranks, as the first rank computes them: all choose by the same."""
        totals, counts = ({name: own.clone() for name, own in part.items()} for part in (sums.totals, sums.counts))
        if self.importance.needs_data:
            self.comm.sum_(*totals.values(), *counts.values())
            if not any(count.any() for count in counts.values()):
                name = type(self.importance).__name__
                raise ValueError(f"batches: {name} needs at least one batch, with tokens that count")
        scores = {name: self._of(name, total, counts[name]) for name, total in totals.items()}
        return self.comm.decide(lambda: scores)

    def _of(self, place: str, total: Tensor, count: Tensor) -> Tensor:
        scores = self.importance.of_mean(total / count.clamp(min=1))
        if not torch.isfinite(scores).all():
            raise ValueError(
                f"importance: a score of {place} is NaN or infinite: the loss, or the model, is not finite on a batch"
            )
        return (scores / (scores.norm() + 1e-20) if self.normalize else scores).float()


def check_trains(model: nn.Module, importance: Importance) -> None:
    """Refuses an importance that needs gradients, of a model that has none, as it is streamed."""
    if not store_of(model).trains:
        check_streams(importance)


def check_streams(importance: Importance) -> None:
    """Refuses an importance that needs gradients, of a model that is streamed."""
    if importance.needs_gradients:
        raise ValueError(
            f"importance={importance}: it needs gradients, and the model is streamed, one block at a time: take OutputNorm, OBS, "
            "ActivationNorm, WeightNorm or RandomUnits, of blocks BlockInfluence or Ablation, or score it in memory"
        )


def score(
    model: nn.Module,
    units: Mapping[str, Units],
    importance: Importance,
    batches: Batches | None = None,
    loss: Loss | None = None,
    normalize: bool = False,
    per: Per = "head",
    reduce: Reduce | None = None,
) -> dict[str, Tensor]:
    """Scores each unit; the model is as before afterwards, modes and random numbers too.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        units: The units, by place, as `find_units` returns them; scores of different kinds should not be compared.
        importance: Any `Importance`, such as `GateGradient()`, `Taylor()`, `OBS()` or, of blocks, `BlockInfluence()`.
        batches: Inputs of the model's forward, as dictionaries, labels included; a causal language model's own inputs are its
            labels where there are none. Padding (by `attention_mask`) does not count. A `Run` brings its own loss. A
            `Calibration` reads them; by default they are what the model itself writes.
        loss: From model and batch to the number that is to be small; by default the loss that the model returns.
        normalize: Whether the scores of each place are divided by their L2 norm, as Michel et al. (1905.10650) do with heads.
        per: For heads, one score for each `"head"` (query head), or for each `"kv_head"` with the query heads that it serves.
        reduce: Sums a tensor over ranks, if each has batches of its own.

    Returns:
        By place: float32, `[units]`, on the CPU.

    Raises:
        ValueError: If the importance cannot score such units, a batch gives no loss, the loss does not depend on a place, or
            a gradient or a score is NaN or infinite.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "head"), bh.WeightNorm())
        >>> [len(own) for own in scores.values()]
        [8, 8, 8, 8]
    """
    annotated(score, locals())
    subject = find_transformer(model)
    scoring = Scoring(subject, units, importance, loss, normalize, per, Comm.of(reduce, subject))
    return scoring.scores(scoring.sums(batches_of(batches, subject) if importance.needs_data else ()))


def run_of(model: nn.Module, units: Mapping[str, Units], batch: Any, loss: Loss | None = None) -> Run:  # noqa: ANN401
    """Returns a batch as `Importance` takes it, on the model's device."""
    if isinstance(batch, Run):
        return batch
    names = [name for one in units.values() for name in ([one.name] if one.kind == "block" else one.readers)]
    return run_with_loss(model, {name: model.get_submodule(name) for name in names}, batch, loss)
