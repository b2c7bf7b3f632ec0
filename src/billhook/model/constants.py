"""Constants outside of state_dict: module numbers, derived numbers, and buffers."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import isclose, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from billhook.model.cache import cached
from billhook.model.config_fields import build_class_on_meta
from billhook.model.transformers_internals import follows_inputs

MOST = 1024
"""Approximate number of recorded values of a larger buffer, evenly spaced."""
ROUNDING = 1e-6
"""Relative tolerance for floating-point values from another device."""

Number = bool | int | float | None
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Constant:
    """A number or buffer, and the dictionary of its module that holds it."""

    name: str
    holder: dict[str, Any]
    attr: str

    @property
    def value(self) -> Any:  # noqa: ANN401 - a number or a tensor
        """The current value."""
        return self.holder[self.attr]


@dataclass(frozen=True)
class Difference:
    """A constant that differs from its record. For buffers, the largest difference."""

    constant: Constant
    recorded: Number
    now: Number


def constants(model: nn.Module) -> Iterator[Constant]:
    """Yields the constants of a model, except meta buffers and buffers that forwards change."""
    in_checkpoints = model.state_dict(keep_vars=True).keys()
    for name, module in model.named_modules():
        for attr, value in vars(module).items():
            if _is_number(value) and not attr.startswith("_") and attr != "training":
                yield Constant(f"{name}.{attr}", vars(module), attr)
        for attr, buffer in module._buffers.items():
            dotted = f"{name}.{attr}"
            if dotted.removeprefix(".") not in in_checkpoints and _is_plain(buffer) and not follows_inputs(module, attr):
                yield Constant(dotted, module._buffers, attr)


def record_constants(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns the constants as plain data, for any checkpoint format."""
    record: dict[str, dict[str, Any]] = {"numbers": {}, "buffers": {}}
    for constant in constants(model):
        if isinstance(value := constant.value, Tensor):
            sample = _sample(value)
            plain = {"size": list(value.shape), "dtype": str(sample.dtype).removeprefix("torch."), "values": sample.tolist()}
            record["buffers"][constant.name] = plain
        else:
            record["numbers"][constant.name] = _to_plain(value)
    return record


def check_record(record: object) -> None:
    """Raises for a record that `record_constants` does not create."""
    for part, holds in (("numbers", _is_number), ("buffers", _is_sample)):
        stated = record.get(part) if isinstance(record, Mapping) else None
        if not isinstance(stated, Mapping):
            raise ValueError(f"constants.{part} is {str(type(stated))[:80]}, but must be a mapping.")
        for name, value in stated.items():
            if not isinstance(name, str) or not holds(value):
                raise ValueError(f"constants.{part}: {str(name)[:200]} is not a valid entry.")


def differences(model: nn.Module, record: Record) -> list[Difference]:
    """Returns the constants that differ from a record, beyond rounding.

    Buffers of another size are ignored, as they are tables that grow with the inputs.
    """
    result = []
    for constant in constants(model):
        value, name = constant.value, constant.name
        if isinstance(value, Tensor):
            if name in record["buffers"] and (apart := _furthest_apart(record["buffers"][name], value)):
                result.append(Difference(constant, *apart))
        elif name in record["numbers"] and not _alike(recorded := record["numbers"][name], value):
            result.append(Difference(constant, recorded, _to_plain(value)))
    return result


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _to_plain(value: Any) -> Number:  # noqa: ANN401 - may be NumPy's, or an enumeration
    return value if value is None or isinstance(value, bool) else int(value) if isinstance(value, int) else float(value)


def _alike(a: Number, b: Number) -> bool:
    if a is None or b is None:
        return a is b
    return a == b or (a != a and b != b) or (isinstance(a, float) and isinstance(b, float) and isclose(a, b, rel_tol=ROUNDING))


def _is_plain(buffer: Tensor | None) -> bool:
    return type(buffer) is Tensor and buffer.layout == torch.strided and not buffer.is_meta and not buffer.is_quantized


def _is_sample(stated: object) -> bool:
    if not isinstance(stated, Mapping):
        return False
    size, values, dtype = stated.get("size"), stated.get("values"), stated.get("dtype")
    if not isinstance(size, list) or not isinstance(values, list) or not isinstance(dtype, str):
        return False
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        return False
    return all(type(n) is int for n in size) and all(_is_number(value) and value is not None for value in values)


def _sample(buffer: Tensor) -> Tensor:
    """Samples values of a buffer on the CPU. Complex values become pairs."""
    values = buffer.detach().flatten()[:: 1 + buffer.numel() // MOST].cpu()
    return torch.view_as_real(values).flatten() if values.is_complex() else values


def _furthest_apart(recorded: Mapping[str, Any], buffer: Tensor) -> tuple[float, float] | None:
    """Returns the values with the largest difference beyond rounding. None if there are none."""
    now = _sample(buffer)
    if recorded["size"] != list(buffer.shape) or len(recorded["values"]) != len(now):
        return None
    a, b = torch.tensor(recorded["values"], dtype=torch.float64), now.double()
    largest = max(map(abs, filter(isfinite, recorded["values"])), default=0.0)
    relative = absolute = 0.0
    for dtype in (getattr(torch, recorded["dtype"]), now.dtype):
        if dtype.is_floating_point:
            limits = torch.finfo(dtype)
            relative = max(relative, 2 * limits.eps, ROUNDING)
            absolute = max(absolute, torch.finfo(torch.float32).eps * largest + limits.tiny * limits.eps)
    wrong = ~torch.isclose(a, b, rtol=relative, atol=absolute, equal_nan=True)
    if not wrong.any():
        return None
    worst = int(torch.where(wrong, (a - b).abs().nan_to_num(torch.inf), -1).argmax())
    return a[worst].item(), b[worst].item()


Numbers = dict[str, tuple[float, float]]
"""Old and new numbers of modules, by dotted name."""


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
        built_constants = constants(build_class_on_meta(kind, copy.deepcopy(config), _KnownNumbers()))
        single = (c for c in built_constants if type(c.value) is float or (isinstance(c.value, Tensor) and not c.value.dim()))
        return {constant.name: float(constant.value) for constant in single}

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
