"""How much each unit of a model matters: the base class of importances, sums over batches, and scores by them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from billhook.arguments import check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.engine.batches import Loss, Run, run_with_loss, with_progress
from billhook.engine.comm import SINGLE_PROCESS, Comm, Reduce
from billhook.engine.state import evaluating, overridden
from billhook.engine.store import store_of
from billhook.model.find import check_values, find_transformer
from billhook.progress import OnProgress
from billhook.units.find import check_belongs, unit_ids
from billhook.units.units import Per, Units


@dataclass(eq=False)
class Sums:
    """Sums over batches, whose ratio is the importance; those of several ranks add up.

    Attributes:
        totals: By place, float64, `[units]`.
        counts: By place, the number of tokens, examples or batches that were summed for each unit: float64, `[units]`.
    """

    totals: dict[str, Tensor]
    counts: dict[str, Tensor]

    @classmethod
    def zero(cls, units: Mapping[str, Units], per: Per) -> "Sums":
        """Returns sums over nothing."""
        totals = {name: torch.zeros(of_place.count(per), dtype=torch.float64) for name, of_place in units.items()}
        return cls(totals, {name: zeros.clone() for name, zeros in totals.items()})

    def add(self, name: str, total: Tensor, count: Tensor | float) -> None:
        """Adds the sums of one batch for one place."""
        self.totals[name] += total.detach().cpu().double()
        self.counts[name] += count


@dataclass(frozen=True)
class Importance(ABC):
    """How much a unit matters; the higher, the longer it stays. A subclass is one file, also one of your own by `class_path`.

    Attributes:
        needs_data: Whether it needs batches.
        needs_gradients: Whether it needs gradients, which a streamed model has not.
        blockwise: Whether it has the block of a module brought (`billhook.engine.store.bring`) before it looks into its weights
            other than in a forward, so that one block at a time of a model that ranks share need be whole.
    """

    needs_data: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = False
    blockwise: ClassVar[bool] = False

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


def check_has_gradients(model: nn.Module, importance: Importance) -> None:
    """Refuses an importance that needs gradients, of a model that has none, as it is streamed."""
    if not store_of(model).trains:
        check_supports_streaming(importance)


def check_supports_streaming(importance: Importance) -> None:
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
        >>> scores = bh.score(model, bh.find_units(model, "head"), bh.importance.WeightNorm())
        >>> [len(of_place) for of_place in scores.values()]
        [8, 8, 8, 8]
    """
    check_types(score, locals())
    subject = find_transformer(model)
    return score_units(subject, units, importance, batches, loss, normalize, per, Comm.of(reduce, subject))


def score_units(
    model: nn.Module,
    units: Mapping[str, Units],
    importance: Importance,
    batches: Batches | None = None,
    loss: Loss | None = None,
    normalize: bool = False,
    per: Per = "head",
    comm: Comm = SINGLE_PROCESS,
    progress: OnProgress | None = None,
) -> dict[str, Tensor]:
    """Scores units as `score`; `progress` is called with how many batches have been scored, and how many there are."""
    unit_ids(units, {}, per)
    check_values(model, coming=True)
    check_has_gradients(model, importance)
    check_belongs(model, units)
    read = read_batches(batches, model) if importance.needs_data else ()
    blocks = store_of(model).apart(comm) if importance.blockwise else store_of(model).all_loaded()
    with evaluating(model), blocks, recomputing(model) if importance.needs_gradients else nullcontext():
        runs = [make_run(model, units, batch, loss) for batch in read]
        sums = importance.sums(model, units, per, with_progress(runs, progress) if progress else runs)
    if importance.needs_data:
        comm.sum_(*sums.totals.values(), *sums.counts.values())
        if not any(count.any() for count in sums.counts.values()):
            raise ValueError(f"batches: {type(importance).__name__} needs at least one batch, with tokens that count")
    scores = dict[str, Tensor]()
    for name, total in sums.totals.items():
        mean = importance.of_mean(total / sums.counts[name].clamp(min=1))
        if not torch.isfinite(mean).all():
            raise ValueError(
                f"importance: a score of {name} is NaN or infinite: the loss, or the model, is not finite on a batch"
            )
        scores[name] = (mean / (mean.norm() + 1e-20) if normalize else mean).float()
    return comm.decide(lambda: scores)  # all ranks choose by the same, whatever their sums are rounded to


def make_run(model: nn.Module, units: Mapping[str, Units], batch: Any, loss: Loss | None = None) -> Run:  # noqa: ANN401
    """Returns a batch as `Importance` takes it, on the model's device."""
    if isinstance(batch, Run):
        return batch
    names = [name for units_of in units.values() for name in ([units_of.name] if units_of.kind == "block" else units_of.readers)]
    return run_with_loss(model, {name: model.get_submodule(name) for name in names}, batch, loss)


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Has layers recompute their activations for gradients, as in training, where checkpointing is on, while they rest.

    Transformers itself does so in training mode alone, in which dropout would act, too. Blocks that come and go are left out.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # a quarter of a second where no model was made before

    with ExitStack() as stack:
        for part in model.modules() if not store_of(model).blocks else ():
            if isinstance(part, GradientCheckpointingLayer) and part.gradient_checkpointing:
                stack.enter_context(overridden(part, forward=partial(_recomputed, part.forward)))
        yield


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever a layer takes
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)
