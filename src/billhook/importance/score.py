"""Scores of units from batches: which of them matter, and what a metric is without each head."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from billhook.importance.base import Importance, Sums
from billhook.importance.gate_gradient import GateGradient
from billhook.model.find import find_transformer
from billhook.running.batches import Loss, Run, run_with_loss
from billhook.running.undisturbed import resting
from billhook.units.heads import check_layers, find_heads
from billhook.units.units import Per, Units

"""From the model and a batch to one number, with a gradient."""
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, in place."""


def head_importance(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    importance: Importance | None = None,
    loss: Loss | None = None,
    normalize: bool = True,
    per: Per = "head",
) -> dict[str, Tensor]:
    """How much each head of a model matters; the model is as before afterwards, modes and random numbers too.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        batches: What the model's forward takes, as dictionaries, labels included; a causal language model's own inputs are its
            labels where there are none. Padding (by `attention_mask`) does not count.
        importance: `GateGradient()` (1905.10650; the default), `Taylor`, `WeightNorm`, `ActivationNorm`, `OutputNorm`,
            `RandomUnits` or `Ablation`.
        loss: What of a batch is to be small; by default the loss that the model gives.
        normalize: Whether the scores of each layer are divided by their L2 norm, as the paper does.
        per: One score for each `"head"` (query head), or for each `"kv_head"` with the query heads that it serves.

    Returns:
        By the name of each attention, in the order in which they run: float32, `[heads]`, on the CPU.

    Raises:
        ValueError: If there are no heads, or as `unit_importance`.
    """
    heads = find_heads(find_transformer(model))
    check_layers(heads, {}, per)
    return unit_importance(model, heads, batches, importance, loss, normalize, per)


def unit_importance(
    model: nn.Module,
    units: Mapping[str, Units],
    batches: Iterable[Any] | None = None,
    importance: Importance | None = None,
    loss: Loss | None = None,
    normalize: bool = True,
    per: Per = "head",
) -> dict[str, Tensor]:
    """How much each unit of some places matters; the model is as before afterwards, modes and random numbers too.

    Args:
        model: As in `head_importance`.
        units: The units, by place, as `find_units` gives them; those whose scores are compared should be of one kind.
        batches: As in `head_importance`.
        importance: `GateGradient()` (the default), `Taylor`, `WeightNorm`, `ActivationNorm`, `OutputNorm`, `RandomUnits` or
            `Ablation`. Of experts nothing reads, so that only `Taylor`, `WeightNorm` and `RandomUnits` tell of them.
        loss: As in `head_importance`.
        normalize: Whether the scores of each place are divided by their L2 norm.
        per: Of heads, as in `head_importance`; of other units it says nothing.

    Returns:
        By place: float32, `[units]`, on the CPU.

    Raises:
        ValueError: If the importance cannot tell of such units, a batch gives no loss, the loss does not depend on a place, or
            a gradient or a score is NaN or infinite.
    """
    importance = importance or GateGradient()
    subject = find_transformer(model)
    if importance.needs_data and batches is None:
        raise ValueError(f"batches=None: {type(importance).__name__} needs batches")
    given = batches if importance.needs_data and batches is not None else ()
    trials = [trial_of(subject, units, batch, loss) for batch in given]
    with resting(subject):
        return score(subject, units, importance, trials, normalize, per)


def score(
    model: nn.Module,
    units: Mapping[str, Units],
    importance: Importance,
    trials: list[Run],
    normalize: bool = True,
    per: Per = "head",
    reduce: Reduce | None = None,
) -> dict[str, Tensor]:
    """What `unit_importance` does, of batches that are ready.

    Raises:
        ValueError: As `unit_importance`.
    """
    sums = importance.sums(model, units, per, trials)
    sums = _reduced(sums, reduce) if importance.needs_data and reduce is not None else sums
    if importance.needs_data and not any(sums.counts.values()):
        raise ValueError(f"batches: {type(importance).__name__} needs at least one batch, with tokens that count")
    scores = {}
    for name, total in sums.totals.items():
        mean = importance.of_mean(total / sums.counts[name].clamp(min=1))
        if not torch.isfinite(mean).all():
            raise ValueError(
                f"importance: a score of {name} is NaN or infinite: the loss, or the model, is not finite on a batch"
            )
        scores[name] = (mean / (mean.norm() + 1e-20) if normalize else mean).float()
    return scores


def trial_of(model: nn.Module, units: Mapping[str, Units], batch: Any, loss: Loss | None = None) -> Run:  # noqa: ANN401
    """A batch as `Importance` takes it, on the model's device."""
    readers = {reader: model.get_submodule(reader) for one in units.values() for reader in one.readers}
    return run_with_loss(model, readers, batch, loss)


def _reduced(sums: Sums, reduce: Reduce) -> Sums:
    """The sums of all ranks, in one exchange."""
    packed = reduce(torch.cat([*sums.totals.values(), torch.stack(list(sums.counts.values()))]))
    parts = torch.split(packed, [*(len(total) for total in sums.totals.values()), len(sums.counts)])
    totals = dict(zip(sums.totals, parts[:-1], strict=True))
    return Sums(totals, dict(zip(sums.counts, parts[-1], strict=True)))
