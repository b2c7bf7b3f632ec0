"""Constants outside of state_dict: module numbers, derived numbers, and buffers."""

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from billhook.model.cache import cached
from billhook.model.config_fields import build_class_on_meta
from billhook.model.transformers_internals import follows_inputs

MOST = 1024  # approximate number of summed values of a larger buffer, evenly spaced
OF_INPUTS = ("cached", "rescaled", "attention_structure", "shift_size", "window_size")
"""Parts of the names of numbers that forwards change."""
HARMLESS = (
    *("training", "drop", "checkpointing", "loss", "jitter", "padding_idx", "pad_token_id", "vocab_size"),
    *OF_INPUTS,
)
"""Parts of the names of numbers that do not affect logits in evaluation mode, or that forwards change."""
Numbers = dict[str, tuple[float, float]]  # old and new numbers of modules, by dotted name


def constants(model: nn.Module) -> Iterator[tuple[str, float | Tensor | None]]:
    """Yields names and values of constants, except meta buffers and what forwards change."""
    in_checkpoints = model.state_dict(keep_vars=True).keys()
    for name, module in model.named_modules():
        for attr, value in vars(module).items():
            number = value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
            dotted = f"{name}.{attr}"
            if number and not attr.startswith("_") and not any(part in dotted for part in HARMLESS):
                yield dotted, value
        for attr, buffer in module._buffers.items():
            dotted = f"{name}.{attr}"
            plain = type(buffer) is Tensor and buffer.layout == torch.strided and not buffer.is_meta and not buffer.is_quantized
            if plain and dotted.removeprefix(".") not in in_checkpoints and not follows_inputs(module, attr):
                yield dotted, buffer


def record_constants(model: nn.Module) -> dict[str, float]:
    """Returns the constants as plain numbers; buffers as checksums.

    The name of a checksum includes the size, because some buffers are tables that grow with the inputs.
    """
    record = {}
    for name, value in constants(model):
        if isinstance(value, Tensor):
            values = value.detach().flatten()[:: 1 + value.numel() // MOST].cpu()
            values = (torch.view_as_real(values).flatten() if values.is_complex() else values).double()
            values = values * torch.linspace(1, 2, len(values), dtype=torch.double)  # another order is another sum
            record[f"checksum of {name} {list(value.shape)}"] = torch.where(values < 0, -2 * values, values).sum().item()
        else:
            record[name] = math.nan if value is None else float(value)
    return record


class _KnownNumbers(TorchFunctionMode):
    """Keeps single numbers on the CPU, with values, while a model is built on meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs = dict(kwargs or {})
        if func is torch.tensor and args and isinstance(args[0], int | float):
            kwargs.setdefault("device", "cpu")
        elif func is torch.Tensor.to and args[0].is_meta:  # to where a single number is
            kwargs.pop("device", None)
        return func(*args, **kwargs)


def derived_constants(model: PreTrainedModel, before: PretrainedConfig) -> Numbers:
    """Finds numbers that a class derives differently from the current than an earlier config."""
    kind = type(model)

    def built(config: PretrainedConfig) -> dict[str, float]:
        numbers = {}
        for name, value in constants(build_class_on_meta(kind, copy.deepcopy(config), _KnownNumbers())):
            if type(value) is float or (isinstance(value, Tensor) and not value.dim()):
                numbers[name] = float(value)
        return numbers

    then, now = (cached(partial(built, config), (kind, config), "numbers") for config in (before, model.config))
    return {name: (value, now[name]) for name, value in then.items() if now.get(name, value) != value}


def set_constants(model: nn.Module, numbers: Numbers) -> None:
    """Sets numbers of modules."""
    for name, (_, value) in numbers.items():
        owner, _, attr = name.rpartition(".")
        module = model.get_submodule(owner)
        if (buffer := module._buffers.get(attr)) is None:
            setattr(module, attr, value)
        else:
            module._buffers[attr] = torch.full_like(buffer, value)
