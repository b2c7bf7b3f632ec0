"""Says in plain data by what settings a callback works, for records of a fit."""

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from lightning.pytorch.callbacks import Callback

from billhook.calibration.calibration import Calibration
from billhook.fit.calibration import FitCalibration
from billhook.schedules import Schedule

BESIDE = {"self", "measure_batches", "plot_file", "metric"}
"""Parameters that do not decide what is done."""


def described(callback: Callback) -> dict[str, Any]:
    """Returns the name of a callback's class as `callback`, and what is set of its settings; data by where it comes from."""
    beside = BESIDE | ({"calibration"} if getattr(callback, "needs_data", None) is False else set())
    parameters = inspect.signature(type(callback).__init__).parameters
    given = {name: getattr(callback, name, None) for name in parameters if name not in beside}
    if any(isinstance(value, Schedule) for name, value in given.items() if name != "at"):
        given.pop("at", None)  # the schedule says when
    plain = {name: _plain(value) for name, value in given.items() if value is not None}
    # what is switched off by default is not told
    plain = {name: value for name, value in plain.items() if value or value != (parameters[name].default or value)}
    return {"callback": type(callback).__name__} | plain


def _plain(value: object) -> Any:  # noqa: ANN401 - plain data of any kind
    if isinstance(value, FitCalibration):
        return _data(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, type):
        return value.__name__
    return value if value is None or isinstance(value, bool | int | float | str) else _words(value)


def _words(value: object) -> str:
    """Says an object as its class prints it, a dataclass by what is set, or the class's name where that is an address."""
    own = type(value)
    if is_dataclass(value) and own.__str__ is object.__str__:
        given = [(one.name, getattr(value, one.name)) for one in fields(value) if one.repr]
        default = {one.name: one.default for one in fields(value)}
        return f"{own.__name__}({', '.join(f'{name}={said!r}' for name, said in given if said != default[name])})"
    prints = own.__str__ is not object.__str__ or own.__repr__ is not object.__repr__
    return str(value) if prints else own.__name__


def _data(given: FitCalibration) -> dict[str, Any]:
    if isinstance(given.batches, Calibration):
        return {name: value for name, value in given.batches.to_json().items() if value is not None}
    source = "training data" if given.batches is None else type(given.batches).__name__
    return {"from": source, "seed": given.seed, **({"examples": given.examples} if given.batches is None else {})}
