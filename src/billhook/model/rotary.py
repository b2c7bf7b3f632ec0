"""Rotary embeddings: their parameters in a config, and runs with other frequencies."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from billhook.engine import Run, overridden
from billhook.model.config_fields import text_config

RopeParameters = Mapping[str, Any]  # `rope_parameters` of a config: plain values and lists of numbers by name
POSITIONLESS = 1e9  # factor that divides a frequency so far that it does not rotate


def rope_parameters(model: nn.Module) -> dict[str, Any]:
    """Returns a copy of the rotary parameters of a model's text config.

    Empty if it has none, or several for different layers.
    """
    stated = getattr(_config(model), "rope_parameters", None)
    return copy.deepcopy(stated) if isinstance(stated, dict) and are_rope_parameters(stated) else {}


def are_rope_parameters(stated: Mapping[str, Any]) -> bool:
    """Returns whether data are rotary parameters for all layers of a model."""
    values = (entry for value in stated.values() for entry in (value if isinstance(value, list) else [value]))
    return isinstance(stated.get("rope_type"), str) and all(
        value is None or isinstance(value, int | float | str) for value in values
    )


def rotary_embeddings(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that compute the angles of a model's text config."""
    config = _config(model)
    return [m for m in model.modules() if "inv_freq" in m._buffers and vars(m).get("config") is config and config is not None]


def _config(model: nn.Module) -> PretrainedConfig | None:
    config = getattr(model, "config", None)
    return text_config(config) if isinstance(config, PretrainedConfig) else None


def set_rope_parameters(model: nn.Module, parameters: RopeParameters) -> None:
    """Changes the rotary parameters of a model, in its config and in its modules."""
    config: Any = _config(model)
    config.rope_parameters = copy.deepcopy(dict(parameters))
    for module in rotary_embeddings(model):
        built = _built(module, config)
        for name, value in vars(built).items():
            if not name.startswith("_") and name not in ("config", "training"):
                setattr(module, name, value)
        vars(module).pop("long_inv_freq", None)  # which a forward derives from the old parameters
        module._buffers.update(built._buffers)


def with_rope_parameters(model: nn.Module, parameters: RopeParameters) -> dict[nn.Module, nn.Module]:
    """Returns for each rotary module of a model another one that follows other parameters."""
    config: Any = copy.deepcopy(_config(model))
    config.rope_parameters = copy.deepcopy(dict(parameters))
    return {module: _built(module, config) for module in rotary_embeddings(model)}


def _built(module: nn.Module, config: PretrainedConfig) -> nn.Module:
    """Builds a rotary module like another, in float32 as on loading."""
    with torch.device("cpu"):
        built: nn.Module = type(module)(config)
    return built.to(module._buffers["inv_freq"].device)  # type: ignore[union-attr]


def longrope(model: nn.Module, frequencies: Tensor, scaling: float = 1.0) -> dict[str, Any]:
    """Returns rotary parameters that state any frequencies, as `rope_type="longrope"` does.

    Transformers computes frequency j as 1 / (factor_j * theta^(2j / d)), with d rotated dimensions.

    Args:
        model: The model.
        frequencies: Radians per token, `[d / 2]`; 0 for pairs of dimensions that do not rotate.
        scaling: Factor of all cosines and sines.
    """
    config, before = _config(model), rope_parameters(model)
    usual = before["rope_theta"] ** (-torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies))
    factors = torch.where(frequencies > 0, usual / frequencies.cpu(), POSITIONLESS).clamp_max(POSITIONLESS)
    factors = torch.where((factors - 1).abs() < 1e-6, 1.0, factors)  # what float32 rounds
    kept = {name: before[name] for name in ("rope_theta", "partial_rotary_factor") if name in before}
    return kept | {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "factor": 1.0,
        "attention_factor": scaling,
        "original_max_position_embeddings": getattr(config, "max_position_embeddings", None),
    }


def rotating_with(model: nn.Module, parameters: RopeParameters | None, runs: Sequence[Run]) -> list[Run]:
    """Returns runs that compute with other rotary parameters, also if they pause.

    None returns the runs unchanged.
    """
    if parameters is None:
        return list(runs)
    rotating = partial(with_modules, with_rope_parameters(model, parameters))
    rotated = []
    for run in runs:
        lossless = None if run.lossless is None else partial(rotating, run.lossless)
        rotated.append(replace(run, forward=partial(rotating, run.forward), lossless=lossless))
    return rotated


def with_modules(others: Mapping[nn.Module, nn.Module], forward: Callable[[], Any]) -> Any:  # noqa: ANN401
    """Runs a forward with other modules in place of some, seen by this forward alone.

    A paused run leaves its override in place, so it asks which run calls. A greenlet has its own context.
    """
    inside = ContextVar("inside", default=False)

    def call(old: Callable[..., Any], new: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return (new if inside.get() else old)(*args, **kwargs)

    with ExitStack() as stack:
        for module, other in others.items():
            stack.enter_context(overridden(module, forward=partial(call, module.forward, other)))
        stack.callback(inside.reset, inside.set(True))
        return forward()
