"""Scores of units from batches: which of them matter, and what a metric is without each head."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from billhook.resting import resting
from billhook.structure.ablation import ablating
from billhook.structure.heads import check_layers, find_heads
from billhook.structure.importance import GateGradient, Importance, Sums
from billhook.structure.probes import Trial
from billhook.structure.shape import find_transformer
from billhook.structure.units import Per, Units

Loss = Callable[[nn.Module, Any], Tensor]
"""From the model and a batch to one number, with a gradient."""
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, in place."""
Mode = Literal["without", "only"]


@dataclass(frozen=True)
class HeadAblation:
    """What a metric is when heads are masked, the paper's tables 1 to 3.

    Attributes:
        mode: `"without"` each head alone, or with it as the `"only"` one of its layer.
        whole: The metric with all heads.
        values: By attention, the metric for each of its heads: float64, `[heads]`.
    """

    mode: Mode
    whole: float
    values: dict[str, Tensor]

    def __str__(self) -> str:
        what = "without each head" if self.mode == "without" else "each head alone in its layer"
        lines = [f"{what}: change of {self.whole:.4f}"]
        width = max(map(len, self.values))
        for name, values in self.values.items():
            lines.append(f"  {name:<{width}} " + " ".join(f"{float(value - self.whole):+8.4f}" for value in values))
        return "\n".join(lines)


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
    trials: list[Trial],
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


def ablate_heads(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Loss | None = None,
    mode: Mode = "without",
    per: Per = "head",
) -> HeadAblation:
    """A metric without each head alone, or with it as the only one of its layer (1905.10650, sections 3.2 and 3.3).

    Args:
        model: As in `head_importance`.
        batches: As in `head_importance`; each is run once for every head.
        metric: From model and batch to a number, such as accuracy; by default the loss. Its mean over the batches is taken.
        mode: `"without"` or `"only"`.
        per: Whether heads are query heads, or KV heads with the query heads that they serve.

    Raises:
        ValueError: If there are no heads or no batches, or `mode` or `per` are not legal.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} must be one of {', '.join(get_args(Mode))}")
    subject = find_transformer(model)
    heads = find_heads(subject)
    check_layers(heads, {}, per)
    trials = [trial_of(subject, heads, batch, metric) for batch in batches]
    if not trials:
        raise ValueError("batches: at least one is needed")
    values = {name: torch.zeros(one.count(per), dtype=torch.float64) for name, one in heads.items()}
    whole = 0.0
    with resting(subject), ablating(subject, heads, per) as gates, torch.no_grad():
        for trial in trials:
            whole += float(trial.loss()) / len(trials)
            for name, gate in gates.items():
                for head in range(len(gate)):
                    gate.fill_(1 if mode == "without" else 0)
                    gate[head] = 0 if mode == "without" else 1
                    values[name][head] += float(trial.loss()) / len(trials)
                gate.fill_(1)
    return HeadAblation(mode, whole, values)


def trial_of(model: nn.Module, units: Mapping[str, Units], batch: Any, loss: Loss | None = None) -> Trial:  # noqa: ANN401
    """A batch as `Importance` takes it, on the model's device."""
    readers = {reader: model.get_submodule(reader) for one in units.values() for reader in one.readers}
    return trial_for(model, readers, batch, loss)


def trial_for(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any, loss: Loss | None = None) -> Trial:  # noqa: ANN401
    """The same, with the tokens that count for some modules."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    batch = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
    run = partial(loss or own_loss, model)
    return Trial(partial(run, batch), tokens_of(model, modules, batch), lambda: [partial(run, one) for one in examples_of(batch)])


def examples_of(batch: Any) -> list[Any]:  # noqa: ANN401
    """The examples of a batch, each a batch of one: slices of its tensors along their first dimension.

    A tensor that has one entry there, as positions may, goes with each of them.

    Raises:
        ValueError: If its tensors do not agree on how many there are.
    """
    shapes = [tuple(one.shape) for one in tree_leaves(batch) if isinstance(one, Tensor)]
    counts = {shape[0] if shape else 0 for shape in shapes}
    count = max(counts, default=0)
    if not count or counts - {1, count}:
        raise ValueError(
            "batches: a batch with tensors of shapes "
            f"{', '.join(map(str, shapes)) or 'none'} cannot be taken apart into its examples along the first dimension, which "
            "order='second' and 'mixed' need"
        )

    def take(number: int, tensor: Tensor) -> Tensor:
        return tensor if len(tensor) == 1 else tensor[number : number + 1]

    return [tree_map_only(Tensor, partial(take, number), batch) for number in range(count)]


def own_loss(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
    """The loss that a model gives; a causal language model predicts its inputs, where there are no labels.

    Raises:
        ValueError: If it gives none.
    """
    if not isinstance(batch, dict):
        raise ValueError(
            f"batches: a {type(batch).__name__} is no dictionary of what the model takes: give `loss` to make use of it"
        )
    config: Any = getattr(model, "config", None)
    writes = getattr(model, "can_generate", lambda: False)() and not getattr(config, "is_encoder_decoder", False)
    if "labels" not in batch and writes and "input_ids" in batch:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if mask is not None:  # neither is padding predicted, nor does it predict
            ids = ids.masked_fill((mask == 0) | (mask.roll(1, -1) == 0), -100)
        batch = batch | {"labels": ids}
    found: Tensor | None = getattr(model(**batch), "loss", None)
    if found is None:
        raise ValueError(f"batches: {type(model).__name__} gives no loss for {', '.join(batch)}: add labels, or give `loss`")
    return found


def tokens_of(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """For each of some modules, which of the tokens that it reads count, where a batch says so: bool, `[batch, length]`."""
    if not isinstance(batch, Mapping):
        return {}
    mask, later = batch.get("attention_mask"), batch.get("decoder_attention_mask")
    if later is None and isinstance(batch.get("labels"), Tensor):
        later = batch["labels"] != -100
    decoder: Any = None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = getattr(model, "get_decoder", lambda: None)()
    inside = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    first, second = (one.bool() if isinstance(one, Tensor) and one.dim() == 2 else None for one in (mask, later))
    masks = {name: second if module in inside else first for name, module in modules.items()}
    return {name: one for name, one in masks.items() if one is not None}


def _reduced(sums: Sums, reduce: Reduce) -> Sums:
    """The sums of all ranks, in one exchange."""
    packed = reduce(torch.cat([*sums.totals.values(), torch.stack(list(sums.counts.values()))]))
    parts = torch.split(packed, [*(len(total) for total in sums.totals.values()), len(sums.counts)])
    totals = dict(zip(sums.totals, parts[:-1], strict=True))
    return Sums(totals, dict(zip(sums.counts, parts[-1], strict=True)))
