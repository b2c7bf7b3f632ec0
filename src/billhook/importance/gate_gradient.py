"""Importance as the gradient of the loss with respect to a gate on each unit.

"Are Sixteen Heads Really Better than One?" (Michel, Levy & Neubig, 2019, https://arxiv.org/abs/1905.10650).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from billhook.arguments import check_one_of
from billhook.engine import Run
from billhook.importance.score import (
    Importance,
    Sums,
    by_unit,
    check_consumers,
    consumer_modules,
    count_tokens,
    mask_padding,
    no_gradient_message,
    scalar_loss,
)
from billhook.model import read_dim
from billhook.units import Per, UnitsByModule

Each = Literal["token", "example", "batch"]


@dataclass(frozen=True)
class GateGradient(Importance):
    """Scores a unit by the gradient of a gate on it (Michel et al., section 4.1, equation 2).

    I_u = E_x |dL(x) / d gate_u| = E_x |a_u(x)^T dL(x) / d a_u(x)|, where a_u is the output of the unit: the context vector of a
    head, or the value of a channel. A backward pass per batch scores all units. If the loss is a mean over a batch, use batches
    of equal size.

    Args:
        each: Items x whose absolute values are averaged: `"token"`, as in the authors' code, `"example"` (a sequence or image),
            or `"batch"`. Signs cancel within an item, so the rankings differ.

    Raises:
        ValueError: If `each` is not legal. On scoring, if the units have no consumer layers, a gradient is NaN or infinite, or
            the loss does not depend on a module.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "head"), bh.importance.GateGradient(), [model.dummy_inputs])
        >>> [len(values) for values in scores.values()]
        [8, 8, 8, 8]
    """

    needs_gradients = True
    blockwise = True
    each: Each = "token"

    def __post_init__(self) -> None:
        check_one_of("each", self.each, Each)

    def sums(self, model: nn.Module, units: UnitsByModule, per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches. See `Importance.sums`."""
        check_consumers(units, type(self).__name__)
        sums = Sums.zero(units, per)
        for number, run in enumerate(runs):
            pass_products(model, run, units, per, partial(self._note, sums, number))
        return sums

    def _note(self, sums: Sums, number: int, name: str, products: Tensor, tokens: int) -> None:
        per_item = products.flatten(1, -2) if products.dim() > 2 else products.unsqueeze(1)
        if self.each == "token":
            total, count = per_item.abs().sum((0, 1)), tokens
        elif self.each == "example":
            total, count = per_item.sum(1).abs().sum(0), len(per_item)
        else:
            total, count = per_item.sum((0, 1)).abs(), 1
        if not total.isfinite().all():
            raise ValueError(f"batches: batch {number} (counted from 0) has a NaN or infinite gradient for {name}.")
        sums.add(name, total, count)


@dataclass(eq=False)
class _Sum:
    """Products of the same tokens, added up, with the number of calls still to come."""

    name: str
    tokens: Tensor | None
    awaited: int = 0
    products: Tensor | None = None


def pass_products(model: nn.Module, run: Run, units: UnitsByModule, per: Per, use: Callable[[str, Tensor, int], None]) -> None:
    """Passes products of unit outputs with their gradients to `use`, during a backward pass.

    Several consumer layers of a module, or several calls of a layer, share a gate, so their products add up if they belong to
    the same tokens. Complete sums are passed on and dropped, which limits memory.

    Args:
        model: The model.
        run: The batch.
        units: Units by module.
        per: Query heads or KV heads.
        use: Function of the module, the products of a batch (float32, `[..., units]`, zero for padding), and the number of
            non-padding tokens.

    Raises:
        ValueError: If the loss does not depend on a module.
    """
    probes, sums = {name: torch.zeros((), requires_grad=True) for name in units}, dict[Any, _Sum]()

    def pass_on(total: _Sum) -> None:
        if total.products is not None:
            use(total.name, total.products, count_tokens(total.products, total.tokens))
            total.products = None

    def note(total: _Sum, values: Tensor) -> None:
        products = mask_padding(by_unit(values, units[total.name], per), total.tokens)
        total.products = products if total.products is None else total.products + products
        total.awaited -= 1
        if not total.awaited:
            pass_on(total)

    def probe(name: str, tokens: Tensor | None, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        dim = read_dim(module)
        inputs = args[0].movedim(dim, -1)
        total = sums.setdefault((name, inputs.shape[:-1], id(tokens)), _Sum(name, tokens))
        total.awaited += 1
        probed = _Probe.apply(inputs, probes[name].to(inputs.device), partial(note, total))  # type: ignore[no-untyped-call]
        return (probed.movedim(-1, dim), *args[1:])

    with ExitStack() as hooks, torch.enable_grad():
        for name, module_units in units.items():
            for consumer, module in consumer_modules(model, module_units).items():
                hook = partial(probe, name, run.tokens.get(consumer))
                hooks.callback(module.register_forward_pre_hook(hook).remove)
        gradients = torch.autograd.grad(scalar_loss(run.forward()), list(probes.values()), allow_unused=True)
    for name, gradient in zip(units, gradients, strict=True):
        if gradient is None:
            raise ValueError(no_gradient_message(name))
    for incomplete in sums.values():  # a call of theirs does not affect the loss
        pass_on(incomplete)


class _Probe(torch.autograd.Function):
    """Identity whose backward pass reports the product of its input with the gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, probe: Tensor, note: Callable[[Tensor], None]) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(inputs, probe)
        ctx.note = note
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        inputs, probe = ctx.saved_tensors
        ctx.note(inputs.float() * gradients[0].float())
        return gradients[0], torch.zeros_like(probe), None
