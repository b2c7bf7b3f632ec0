"""Uses gradients one by one as they come and drops them, so that there is never more than one."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from billhook.engine.state import overridden
from billhook.engine.store import store_of


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

    Transformers itself does so in training mode alone, in which dropout would act, too. Blocks that ranks share are left out.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # a quarter of a second where no model was made before

    with ExitStack() as stack:
        for part in model.modules() if not store_of(model).on_ranks else ():
            if isinstance(part, GradientCheckpointingLayer) and part.gradient_checkpointing:
                stack.enter_context(overridden(part, forward=partial(_recomputed, part.forward)))
        yield


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever a layer takes
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)
