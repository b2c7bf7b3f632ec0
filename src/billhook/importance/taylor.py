"""Importance as a Taylor expansion of the loss in a unit's parameters.

"LLM-Pruner: On the Structural Pruning of Large Language Models" (Ma, Fang & Wang, 2023, https://arxiv.org/abs/2305.11627),
section 3.2.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from billhook.arguments import check_int, check_one_of, check_types
from billhook.engine import Run
from billhook.importance.score import Importance, Sums, no_gradient_message, scalar_loss
from billhook.linalg import in_float64
from billhook.units import Part, Per, UnitsByModule, parts_of

Order = Literal["first", "second", "mixed", "vector", "unit"]
Reduction = Literal["sum", "mean", "max", "product", "first", "last"]
Scores = dict[tuple[str, str, int], Tensor]
"""Scores of each part, by module, parameter, and dimension: `[units]`."""


@dataclass(frozen=True)
class Taylor(Importance):
    """Scores a unit by the estimated change of the loss if its parameters become zero.

    A unit has producer rows and consumer columns: for a head those of q and o (and of k and v, if it has its own, or `per` is
    `"kv_head"`), for a channel those of gate, up, and down. Each matrix gives a number, and `reduce` combines them. Scores are
    averaged over batches; the authors use a single batch of 10 sequences of 64 tokens. Reference: LLM-Pruner.

    Costs: next to the model and the activations of a batch, memory holds a single gradient. `"first"`, `"vector"`, and `"unit"`
    run a forward and a backward pass per batch; `"second"` runs them per example; `"mixed"` runs both, `passes` times, and keeps
    H of a share of the parameters in float32.

    Args:
        order: The number that a matrix gives a unit, from its parameters w and gradients g. `"first"`: sum of |w g| (the
            authors' element-wise, first order). `"second"`: sum of |w^2 H|, with H = 1/N times the sum over the N examples of a
            batch of the squared gradient of each (the diagonal of the Fisher matrix). `"mixed"`: sum of |w g - 1/2 w^2 H|
            (equation 5). `"vector"`: |sum of w g| of each row or column, summed over the unit (equation 3). `"unit"`: |sum of w
            g| over the whole unit.
        reduce: Combines the numbers of a unit's matrices: `"sum"`, `"mean"`, `"max"`, `"product"`, or the number of the
            `"first"` or `"last"` matrix in the model's order (section 3.2 names sum, product, max, and last). A matrix with
            queries, keys, and values counts as one.
        passes: For `"mixed"`, the number of shares into which the parameters are divided, each with its own passes over a batch.

    Raises:
        ValueError: If an argument is not legal. On scoring, if a gradient is NaN or infinite, the loss does not depend on a
            module, or a batch cannot be split into examples.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "head"), bh.Taylor(), [model.dummy_inputs])
        >>> [len(values) for values in scores.values()]
        [8, 8, 8, 8]
    """

    needs_gradients = True
    blockwise = True
    order: Order = "first"
    reduce: Reduction = "sum"
    passes: int = 4

    def __post_init__(self) -> None:
        check_types(Taylor, vars(self))
        check_one_of("order", self.order, Order)
        check_one_of("reduce", self.reduce, Reduction)
        if self.order == "unit" and self.reduce != "sum":
            raise ValueError(f"reduce={self.reduce!r} is not supported with order='unit', which sums over a unit. Use 'sum'.")
        check_int("passes", self.passes)

    def sums(self, model: nn.Module, units: UnitsByModule, per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches. See `Importance.sums`.

        Raises:
            ValueError: If the loss does not depend on a module.
        """
        sums, parts = Sums.zero(units, per), parts_of(model, units, per)
        keys = defaultdict(list)
        for part in parts:
            keys[part.module].append(_key(part))
        with trainable(model, [part.name for part in parts]) as parameters:
            # shares of neighboring parameters, similar in size
            total, passes = sum(map(Tensor.numel, parameters.values())), self.passes if self.order == "mixed" else 1
            shares, offset = dict[int, dict[str, nn.Parameter]](), 0
            for name, parameter in parameters.items():
                shares.setdefault((offset + parameter.numel() // 2) * passes // total, {})[name] = parameter
                offset += parameter.numel()
            for number, run in enumerate(runs):
                scores: Scores = {}
                for share in shares.values():
                    _add_scores(self.order, share, parts, run, f"batch {number}", scores)
                for name in units:
                    module_keys = keys[name]
                    if scores.keys().isdisjoint(module_keys):
                        raise ValueError(no_gradient_message(name))
                    zero = torch.zeros_like(sums.totals[name])
                    sums.add(name, self._reduced(torch.stack([scores.get(key, zero) for key in module_keys])), 1)
        return sums

    def _reduced(self, scores: Tensor) -> Tensor:
        """Combines the numbers of a unit's matrices."""
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
    return part.module, part.name, part.dim


def _add_scores(
    order: Order, parameters: Mapping[str, nn.Parameter], parts: Sequence[Part], run: Run, where: str, scores: Scores
) -> None:
    """Runs a batch and scores gradients as they arrive; `where` names it in messages."""
    parts_with = {name: [part for part in parts if part.name == name] for name in parameters}
    curvature, positions = dict[str, Tensor](), Scores()
    finite = []  # searched only if the sums are not finite

    def weight(name: str) -> Tensor:
        return _full(parameters[name].detach())

    def note(where: str, name: str, products: Tensor) -> None:
        """Adds the products of a parameter to its parts, by position, without a host sync."""
        values = products if order in ("vector", "unit") else products.abs_()
        for part in parts_with[name]:
            values_along = part.sum_others(values)
            finite.append((where, name, values_along.isfinite().all()))
            total = in_float64((values_along.abs() if order == "vector" else values_along).detach())
            positions[_key(part)] = total + positions.get(_key(part), 0.0)  # NaN and infinity stay in the sums

    def note_squares(factor: float, where: str, name: str, gradient: Tensor) -> None:
        squares = _full(gradient).square().mul_(factor)
        if order == "second":
            note(where, name, squares.mul_(weight(name).square()))
        else:
            curvature[name] = curvature[name].add_(squares) if name in curvature else squares

    def note_products(name: str, gradient: Tensor) -> None:
        products = weight(name) * _full(gradient)
        if order == "mixed" and name in curvature:
            products -= curvature.pop(name).mul_(weight(name).square()).div_(2)
        note(where, name, products)

    if order in ("second", "mixed"):
        examples = run.examples()
        for number, example in enumerate(examples):
            stream_gradients(example, parameters, partial(note_squares, 1 / len(examples), f"example {number} of {where}"))
    if order != "second":
        stream_gradients(run.forward, parameters, note_products)
    for part in itertools.chain.from_iterable(parts_with.values()):
        if (key := _key(part)) in positions:
            on_host = positions.pop(key).cpu()
            if not np.isfinite(on_host.numpy()).all():
                bad, name = next((batch, name) for batch, name, is_finite in finite if not is_finite)
                raise ValueError(f"batches: {bad} (counted from 0) has a NaN or infinite gradient for {name}.")
            scores[key] = part.by_unit(on_host)


def _full(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


@contextmanager
def trainable(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Yields parameters with gradients enabled, and restores the flags; `grad` is unchanged."""
    parameters = {name: model.get_parameter(name) for name in names}
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise ValueError(
                f"model: {name} is quantized ({parameter.dtype}) and has no gradient. GateGradient does not need it."
            )
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])


def stream_gradients(
    loss: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter], use: Callable[[str, Tensor], None]
) -> None:
    """Calls `use` with each parameter's name and gradient, summed over all of its uses.

    Memory holds at most one gradient, the largest. Nothing is added to `grad`, so optimizers and wrappers do not notice.
    """

    def note(name: str, gradient: Tensor) -> Tensor:
        use(name, gradient)
        return gradient.new_zeros(()).expand_as(gradient)  # autograd keeps this instead of the gradient

    with ExitStack() as hooks, torch.enable_grad():
        for name, parameter in parameters.items():
            hooks.callback(parameter.register_hook(partial(note, name)).remove)  # type: ignore[no-untyped-call]
        torch.autograd.grad(scalar_loss(loss()), list(parameters.values()), allow_unused=True)
