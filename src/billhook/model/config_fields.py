"""Config fields by dotted name, and meta models built from a config."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, initialization

Fields = dict[str, Any]


def fields_of(config: PretrainedConfig, prefix: str = "") -> Fields:
    """Returns the public fields of a config and its nested configs, in order.

    >>> from transformers import LlamaConfig
    >>> fields_of(LlamaConfig(hidden_size=64))["hidden_size"]
    64
    """
    fields: Fields = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            fields |= fields_of(value, f"{prefix}{name}.")
        elif not name.startswith("_"):
            fields[f"{prefix}{name}"] = value
    return fields


def field(config: PretrainedConfig, name: str) -> Any:  # noqa: ANN401 - any field
    """Returns a field. None if it does not exist, or differs by layer (`per_layer_config`)."""
    owner, attr = _owner(config, name)
    return None if attr in (getattr(owner, "per_layer_attributes", None) or ()) else getattr(owner, attr, None)


def set_fields(config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    """Sets fields of a config and of its nested configs."""
    for name, value in fields.items():
        setattr(*_owner(config, name), copy.copy(value))


def with_fields(config: PretrainedConfig, fields: Mapping[str, Any]) -> PretrainedConfig:
    """Returns a copy of a config with some fields changed."""
    changed = copy.deepcopy(config)
    set_fields(changed, fields)
    return changed


def read_back(config: PretrainedConfig) -> PretrainedConfig:
    """Returns a config as loaded after saving. Some classes derive or reject fields then."""
    return type(config).from_dict(config.to_dict())


def nested_configs(config: PretrainedConfig, prefix: str = "") -> Iterator[tuple[str, PretrainedConfig]]:
    """Yields a config and its nested configs, each with its field prefix."""
    yield prefix, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from nested_configs(value, f"{prefix}{name}.")


def text_config(config: PretrainedConfig, encoder: bool = False) -> PretrainedConfig:
    """Returns the text config of a model: the decoder's by default, or the encoder's."""
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(encoder=encoder, decoder=not encoder)


def configs_of(model: nn.Module) -> list[PretrainedConfig]:
    """Returns the distinct configs of all modules, also nested configs."""
    configs = [value for module in model.modules() for value in vars(module).values() if isinstance(value, PretrainedConfig)]
    return list({id(nested): nested for config in configs for _, nested in nested_configs(config)}.values())


def _owner(config: PretrainedConfig, name: str) -> tuple[Any, str]:
    nested, _, attr = name.rpartition(".")
    return attrgetter(nested)(config) if nested else config, attr


Mode = AbstractContextManager[Any]


def named_class(name: object) -> type[PreTrainedModel] | None:
    """Returns the transformers model class of this name. None if there is none."""
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None


def build_on_meta(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Builds a model of the same class from a config on meta."""
    return build_class_on_meta(type(model), config)


def build_class_on_meta(kind: type[PreTrainedModel], config: PretrainedConfig, within: Mode = nullcontext()) -> PreTrainedModel:  # noqa: B008
    """Builds a model class from a config on meta. A torch mode may intercept calls."""
    safe = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)  # some classes read values of a linspace
    with torch.random.fork_rng(devices=[]), torch.device("meta"), safe(), within:
        return kind(config)


def build_or_refuse(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Builds a model class from a config on meta. Raises if the config is not accepted."""
    try:
        return build_class_on_meta(kind, config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, ZeroDivisionError) as error:
        raise ValueError(f"{kind.__name__} does not accept its config: {type(error).__name__}: {error}") from error
