"""How much a unit matters by a Taylor expansion of the loss in its parameters.

"LLM-Pruner: On the Structural Pruning of Large Language Models" (Ma, Fang & Wang, 2023, https://arxiv.org/abs/2305.11627),
section 3.2.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from billhook.arguments import check_int, check_one_of, check_types
from billhook.engine.batches import Run
from billhook.importance.probes import no_gradient_message, scalar_loss
from billhook.importance.score import Importance, Sums
from billhook.linalg import in_float64
from billhook.units.units import Part, Per, Units, parts_of

Order = Literal["first", "second", "mixed", "vector", "unit"]
Reduction = Literal["sum", "mean", "max", "product", "first", "last"]
Scores = dict[tuple[str, str, int], Tensor]
"""Of each part, by place, parameter and dimension: `[units]`."""


@dataclass(frozen=True)
class Taylor(Importance):
    """How much the loss changes when a unit's parameters w become zero, by its gradient g (LLM-Pruner).

    A unit has the rows that make it and the columns that read it: of a head those of q and o (and of k and v, where it has its
    own, or `per` is KV heads), of a channel those of gate, up and down. Each such matrix gives it a number; `reduce` makes one of
    these. Scores of several batches are averaged; the authors take one batch, of 10 sequences of 64 tokens.

    Costs: next to the model and the activations of a batch there is one gradient at a time, not one for each parameter.
    `"first"`, `"vector"` and `"unit"` run a batch forward and back once; `"second"` once for each example; `"mixed"` both,
    `passes` times, and keeps H of a share of the parameters meanwhile, in float32.

    Args:
        order: The number that a matrix gives a unit. `"first"`: sum of |w g| over its parameters (the authors' element-wise,
            first order). `"second"`: sum of |w^2 H|, with H = 1/N sum over the N examples of a batch of the square of the
            gradient of each alone (the diagonal of the Fisher matrix). `"mixed"`: sum of |w g - 1/2 w^2 H| (equation 5).
            `"vector"`: |sum of w g| of each row or column, summed over those of a unit (equation 3). `"unit"`: |sum of w g| over
            all of a unit.
        reduce: How the numbers that its matrices give a unit become one: `"sum"`, `"mean"`, `"max"`, `"product"`, or that of the
            `"first"` or `"last"` matrix in the model's order (section 3.2 names sum, product, max and last). Queries, keys and
            values in one matrix are one.
        passes: Of `"mixed"`: into how many shares the parameters are divided, each with passes of its own over a batch.

    Raises:
        ValueError: If one of these is not legal. When it runs: if a gradient is NaN or infinite, the loss does not depend on a
            place, or a batch cannot be taken apart into its examples.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "head"), bh.Taylor(), [model.dummy_inputs])
        >>> [len(of_place) for of_place in scores.values()]
        [8, 8, 8, 8]
    """

    needs_gradients: ClassVar[bool] = True
    blockwise: ClassVar[bool] = True
    order: Order = "first"
    reduce: Reduction = "sum"
    passes: int = 4

    def __post_init__(self) -> None:
        check_types(Taylor, vars(self))
        check_one_of("order", self.order, Order)
        check_one_of("reduce", self.reduce, Reduction)
        if self.order == "unit" and self.reduce != "sum":
            raise ValueError(f"reduce={self.reduce!r} must be sum with order='unit', which sums over all of a unit")
        check_int("passes", self.passes)

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches; see `Importance.sums`."""
        sums, parts = Sums.zero(units, per), parts_of(model, units, per)
        keys = {name: [_key(part) for part in parts if part.place == name] for name in units}
        with trainable(model, [part.name for part in parts]) as parameters:
            for number, run in enumerate(runs):
                scores: Scores = {}
                for share in _shares(parameters, self.passes if self.order == "mixed" else 1):
                    _Pass(self.order, share, parts, scores).run(run, f"batch {number}")
                for name, keys_of in keys.items():
                    if not any(key in scores for key in keys_of):
                        raise ValueError(no_gradient_message(name))
                    zero = torch.zeros_like(sums.totals[name])
                    sums.add(name, self._reduced(torch.stack([scores.get(key, zero) for key in keys_of])), 1)
        return sums

    def _reduced(self, scores: Tensor) -> Tensor:
        """Makes one number a unit of the numbers that its matrices give."""
        match self.reduce:
            case "sum":
                return scores.sum(0).abs() if self.order == "unit" else scores.sum(0)
            case "mean":
                return scores.mean(0)
            case "max":
                return scores.amax(0)
            case "product":
                return scores.prod(0)
        return scores[0 if self.reduce == "first" else -1]


def _key(part: Part) -> tuple[str, str, int]:
    return part.place, part.name, part.dim


class _Pass:
    """Runs a batch, and adds to the scores of parts what each gradient makes of them as it comes."""

    def __init__(self, order: Order, parameters: Mapping[str, nn.Parameter], parts: Sequence[Part], scores: Scores) -> None:
        self._order, self._parameters, self._scores = order, parameters, scores
        self._parts = {name: [part for part in parts if part.name == name] for name in parameters}
        self._curvature, self._positions = dict[str, Tensor](), Scores()
        self._finite = list[tuple[str, str, Tensor]]()  # where it is asked once sums are not

    def run(self, run: Run, where: str) -> None:
        """Runs it; `where` names the batch in messages."""
        if self._order in ("second", "mixed"):
            examples = run.examples()
            for number, example in enumerate(examples):
                note = partial(self._squares, 1 / len(examples), f"example {number} of {where}")
                stream_gradients(example, self._parameters, note)
        if self._order != "second":
            stream_gradients(run.forward, self._parameters, partial(self._products, where))
        for parts in self._parts.values():
            for part in parts:
                if (key := _key(part)) in self._positions:
                    on_host = self._positions.pop(key).cpu()
                    if not np.isfinite(on_host.numpy()).all():
                        where, name = next((where, name) for where, name, finite in self._finite if not finite)
                        raise ValueError(f"batches: {where} (counted from 0) gives {name} a gradient that is NaN or infinite")
                    self._scores[key] = part.by_unit(on_host)

    def _squares(self, factor: float, where: str, name: str, gradient: Tensor) -> None:
        squares = _full(gradient).square().mul_(factor)
        if self._order == "second":
            self._note(where, name, squares.mul_(self._weight(name).square()))
        else:
            self._curvature[name] = self._curvature[name].add_(squares) if name in self._curvature else squares

    def _products(self, where: str, name: str, gradient: Tensor) -> None:
        weight = self._weight(name)
        products = weight * _full(gradient)
        if self._order == "mixed" and name in self._curvature:
            products -= self._curvature.pop(name).mul_(weight.square()).div_(2)
        self._note(where, name, products)

    def _note(self, where: str, name: str, products: Tensor) -> None:
        """Adds the products of one parameter to those of its parts, by position, where they are: nothing waits for a device."""
        values = products if self._order in ("vector", "unit") else products.abs_()
        for part in self._parts[name]:
            along = part.sum_others(values)
            self._finite.append((where, name, along.isfinite().all()))
            total = in_float64((along.abs() if self._order == "vector" else along).detach())
            self._positions[_key(part)] = total + self._positions.get(_key(part), 0.0)  # NaN and infinity stay in the sums

    def _weight(self, name: str) -> Tensor:
        return _full(self._parameters[name].detach())


def _full(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _shares(parameters: Mapping[str, nn.Parameter], count: int) -> Iterator[dict[str, nn.Parameter]]:
    """Divides parameters into at most so many shares of neighbours, none much larger than another."""
    total = sum(parameter.numel() for parameter in parameters.values())
    shares, before = dict[int, dict[str, nn.Parameter]](), 0
    for name, parameter in parameters.items():
        shares.setdefault((before + parameter.numel() // 2) * count // total, {})[name] = parameter
        before += parameter.numel()
    yield from shares.values()


@contextmanager
def trainable(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Yields parameters by name, which need gradients for now; `grad` stays as it is. Refuses one that cannot have any."""
    parameters = {name: model.get_parameter(name) for name in names}
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise ValueError(f"model: {name} is quantised ({parameter.dtype}) and has no gradient: GateGradient needs none of it")
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])


def stream_gradients(
    loss: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter], use: Callable[[str, Tensor], None]
) -> None:
    """Calls `use` with the name and gradient of each parameter that a loss depends on, summed over all of its uses.

    There is never more than the largest gradient in memory, and nothing is added to `grad`, so that neither optimizers nor
    wrappers that wait for it notice.
    """

    def note(name: str, gradient: Tensor) -> Tensor:
        use(name, gradient)
        return gradient.new_zeros(()).expand_as(gradient)  # this is what autograd keeps

    with ExitStack() as hooks, torch.enable_grad():
        for name, parameter in parameters.items():
            hooks.callback(parameter.register_hook(partial(note, name)).remove)  # type: ignore[no-untyped-call]
        torch.autograd.grad(scalar_loss(loss()), list(parameters.values()), allow_unused=True)
