"""What a batch shows of each head: products of what it gives with the loss's gradient, noted on the way back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from billhook.structure.units import Per, Units


@dataclass(frozen=True, eq=False)
class Trial:
    """One batch: its loss, and which tokens count.

    Attributes:
        loss: Runs the model and gives the loss, a number with a gradient.
        tokens: For the attentions of which there is padding: which of the tokens that ask count, bool, `[batch, length]`.
    """

    loss: Callable[[], Tensor]
    tokens: Mapping[str, Tensor]


def products_of(model: nn.Module, heads: Mapping[str, Units], per: Per, trial: Trial) -> dict[str, Tensor]:
    """Att_h^T dL / d Att_h of every token: by attention, float32, `[..., heads]`; zero for tokens that do not count.

    An attention that runs several times in a forward, as where layers share weights, has one gate: its products add up.
    """
    found: dict[str, Tensor] = {}
    probes = {name: torch.zeros((), requires_grad=True) for name in heads}

    def note(name: str, values: Tensor) -> None:
        products = by_head(values, heads[name], per)
        found[name] = found[name] + products if name in found and found[name].shape == products.shape else products

    handles = []
    for name, one in heads.items():
        for reader in one.readers:
            hook = partial(_probe, probes[name], partial(note, name))
            handles.append(model.get_submodule(reader).register_forward_pre_hook(hook))
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(scalar(trial.loss()), list(probes.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for name, gradient in zip(heads, gradients, strict=True):
        if gradient is None:
            raise ValueError(independent(name))
    return {name: counting(products, trial.tokens.get(name)) for name, products in found.items()}


def _probe(probe: Tensor, note: Callable[[Tensor], None], _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_Probe.apply(args[0], probe.to(args[0].device), note), *args[1:])  # type: ignore[no-untyped-call]


class _Probe(torch.autograd.Function):
    """Passes its input on, and on the way back notes the product of the input with its gradient."""

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


def scalar(loss: Tensor) -> Tensor:
    """A loss that can be differentiated.

    Raises:
        ValueError: If it is more than one number, or has no gradient.
    """
    if loss.numel() != 1:
        raise ValueError(f"loss: one number is needed, not a tensor of shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss: it depends on no gate, as it has no gradient (was it detached, or computed without gradients?)")
    return loss.reshape(())


def independent(name: str) -> str:
    """Says that the loss does not depend on an attention."""
    return f"loss: it does not depend on the heads of {name}; score the other layers, or use a loss that it has a part in"


def by_head(values: Tensor, heads: Units, per: Per) -> Tensor:
    """Sums over the positions of each head: `[..., positions]` to `[..., heads]`."""
    index = torch.from_numpy(heads.positions(per)).to(values.device)
    count = heads.count(per)
    return values.new_zeros(*values.shape[:-1], count + 1).index_add_(-1, index % (count + 1), values)[..., :count]


def counting(values: Tensor, tokens: Tensor | None) -> Tensor:
    """Zero for tokens that do not count, if it is them that the values are of."""
    if tokens is None or tokens.shape != values.shape[:-1]:
        return values
    return values.masked_fill(~tokens.to(values.device)[..., None], 0)


def counted(values: Tensor, tokens: Tensor | None) -> int:
    """How many tokens count."""
    return values.shape[:-1].numel() if tokens is None or tokens.shape != values.shape[:-1] else int(tokens.sum())
