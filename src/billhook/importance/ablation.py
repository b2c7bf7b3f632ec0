"""How much higher the loss is without a unit: the measure that the others stand for, and the dearest."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from billhook.importance.base import Importance, Sums
from billhook.importance.probes import check_read
from billhook.importance.score import trial_of
from billhook.model.find import find_transformer
from billhook.running.batches import Loss, Run
from billhook.running.undisturbed import resting
from billhook.units.gates import place_gates
from billhook.units.heads import check_layers, find_heads
from billhook.units.units import Per, Units

Mode = Literal["without", "only"]


@dataclass(frozen=True)
class Ablation(Importance):
    """How much higher the loss is without the unit, all others being there (1905.10650, section 3.2): one forward a unit.

    Raises:
        ValueError: When it runs: if nothing reads the units alone.
    """

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, trials: Sequence[Run]) -> Sums:
        """See `Importance.sums`."""
        check_read(units, type(self).__name__)
        sums = Sums.zero(units, per)
        with ablating(model, units, per) as gates, torch.no_grad():
            for trial in trials:
                whole = float(trial.forward())
                for name, gate in gates.items():
                    losses = [_without(trial, gate, unit) for unit in range(len(gate))]
                    sums.add(name, torch.tensor(losses, dtype=torch.float64) - whole, 1)
        return sums


@contextmanager
def ablating(model: nn.Module, units: Mapping[str, Units], per: Per) -> Iterator[dict[str, Tensor]]:
    """Gates that are to be set by hand, all 1."""
    gates = {name: torch.ones(one.count(per)) for name, one in units.items()}
    handles = place_gates(model, units, gates, per)
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _without(trial: Run, gate: Tensor, unit: int) -> float:
    gate[unit] = 0
    try:
        return float(trial.forward())
    finally:
        gate[unit] = 1


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
            whole += float(trial.forward()) / len(trials)
            for name, gate in gates.items():
                for head in range(len(gate)):
                    gate.fill_(1 if mode == "without" else 0)
                    gate[head] = 0 if mode == "without" else 1
                    values[name][head] += float(trial.forward()) / len(trials)
                gate.fill_(1)
    return HeadAblation(mode, whole, values)
