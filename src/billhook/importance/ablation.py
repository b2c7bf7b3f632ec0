"""Importance as the rise of the loss without a unit: exact and expensive.

"Are Sixteen Heads Really Better than One?" (Michel, Levy & Neubig, 2019, https://arxiv.org/abs/1905.10650), section 3.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from rich.console import RenderableType
from torch import Tensor, nn

from billhook.arguments import check_one_of, check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.display import Printable, text_table
from billhook.engine import Loss, Run, cpu_by_default, evaluating
from billhook.importance.score import Importance, Sums, check_consumers, make_run
from billhook.model import check_values, find_transformer
from billhook.units import Per, UnitsByModule, find_units, place_gates, skipping, unit_ids

Mode = Literal["without", "only"]


@dataclass(frozen=True)
class Ablation(Importance):
    """Scores a unit by the rise of the loss without it (Michel et al., section 3.2).

    Needs a forward pass for each unit and batch. Units are masked by gates; blocks are skipped.

    Raises:
        ValueError: On scoring, if units are neither blocks nor have consumer layers.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "block"), bh.importance.Ablation(), [model.dummy_inputs])
        >>> {name: len(values) for name, values in scores.items()}
        {'model.layers': 4}
    """

    blockwise = True

    def sums(self, model: nn.Module, units: UnitsByModule, per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches. See `Importance.sums`."""
        gated = {name: module_units for name, module_units in units.items() if module_units.kind != "block"}
        check_consumers(gated, type(self).__name__)
        sums = Sums.zero(units, per)
        with ablating(model, gated, per) as gates, torch.no_grad():
            for run in runs:
                dense = float(run.forward())
                for name, module_units in units.items():
                    losses = []
                    for unit in range(module_units.count(per)):
                        blocks = {module_units.name: [unit]}
                        with skipping(model, blocks) if name not in gates else _masked(gates[name], unit, "without"):
                            losses.append(float(run.forward()))
                    sums.add(name, torch.tensor(losses, dtype=torch.float64) - dense, 1)
        return sums


@contextmanager
def ablating(model: nn.Module, units: UnitsByModule, per: Per) -> Iterator[dict[str, Tensor]]:
    """Adds gates, all 1, whose values the caller sets."""
    gates = {name: torch.ones(module_units.count(per)) for name, module_units in units.items()}
    with ExitStack() as hooks:
        for handle in place_gates(model, units, gates, per):
            hooks.callback(handle.remove)
        yield gates


@contextmanager
def _masked(gate: Tensor, unit: int, mode: Mode) -> Iterator[None]:
    """Masks a unit, or all other units of its module."""
    gate.fill_(mode == "without")
    gate[unit] = mode == "only"
    try:
        yield
    finally:
        gate.fill_(1)


@dataclass(frozen=True, repr=False)
class HeadAblation(Printable):
    """Metric of a model with masked heads, as in tables 1 to 3 of the paper.

    Attributes:
        mode: `"without"` each head, or with each as the `"only"` head of its layer.
        dense: Metric with all heads.
        values: Metric for each head, by attention module: float64, `[heads]`.
    """

    mode: Mode
    dense: float
    values: dict[str, Tensor]

    def _renderables(self) -> list[RenderableType]:
        heads = "without each head" if self.mode == "without" else "with each head as the only head of its layer"
        rows = [
            (name, "  ".join(f"{change:+7.4f}" for change in (values - self.dense).tolist()))
            for name, values in self.values.items()
        ]
        return [f"change of the metric {heads}, from {self.dense:.4f}", text_table(rows, aligns="<", indent=2)]


@cpu_by_default()
def ablate_heads(
    model: nn.Module, batches: Batches, metric: Loss | None = None, mode: Mode = "without", per: Per = "head"
) -> HeadAblation:
    """Measures a model without each head, or with each as the only head of its layer.

    Reference: Michel et al. (1905.10650), sections 3.2 and 3.3.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        batches: Calibration data: batches (dictionaries of forward inputs, including labels) or a `Calibration`. Each batch runs
            once per head.
        metric: Function of model and batch that returns a number, such as accuracy, averaged over batches. Defaults to the loss.
        mode: `"without"` or `"only"`.
        per: `"head"` for query heads, or `"kv_head"` for KV heads together with their query heads.

    Raises:
        ValueError: If there are no heads or no batches, or `mode` or `per` is not legal.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> ablated = bh.importance.ablate_heads(model, [model.dummy_inputs])
        >>> [len(losses) for losses in ablated.values.values()]
        [8, 8, 8, 8]
    """
    check_types(ablate_heads, locals())
    check_one_of("mode", mode, Mode)
    subject = find_transformer(model)
    check_values(subject)
    heads = find_units(subject, "head")
    unit_ids(heads, {}, per)
    runs = [make_run(subject, heads, batch, metric) for batch in read_batches(batches, subject)]
    if not runs:
        raise ValueError("batches is empty. Pass at least one batch.")
    values = {name: torch.zeros(module_units.count(per), dtype=torch.float64) for name, module_units in heads.items()}
    dense = 0.0
    with evaluating(subject), ablating(subject, heads, per) as gates, torch.no_grad():
        for run in runs:
            dense += float(run.forward()) / len(runs)
            for name, gate in gates.items():
                for head in range(len(gate)):
                    with _masked(gate, head, mode):
                        values[name][head] += float(run.forward()) / len(runs)
    return HeadAblation(mode, dense, values)
