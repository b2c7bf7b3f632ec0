"""How much each unit of a model matters: the base class of importances, sums over batches, and scores by them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from billhook.arguments import annotated
from billhook.bar import Told
from billhook.calibration.calibration import Batches, batches_of
from billhook.calibration.enough import FIRST, Chosen, Settled, interleaved, settle, steps
from billhook.engine.batches import Loss, Run, run_with_loss, telling
from billhook.engine.comm import ALONE, Comm, Reduce
from billhook.engine.state import resting
from billhook.engine.store import store_of
from billhook.importance.probes import recomputing
from billhook.model.find import check_values, find_transformer
from billhook.units.find import check_held, numbered
from billhook.units.units import Per, Units


@dataclass(eq=False)
class Sums:
    """Sums over batches, whose ratio is the importance; those of several ranks, or of other batches, add up.

    Attributes:
        totals: By place, float64, `[units]`.
        counts: By place, the number of tokens, examples or batches that were summed for each unit: float64, `[units]`.
    """

    totals: dict[str, Tensor]
    counts: dict[str, Tensor]

    @classmethod
    def zero(cls, units: Mapping[str, Units], per: Per) -> "Sums":
        """Returns sums over nothing."""
        empty = ({name: torch.zeros(one.count(per), dtype=torch.float64) for name, one in units.items()} for _ in range(2))
        return cls(*empty)

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Adds the sums of one batch for one place."""
        self.totals[name] += total.detach().cpu().double()
        self.counts[name] += count

    def merge(self, other: "Sums") -> None:
        """Adds the sums over other batches, of the same places."""
        for name, total in other.totals.items():
            self.add(name, total, other.counts[name])


@dataclass(frozen=True)
class Importance(ABC):
    """How much a unit matters; the higher, the longer it stays. A subclass is one file, also one of your own by `class_path`.

    Attributes:
        needs_data: Whether it needs batches.
        needs_gradients: Whether it needs gradients, which a streamed model has not.
        in_turn: Whether it has the block of a module brought (`billhook.engine.store.bring`) before it looks into its weights
            other than in a forward, so that one block at a time of a model that ranks share need be whole.
    """

    needs_data: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False
    in_turn: ClassVar[bool] = False

    @property
    def adds_up(self) -> bool:
        """Tells whether `Sums.merge` of the sums over some batches and over others gives those over all of them."""
        return True

    @abstractmethod
    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches.

        Args:
            model: The model, in eval mode.
            units: Its units, by place.
            per: For heads, whether there is a score for each query head or each KV head.
            runs: The batches; of a model that is streamed, `Together` runs them side by side.

        Raises:
            ValueError: If it cannot score such units, a batch gives no score, or the loss does not depend on a place.
        """

    def of_mean(self, mean: Tensor) -> Tensor:
        """Returns the scores of a place from the ratio of its sums: float64, `[units]`."""
        return mean


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


def score_enough(
    scoring: Scoring,
    batches: Iterable[Any],
    choose: Callable[[dict[str, Tensor]], Chosen],
    enough: float | None,
    progress: Told | None = None,
) -> tuple[dict[str, Tensor], Settled | None]:
    """Scores units on more and more batches, until a choice by the scores is settled.

    The sums over batches add up, so that each batch is scored once; where an importance says that its own do not, a step scores
    all of its batches again.

    Args:
        scoring: How units are scored.
        batches: All that may be used, on each rank as many, or one fewer.
        choose: Chooses units by their scores, which it may change.
        enough: The agreement that is asked for, in (0, 1]; None uses all batches.
        progress: Is called with how many batches have been scored, and how many may be.

    Returns:
        The scores, and how settled the choice is; None where it does not depend on batches, or all of them are to be used.
    """
    if progress is not None and scoring.importance.needs_data:
        batches = telling([run_of(scoring.model, scoring.units, batch, scoring.loss) for batch in batches], progress)
    if enough is None or not scoring.importance.needs_data:
        return scoring.scores(scoring.sums(batches)), None
    mixed = interleaved(list(batches))
    count, ranks = _total(scoring, [len(mixed), 1])
    if count < 2 * ranks:
        return scoring.scores(scoring.sums(mixed)), Settled(count, count, None, None, enough)
    sizes = steps(len(mixed), max(int(math.log2(count / max(FIRST, 2 * ranks))), 0))
    how = partial(_Seen.of, scoring), partial(_joined, scoring), lambda seen: choose(scoring.scores(seen.sums))
    seen, settled = settle(*how, mixed, sizes, enough)
    used = _total(scoring, sizes)[sizes.index(settled.batches)]
    return scoring.scores(seen.sums), replace(settled, batches=used, of=count)


@dataclass
class _Seen:
    """Batches, and the sums over them."""

    batches: list[Any]
    sums: Sums

    @classmethod
    def of(cls, scoring: Scoring, batches: Iterable[Any]) -> "_Seen":
        """Sums over batches."""
        given = list(batches)
        return cls(given, scoring.sums(given))


def _joined(scoring: Scoring, one: _Seen, other: _Seen) -> _Seen:
    """Sums over the batches of both, without scoring them again if that can be."""
    batches = one.batches + other.batches
    if not scoring.importance.adds_up:
        return _Seen.of(scoring, batches)
    one.sums.merge(other.sums)
    return _Seen(batches, one.sums)


def _total(scoring: Scoring, numbers: list[int]) -> list[int]:
    """Sums numbers over ranks."""
    total: list[int] = scoring.comm(torch.tensor(numbers, device=scoring.comm.device)).tolist()
    return total
