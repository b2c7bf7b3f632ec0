"""Observes units while a batch runs: their outputs, and the products of these with the loss's gradient."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from billhook.engine.state import overridden
from billhook.engine.store import store_of
from billhook.model.linears import read_dim
from billhook.units.units import PLURAL, Per, Units


def scalar(loss: Tensor) -> Tensor:
    """Returns a loss that can be differentiated; refuses more than one number, and one without a gradient."""
    if loss.numel() != 1:
        raise ValueError(f"loss: one number is needed, not a tensor of shape {list(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError("loss: it depends on no unit, as it has no gradient (was it detached, or computed without gradients?)")
    return loss.reshape(())


def independent(name: str) -> str:
    """Returns the message for a loss that does not depend on a place."""
    return f"loss: it does not depend on the units of {name}; score the other places, or use a loss that it has a part in"


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


def stream(loss: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter], use: Callable[[str, Tensor], None]) -> None:
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
        torch.autograd.grad(scalar(loss()), list(parameters.values()), allow_unused=True)


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Has layers recompute their activations for gradients, as in training, where checkpointing is on, while they rest.

    Transformers itself does so in training mode alone, in which dropout would act, too. Blocks that come and go are left out.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # a quarter of a second where no model was made before

    with ExitStack() as stack:
        for part in model.modules() if not store_of(model).blocks else ():
            if isinstance(part, GradientCheckpointingLayer) and part.gradient_checkpointing:
                stack.enter_context(overridden(part, forward=partial(_recomputed, part.forward)))
        yield


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever a layer takes
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)


def check_read(units: Mapping[str, Units], who: str) -> None:
    """Refuses units that no module of its own reads, as experts and blocks."""
    for name, of_place in units.items():
        if not of_place.readers:
            works = "BlockInfluence, Ablation" if of_place.kind == "block" else "Taylor, WeightNorm"
            raise ValueError(
                f"importance: {who} looks at what modules read, and the units of {name} ({PLURAL[of_place.kind]}) are read by "
                f"none of their own; {works} and RandomUnits work"
            )


def reading(model: nn.Module, units: Units) -> dict[str, nn.Module]:
    """Returns the modules that read units, each once, though it may stand in several places of the model."""
    named = {id(model.get_submodule(reader)): reader for reader in reversed(units.readers)}
    return {reader: model.get_submodule(reader) for reader in units.readers if reader in named.values()}


@dataclass(eq=False)
class _Sum:
    """Products of the same tokens, which add up: those that have come, and how many more are awaited."""

    name: str
    tokens: Tensor | None
    awaited: int = 0
    products: Tensor | None = None


class Products:
    """Products of what units give with the loss's gradient by it, of every token, noted on the way back.

    Several readers of a place, or one that runs several times, have one gate: their products add up where they are of the same
    tokens. What is complete is passed on to `use` and dropped, so that few places are held at a time: the place, the products of
    a batch (float32, `[..., units]`, zero for tokens that do not count), and how many tokens count.
    """

    def __init__(
        self, units: Mapping[str, Units], per: Per, tokens: Mapping[str, Tensor], use: Callable[[str, Tensor, int], None]
    ) -> None:
        self._units, self._per, self._tokens, self._use = units, per, tokens, use
        self._sums = dict[Any, _Sum]()

    def run(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        """Runs a loss and its gradient; refuses one that is none, or does not depend on a place."""
        probes = {name: torch.zeros((), requires_grad=True) for name in self._units}
        with ExitStack() as hooks, torch.enable_grad():
            for name, of_place in self._units.items():
                for reader, module in reading(model, of_place).items():
                    hook = partial(self._probe, name, self._tokens.get(reader), probes[name])
                    hooks.callback(module.register_forward_pre_hook(hook).remove)
            gradients = torch.autograd.grad(scalar(loss()), list(probes.values()), allow_unused=True)
        for name, gradient in zip(self._units, gradients, strict=True):
            if gradient is None:
                raise ValueError(independent(name))
        for rest in self._sums.values():  # of these, something ran that the loss makes no use of
            self._pass_on(rest)

    def _probe(
        self, name: str, tokens: Tensor | None, probe: Tensor, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        dim = read_dim(module)
        inputs = args[0].movedim(dim, -1)
        total = self._sums.setdefault((name, inputs.shape[:-1], id(tokens)), _Sum(name, tokens))
        total.awaited += 1
        probed = _Probe.apply(inputs, probe.to(inputs.device), partial(self._note, total))  # type: ignore[no-untyped-call]
        return (probed.movedim(-1, dim), *args[1:])

    def _note(self, total: _Sum, values: Tensor) -> None:
        products = counting(by_unit(values, self._units[total.name], self._per), total.tokens)
        total.products = products if total.products is None else total.products + products
        total.awaited -= 1
        if not total.awaited:
            self._pass_on(total)

    def _pass_on(self, total: _Sum) -> None:
        if total.products is not None:
            self._use(total.name, total.products, counted(total.products, total.tokens))
            total.products = None


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


def by_unit(values: Tensor, units: Units, per: Per) -> Tensor:
    """Sums over the positions of each unit: `[..., positions]` to `[..., units]`."""
    positions, count = units.positions(per), units.count(per)
    size = len(positions) // count
    if np.array_equal(positions, np.repeat(np.arange(count), size)):
        return values if size == 1 else values.reshape(*values.shape[:-1], count, size).sum(-1)
    index = torch.from_numpy(positions % (count + 1)).to(values.device)
    return values.new_zeros(*values.shape[:-1], count + 1).index_add_(-1, index, values)[..., :count]


def counting(values: Tensor, tokens: Tensor | None) -> Tensor:
    """Sets the values of tokens that do not count to zero, if there is one value for each token."""
    if tokens is None or tokens.shape != values.shape[:-1]:
        return values
    return values.masked_fill(~tokens.to(values.device)[..., None], 0)


def counted(values: Tensor, tokens: Tensor | None) -> int:
    """Counts the tokens that count."""
    return values.shape[:-1].numel() if tokens is None or tokens.shape != values.shape[:-1] else int(tokens.sum())
