"""Importance of units: the base class, observation during a batch, sums, `score`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from billhook.arguments import check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.engine import (
    SINGLE_PROCESS,
    Comm,
    Loss,
    Reduce,
    Run,
    cpu_by_default,
    evaluating,
    overridden,
    run_with_loss,
    store_of,
    with_progress,
)
from billhook.importance.routing import Routing
from billhook.linalg import Indices, TensorDict
from billhook.model import check_values, expert_layers, find_transformer
from billhook.progress import OnProgress
from billhook.units import PLURAL, Per, Units, UnitsByModule, check_belongs, unit_ids


@dataclass(eq=False)
class Sums:
    """Sums over batches, whose ratio is the importance; the sums of several ranks add up.

    Attributes:
        totals: Sums by module, float64, `[units]`.
        counts: Number of summed tokens, examples, or batches of each unit, by module, float64, `[units]`.
        routing: The tokens that experts received, by module, if the importance observes them.
        experts: Sums of each expert, for channels of experts, by module, float64, `[experts, channels]`.

    >>> sums = Sums({"mlp": torch.zeros(2)}, {"mlp": torch.zeros(2)})
    >>> sums.add("mlp", torch.tensor([1.0, 3.0]), 2)
    >>> sums.totals["mlp"] / sums.counts["mlp"]
    tensor([0.5000, 1.5000])
    """

    totals: TensorDict
    counts: TensorDict
    routing: dict[str, Routing] = field(default_factory=dict)
    experts: TensorDict = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(Sums, vars(self))

    @classmethod
    def zero(cls, units: UnitsByModule, per: Per) -> "Sums":
        """Returns empty sums."""
        totals = {name: torch.zeros(module_units.count(per), dtype=torch.float64) for name, module_units in units.items()}
        experts = {
            name: totals[name].repeat(len(module_units.readers), 1)
            for name, module_units in units.items()
            if module_units.of_experts
        }
        return cls(totals, {name: zeros.clone() for name, zeros in totals.items()}, experts=experts)

    def add(self, name: str, total: Tensor, count: Tensor | float, reader: int | None = None) -> None:
        """Adds the sums of a batch for a module, `[units]`, or of one of its consumer layers."""
        total = total.detach().cpu().double()
        self.totals[name] += total
        self.counts[name] += count
        if name in self.experts and reader is not None:
            self.experts[name][reader] += total


@dataclass(frozen=True)
class Importance(ABC):
    """Scores units; the unit with the lowest score is removed first.

    A custom importance is a subclass, named by `class_path` in YAML.

    Attributes:
        needs_data: Whether it needs batches.
        needs_gradients: Whether it needs gradients, which a streamed model does not have.
        blockwise: Whether it loads the block of a module (`billhook.engine.store`) before it reads weights outside of a forward
            pass. If True, a sharded model is gathered one block at a time.
    """

    needs_data = True
    needs_gradients = False
    blockwise = False

    @abstractmethod
    def sums(self, model: nn.Module, units: UnitsByModule, per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches.

        Args:
            model: The model, in eval mode.
            units: Units by module.
            per: For heads, a score for each `"head"` (query head) or each `"kv_head"`.
            runs: The batches. `SideBySide` runs those of a streamed model in parallel.

        Raises:
            ValueError: If it cannot score these units, a batch gives no score, or the loss does not depend on a module.
        """

    def of_mean(self, mean: Tensor) -> Tensor:
        """Returns the scores of a module from the ratio of its sums: float64, `[units]`."""
        return mean


def check_supports_streaming(importance: Importance) -> None:
    """Raises if an importance needs gradients, which a streamed model does not have."""
    if importance.needs_gradients:
        raise ValueError(
            f"importance={importance} needs gradients, which a streamed model does not have. Use OutputNorm, OBS, "
            "ActivationNorm, WeightNorm, or RandomUnits (for experts REAP, for blocks BlockInfluence or Ablation), or load the "
            "model into memory."
        )


@cpu_by_default()
def score(
    model: nn.Module,
    units: UnitsByModule,
    importance: Importance,
    batches: Batches | None = None,
    loss: Loss | None = None,
    normalize: bool = False,
    per: Per = "head",
    reduce: Reduce | None = None,
) -> TensorDict:
    """Returns an importance score for every unit, leaving model and random state unchanged.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        units: Units by module, as returned by `find_units`. Scores of different kinds of unit are not comparable.
        importance: Any `Importance`, such as `GateGradient()`, `Taylor()`, `OBS()`, or for blocks `BlockInfluence()`.
        batches: Calibration data: batches (dictionaries of forward inputs, including labels) or a `Calibration`. A causal
            language model uses its inputs as labels if there are none. Padding is ignored. A `Run` has its own loss. Defaults to
            `"mixed"` and `"generated"` text for language models.
        loss: Function of model and batch that returns the loss. Defaults to the loss that the model returns.
        normalize: If True, divides the scores of each module by their L2 norm, as Michel et al. (1905.10650) do for heads.
        per: For heads, a score for each `"head"` (query head), or for each `"kv_head"` together with its query heads.
        reduce: Sums a statistic over ranks. Required if each rank has its own batches.

    Returns:
        Scores by module: float32, `[units]`, on the CPU.

    Raises:
        ValueError: If the importance cannot score these units, a batch gives no loss, the loss does not depend on a module, or a
            gradient or a score is NaN or infinite.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "head"), bh.importance.WeightNorm())
        >>> [len(values) for values in scores.values()]
        [8, 8, 8, 8]
    """
    check_types(score, locals())
    subject = find_transformer(model)
    return score_units(subject, units, importance, batches, loss, normalize, per, Comm.of(reduce, subject))


def score_units(
    model: nn.Module,
    units: UnitsByModule,
    importance: Importance,
    batches: Batches | None,
    loss: Loss | None,
    normalize: bool = False,
    per: Per = "head",
    comm: Comm = SINGLE_PROCESS,
    progress: OnProgress | None = None,
) -> TensorDict:
    """Scores units like `score`, on all ranks; `progress` gets batch numbers and the total.

    Raises:
        ValueError: If a score is not finite, or an argument is not legal. See `score`.
    """
    return scores_of(importance, sum_units(model, units, importance, batches, loss, per, comm, progress), normalize, comm)


def sum_units(
    model: nn.Module,
    units: UnitsByModule,
    importance: Importance,
    batches: Batches | None,
    loss: Loss | None,
    per: Per = "head",
    comm: Comm = SINGLE_PROCESS,
    progress: OnProgress | None = None,
) -> Sums:
    """Returns the sums over the batches of all ranks. See `score_units`."""
    unit_ids(units, {}, per)
    check_values(model, streamed=True)
    if not store_of(model).trains:
        check_supports_streaming(importance)
    loaded = read_batches(batches, model) if importance.needs_data else ()
    blocks = store_of(model).independently(comm) if importance.blockwise else store_of(model).all_loaded()
    experts = expert_layers(model) if any(layer.of_experts for layer in units.values()) else nullcontext()
    with evaluating(model), blocks, experts, recomputing(model) if importance.needs_gradients else nullcontext():
        check_belongs(model, units)
        runs = [make_run(model, units, batch, loss) for batch in loaded]
        sums = importance.sums(model, units, per, with_progress(runs, progress) if progress else runs)
    if importance.needs_data:
        comm.sum_(*sums.totals.values(), *sums.counts.values(), *sums.experts.values())
        if not any(count.any() for count in sums.counts.values()):
            raise ValueError(f"batches: {type(importance).__name__} needs at least one batch with non-padding tokens.")
        sums.routing = {name: routing.over_ranks(comm) for name, routing in sums.routing.items()}
    return sums


def rank_channels(sums: Sums, comm: Comm = SINGLE_PROCESS) -> dict[str, Indices]:
    """Ranks the channels of each expert: int64, `[experts, channels]`, by module.

    Experts have channels of their own at each position. Their sums are replaced by those of each rank, the lowest first.
    """
    if not sums.experts:
        return {}
    ranked = {name: totals.sort(dim=1, stable=True) for name, totals in sums.experts.items() if totals.any()}
    sums.totals |= {name: of_module.values.sum(0) for name, of_module in ranked.items()}
    return comm.decide(lambda: {name: of_module.indices.numpy() for name, of_module in ranked.items()})


def scores_of(importance: Importance, sums: Sums, normalize: bool = False, comm: Comm = SINGLE_PROCESS) -> TensorDict:
    """Returns scores by module, float32, `[units]`, from sums over all ranks."""
    scores = {}
    for name, total in sums.totals.items():
        mean = importance.of_mean(total / sums.counts[name].clamp(min=1))
        if not torch.isfinite(mean).all():
            raise ValueError(f"importance: a score of {name} is NaN or infinite. The loss or the model is not finite on a batch.")
        scores[name] = (mean / (mean.norm() + 1e-20) if normalize else mean).float()
    return comm.decide(lambda: scores)  # identical on all ranks, although their sums may be rounded differently


def make_run(model: nn.Module, units: UnitsByModule, batch: Any, loss: Loss | None = None) -> Run:  # noqa: ANN401
    """Returns a batch as the `Run` that `Importance` takes, on the model's device.

    Args:
        model: The model.
        units: Units by module, whose consumer layers need their non-padding tokens.
        batch: The batch, or its run.
        loss: Function of model and batch. Defaults to the model's loss.
    """
    if isinstance(batch, Run):
        return batch
    names = list[str]()
    for module_units in units.values():
        names += [module_units.name] if module_units.kind in ("block", "expert") else module_units.readers
    with expert_layers(model) if any(layer.of_experts for layer in units.values()) else nullcontext():
        return run_with_loss(model, {name: model.get_submodule(name) for name in names}, batch, loss)


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Recomputes activations for gradients in eval mode, if gradient checkpointing is on.

    Transformers does so only in training mode, in which dropout would be active. Blocks that are not always in memory are left
    out.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import if no model has been built yet

    with ExitStack() as stack:
        for part in model.modules() if not store_of(model).blocks else ():
            if isinstance(part, GradientCheckpointingLayer) and part.gradient_checkpointing:
                stack.enter_context(overridden(part, forward=partial(checkpoint, part.forward, use_reentrant=False)))
        yield


def scalar_loss(loss: Tensor) -> Tensor:
    """Returns a differentiable loss; raises if it is not a single number or has no gradient."""
    if loss.numel() != 1:
        raise ValueError(f"loss must be a single number, got a tensor of shape {list(loss.shape)}.")
    if not loss.requires_grad:
        raise ValueError("loss has no gradient, so it depends on no unit. Do not detach it, or compute it under no_grad.")
    return loss.reshape(())


def no_gradient_message(name: str) -> str:
    """Returns the message for a loss that does not depend on a module."""
    return f"loss does not depend on the units of {name}. Score the other modules, or use a loss that depends on them."


def check_consumers(units: UnitsByModule, importance: str) -> None:
    """Raises for units without consumer layers, such as experts and blocks."""
    for name, module_units in units.items():
        if not module_units.readers:
            works = "BlockInfluence, Ablation" if module_units.kind == "block" else "Taylor, WeightNorm"
            raise ValueError(
                f"importance={importance} needs consumer layers, and the units of {name} ({PLURAL[module_units.kind]}) have "
                f"none. Use {works}, or RandomUnits."
            )


def consumer_modules(model: nn.Module, units: Units) -> dict[str, nn.Module]:
    """Returns the consumer layers of units; a layer with several names appears only once."""
    names = {id(model.get_submodule(consumer)): consumer for consumer in reversed(units.readers)}
    return {consumer: model.get_submodule(consumer) for consumer in units.readers if consumer in names.values()}


def by_unit(values: Tensor, units: Units, per: Per) -> Tensor:
    """Sums over the positions of each unit: `[..., positions]` to `[..., units]`."""
    positions, count = units.positions(per), units.count(per)
    size = len(positions) // count
    if np.array_equal(positions, np.repeat(np.arange(count), size)):
        return values if size == 1 else values.reshape(*values.shape[:-1], count, size).sum(-1)
    index = torch.from_numpy(positions % (count + 1)).to(values.device)
    return values.new_zeros(*values.shape[:-1], count + 1).index_add_(-1, index, values)[..., :count]


def mask_padding(values: Tensor, tokens: Tensor | None) -> Tensor:
    """Zeroes values, `[..., size]`, of padding tokens, `[...]`, if shapes fit."""
    if tokens is None or tokens.shape != values.shape[:-1]:
        return values
    return values.masked_fill(~tokens.to(values.device)[..., None], 0)


def count_tokens(values: Tensor, tokens: Tensor | None) -> int:
    """Counts the non-padding tokens of values `[..., size]`, by a mask `[...]`."""
    return values.shape[:-1].numel() if tokens is None or tokens.shape != values.shape[:-1] else int(tokens.sum())
