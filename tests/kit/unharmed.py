"""All that an event that fails must leave as it was, and errors that are raised anywhere within one."""

import random
import signal
import sys
from contextlib import contextmanager
from functools import cache
from inspect import CO_GENERATOR, unwrap
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

import billhook
from billhook.model.surgery import update_optimizers
from billhook.pruning.block_plan import _forget
from billhook.sparsity.weight_plan import WeightPlan

SOURCE = str(Path(billhook.__file__).parent)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def everything(model: nn.Module, *optimizers: torch.optim.Optimizer, gradients: bool = True) -> dict[str, object]:
    """What modules are, hold and say, values bit for bit, configs, optimizers with their state, and random numbers."""
    state = {f"module {name}": _module(module) for name, module in model.named_modules(remove_duplicate=False)}
    state |= {
        f"tensor {name}": _tensor(tensor, gradients) for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    configs = {id(m.config): m.config for m in model.modules() if isinstance(getattr(m, "config", None), PretrainedConfig)}
    state |= {f"config {key}": repr(sorted(vars(config).items(), key=str)) for key, config in configs.items()}
    for number, one in enumerate(optimizers):
        groups = [{k: [id(p) for p in v] if k == "params" else v for k, v in group.items()} for group in one.param_groups]
        kept = {id(p): {k: _tensor(v) for k, v in own.items()} for p, own in one.state.items()}
        state[f"optimizer {number}"] = (groups, kept)
    state["random"] = (_bits(torch.get_rng_state()), random.getstate(), np.random.get_state()[1].tobytes())
    state["torch"] = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
    return state


def _module(module: nn.Module) -> tuple[object, ...]:
    said = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules", *HOOKS)}
    plain = {name: value if isinstance(value, int | float | str | tuple | None) else id(value) for name, value in said.items()}
    held = [[(name, id(own)) for name, own in table.items()] for table in (module._parameters, module._buffers, module._modules)]
    hooks = [len(getattr(module, name)) for name in HOOKS]
    return id(module), type(module), module.training, repr(plain), held, hooks


def _tensor(value: object, gradients: bool = True) -> object:
    if not isinstance(value, Tensor):
        return value
    gradient = None if not gradients or value.grad is None or not value.is_leaf else (id(value.grad), _bits(value.grad))
    return id(value), tuple(value.shape), value.dtype, value.requires_grad, _bits(value), gradient


def _bits(value: Tensor) -> bytes:
    """The bits of all numbers; -0 is 0, and NaN is NaN."""
    return (value.detach() + 0).contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def differing(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]


class Interrupt(BaseException):
    """No `Exception`, as an interrupt from the keyboard: nothing may take it for an answer."""


FOLLOWS = (unwrap(update_optimizers).__code__, _forget.__code__, unwrap(WeightPlan.apply).__code__)
"""What is not undone: optimizers that follow a model that has changed, and masks that are put into weights."""
TRACING = ("tracing/rules", "tracing/mode", "tracing/tape", "tracing/axes", "repairs/sums")


@contextmanager
def interrupted(at: int):
    """Raises `Interrupt` at a call of one of billhook's functions within, those of tracing aside; gives how many there are."""
    calls: list[object] = [0, ""]
    usual = signal.getsignal(signal.SIGINT)  # another one stands where an interrupt from the keyboard waits, as in an undo

    def watch(frame, event, _):
        if (name := _watched(frame.f_code)) is not None:
            calls[0] += 1
            if at > 0 and calls[0] >= at and not calls[1] and signal.getsignal(signal.SIGINT) is usual and not _follows(frame):
                calls[1] = name
                raise Interrupt

    before = sys.gettrace()  # that of a measure of coverage
    sys.settrace(watch)  # told of calls alone, as it asks for nothing more of a frame
    try:
        yield calls
    finally:
        sys.settrace(before)


def _follows(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code not in FOLLOWS:
        frame = frame.f_back
    return frame is not None


@cache
def _watched(code: CodeType) -> str | None:
    """File and name of a function of billhook's that may be interrupted."""
    if not code.co_filename.startswith(SOURCE) or code.co_name[0] == "<" or code.co_flags & CO_GENERATOR:
        return None
    own = code.co_filename[len(SOURCE) + 1 :]
    return None if own.startswith(TRACING) else f"{own}: {code.co_qualname}"
