"""Numbers that a class derives from its config as it is built, such as the scale of embeddings from the hidden size."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from billhook.model.build import build_class_on_meta
from billhook.model.constants import constants
from billhook.model.memory import remembered_built

Numbers = dict[str, tuple[float, float]]
"""Numbers that modules hold, by dotted name: before and after."""


class _Known(TorchFunctionMode):
    """Lets single numbers become tensors on the CPU, so that their values are known, where all else is built on meta."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - what torch gives
        one = func is torch.tensor and args and isinstance(args[0], int | float)
        if func is torch.Tensor.to and args[0].is_meta:  # to where a single number is
            kwargs = {name: value for name, value in (kwargs or {}).items() if name != "device"}
        return func(*args, **({"device": "cpu"} if one else {}) | dict(kwargs or {}))


def derived(model: PreTrainedModel, before: PretrainedConfig) -> Numbers:
    """Finds the numbers that the model's class makes otherwise of its config than of an earlier one."""
    kind = type(model)

    def built(config: PretrainedConfig) -> dict[str, float]:
        return dict(_numbers(build_class_on_meta(kind, copy.deepcopy(config), _Known())))

    then, now = (remembered_built(partial(built, config), kind, config, "numbers") for config in (before, model.config))
    return {name: (value, now[name]) for name, value in then.items() if now.get(name, value) != value}


def take_derived(model: nn.Module, numbers: Numbers) -> None:
    """Gives modules other numbers."""
    for name, (_, value) in numbers.items():
        owner, _, attr = name.rpartition(".")
        module = model.get_submodule(owner)
        if (buffer := module._buffers.get(attr)) is None:
            setattr(module, attr, value)
        else:
            module._buffers[attr] = torch.full_like(buffer, value)


def _numbers(model: nn.Module) -> Iterator[tuple[str, float]]:
    for one in constants(model):
        single = isinstance(one.value, Tensor) and not one.value.dim()
        if single or type(one.value) is float:
            yield one.name, float(one.value)
