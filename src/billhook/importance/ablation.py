"""How much higher the loss is without a unit: what all other importances estimate, and the most expensive.

"Are Sixteen Heads Really Better than One?" (Michel, Levy & Neubig, 2019, https://arxiv.org/abs/1905.10650), section 3.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from rich.console import RenderableType
from torch import Tensor, nn

from billhook.arguments import check_one_of, check_types
from billhook.calibration.calibration import Batches, read_batches
from billhook.display import Printable, text_table
from billhook.engine.batches import Loss, Run
from billhook.engine.state import evaluating
from billhook.importance.probes import check_consumers
from billhook.importance.score import Importance, Sums, make_run
from billhook.model.find import check_values, find_transformer
from billhook.units.blocks import skipping
from billhook.units.find import find_units, unit_ids
from billhook.units.gates import place_gates
from billhook.units.units import Per, Units

Mode = Literal["without", "only"]


@dataclass(frozen=True)
class Ablation(Importance):
    """How much higher the loss is without the unit, all others being there (Michel et al., section 3.2): one forward a unit.

    Units are masked by gates; blocks are skipped.

    Raises:
        ValueError: When it runs: if units are neither blocks nor read by modules of their own.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "block"), bh.importance.Ablation(), [model.dummy_inputs])
        >>> {name: len(of_place) for name, of_place in scores.items()}
        {'model.layers': 4}
    """

    blockwise: ClassVar[bool] = True

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches; see `Importance.sums`."""
        gated = {name: of_place for name, of_place in units.items() if of_place.kind != "block"}
        check_consumers(gated, type(self).__name__)
        sums = Sums.zero(units, per)
        with ablating(model, gated, per) as gates, torch.no_grad():
            for run in runs:
                dense = float(run.forward())
                for name, of_place in units.items():
                    losses = []
                    for unit in range(of_place.count(per)):
                        blocks = {of_place.name: [unit]}
                        with skipping(model, blocks) if name not in gates else _masked(gates[name], unit, "without"):
                            losses.append(float(run.forward()))
                    sums.add(name, torch.tensor(losses, dtype=torch.float64) - dense, 1)
        return sums


@contextmanager
def ablating(model: nn.Module, units: Mapping[str, Units], per: Per) -> Iterator[dict[str, Tensor]]:
    """Places gates that are to be set by hand, all 1."""
    gates = {name: torch.ones(of_place.count(per)) for name, of_place in units.items()}
    with ExitStack() as hooks:
        for handle in place_gates(model, units, gates, per):
            hooks.callback(handle.remove)
        yield gates


@contextmanager
def _masked(gate: Tensor, unit: int, mode: Mode) -> Iterator[None]:
    """Masks a unit, or all others of its place."""
    gate.fill_(mode == "without")
    gate[unit] = mode == "only"
    try:
        yield
    finally:
        gate.fill_(1)


@dataclass(frozen=True, repr=False)
class HeadAblation(Printable):
    """A metric of a model in which heads are masked, the paper's tables 1 to 3.

    Attributes:
        mode: `"without"` each head alone, or with each as the `"only"` one of its layer.
        whole: The metric with all heads.
        values: By attention, the metric for each of its heads: float64, `[heads]`.
    """

    mode: Mode
    whole: float
    values: dict[str, Tensor]

    def _renderables(self) -> list[RenderableType]:
        what = "without each head" if self.mode == "without" else "each head alone in its layer"
        rows = [
            (name, "  ".join(f"{change:+7.4f}" for change in (values - self.whole).tolist()))
            for name, values in self.values.items()
        ]
        return [f"{what}: change of {self.whole:.4f}", text_table(rows, aligns="<", indent=2)]


def ablate_heads(
    model: nn.Module,
    batches: Batches,
    metric: Loss | None = None,
    mode: Mode = "without",
    per: Per = "head",
) -> HeadAblation:
    """Measures a model without each head alone, or with each as the only one of its layer (Michel et al., 3.2 and 3.3).

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        batches: Inputs of the model's forward, as dictionaries, labels included; each is run once for every head.
        metric: From model and batch to a number, such as accuracy; by default the loss. Its mean over the batches is taken.
        mode: `"without"` or `"only"`.
        per: For heads, whether they are query heads, or KV heads with the query heads that they serve.

    Raises:
        ValueError: If there are no heads or no batches, or `mode` or `per` are not legal.

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
        raise ValueError("batches: at least one is needed")
    values = {name: torch.zeros(of_place.count(per), dtype=torch.float64) for name, of_place in heads.items()}
    dense = 0.0
    with evaluating(subject), ablating(subject, heads, per) as gates, torch.no_grad():
        for run in runs:
            dense += float(run.forward()) / len(runs)
            for name, gate in gates.items():
                for head in range(len(gate)):
                    with _masked(gate, head, mode):
                        values[name][head] += float(run.forward()) / len(runs)
    return HeadAblation(mode, dense, values)
