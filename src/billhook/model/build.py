"""Builds a model of a config on meta, without weights."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, initialization

Mode = AbstractContextManager[Any]


def build_on_meta(model: PreTrainedModel, config: PretrainedConfig, within: Mode = nullcontext()) -> PreTrainedModel:  # noqa: B008
    """Builds on meta what the model's own class makes of a config."""
    return build_class_on_meta(type(model), config, within)


def build_class_on_meta(kind: type[PreTrainedModel], config: PretrainedConfig, within: Mode = nullcontext()) -> PreTrainedModel:  # noqa: B008
    """Builds on meta what a class makes of a config; a mode decides within about single calls of torch."""
    safe = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)  # some classes read numbers off a linspace
    with torch.random.fork_rng(devices=[]), torch.device("meta"), safe(), within:
        return kind(config)


def build_or_refuse(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Builds on meta what a class makes of a config; refuses one that it does not accept."""
    try:
        return build_class_on_meta(kind, config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, ZeroDivisionError) as error:
        raise ValueError(f"{kind.__name__} does not accept its config: {type(error).__name__}: {error}") from error
