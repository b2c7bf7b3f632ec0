"""The model shape in a Lightning checkpoint, which a model adopts before its weights load."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine import class_of
from billhook.model.constants import record_constants
from billhook.model.find import find_transformer, locate_transformer
from billhook.model.shape import KEY, Shape, check_plain_shape, record_shape, set_shape, shape_of
from billhook.model.surgery import restored_on_error

Checkpoint = dict[str, Any]
"""A Lightning checkpoint."""
VERSION = 1
ENTRY_TYPES = {"class": str, "config": str, "prefix": str, "shape": Mapping, "version": int}
"""Required keys and types of a checkpoint's model entry."""
PER_HEAD = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""Attributes of attention modules for the head dimension, which never changes."""
SHOWN = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
"""Config fields shown in messages."""
SETTINGS = ("dtype", "version", "name_or_path", "implementation", "drop", "problem_type", "initializer")
"""Parts of field names that may differ in a resumed run."""


def save_shape(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Stores shape, class, config, and constants of a model in a Lightning checkpoint.

    Nothing is collective: any ranks may call it.
    """
    name, model = locate_transformer(module)
    checkpoint[KEY] = {
        "version": VERSION,
        "class": class_of(model).__name__,
        "config": model.config.to_json_string(use_diff=False),
        "name_or_path": model.config.name_or_path or None,
        "prefix": f"{name}." if name else "",
        "shape": shape_of(model).to_dict(),
        "constants": record_constants(model),
    }


def load_shape(module: nn.Module, checkpoint: Checkpoint, otherwise: Shape | None = None) -> None:
    """Gives a model the shape in a Lightning checkpoint, or else the shape `otherwise`."""
    model, entry = find_transformer(module), checkpoint.get(KEY)
    if entry is None:
        if otherwise is not None:
            set_shape(model, otherwise)
            record_shape(model)
        return
    check_entry(entry, checkpoint.get("state_dict"))
    check_same_model(model, entry)
    try:
        with restored_on_error(model):
            set_shape(model, Shape.from_dict(entry["shape"]))
            record_shape(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # configs raise all kinds
        raise ValueError(f"{error}; {_both_described(model, entry)}") from None


def check_entry(entry: object, state: object) -> None:
    """Raises if the model entry of a checkpoint is invalid, or contradicts its weights."""
    invalid = "the checkpoint has an invalid model entry"
    for key, kind in ENTRY_TYPES.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get(key), kind):
            raise ValueError(f"{invalid}: {key} is missing or has the wrong type.")
    assert isinstance(entry, Mapping)
    if entry["version"] != VERSION:
        raise ValueError(
            f"the checkpoint's model entry has version {str(entry['version'])[:80]}, which this billhook does not support."
        )
    try:
        config = json.loads(entry["config"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{invalid}: config: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{invalid}: config is not a mapping.")
    check_plain_shape(entry["shape"])
    weights = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    missing = 0
    for name, size in entry["shape"]["tensors"].items():
        weight = weights.get(entry["prefix"] + name)
        if weight is None:
            missing += prod(size)
        elif weight != tuple(size):
            raise ValueError(f"the checkpoint's model entry gives {name} the size {tuple(size)}, but its weight has {weight}.")
    if weights and missing > 10**8 + 10 * sum(map(prod, weights.values())):
        raise ValueError(f"the checkpoint's model entry lists {missing} values without weights.")


def check_same_model(model: PreTrainedModel, entry: Mapping[str, Any]) -> None:
    """Raises for another family, head dimension, or ties. Warns of other config values."""
    saved, current = json.loads(entry["config"]), _config_of(model)
    reasons = [
        f"its {name} is {saved[name]!r} instead of {current[name]!r}"
        for name in ("model_type", "tie_word_embeddings")
        if name in saved and name in current and saved[name] != current[name]
    ]
    attributes = entry["shape"]["attributes"]
    for name, module in model.named_modules():
        for attr in PER_HEAD:
            before, width = attributes.get(f"{name}.{attr}"), vars(module).get(attr)
            if type(before) is int and type(width) is int and before != width:
                reasons.append(f"{name} has head dimension {before} instead of {width}")
    if reasons:
        raise ValueError(f"the checkpoint contains a different model: {reasons[0]}; {_both_described(model, entry)}")
    current_values = dict(_constants(current))
    differences = [
        f"{name} {value!r} instead of {current_values[name]!r}"
        for name, value in _constants(saved)
        if current_values.get(name, value) != value
    ]
    if differences:
        warnings.warn(
            f"the checkpoint's config differs: {'; '.join(differences[:3])}. The values of this run are used.", stacklevel=2
        )


def _both_described(model: PreTrainedModel, entry: Mapping[str, Any]) -> str:
    parameters = (name for name, _ in model.named_parameters())
    saved = _described(entry["class"], json.loads(entry["config"]), entry["shape"]["tensors"])
    return f"the checkpoint contains {saved}, the run has {_described(type(model).__name__, _config_of(model), parameters)}"


def _described(kind: str, config: Mapping[str, Any], parameters: Iterable[str]) -> str:
    numbers = ", ".join(f"{name} {config[name]}" for name in SHOWN if name in config)
    lora = " with LoRA" if any(".lora_" in name for name in parameters) else ""
    return f"{kind}{lora} ({numbers or 'config without sizes'})"


def _config_of(model: PreTrainedModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return config


def _constants(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    """Yields the numbers and strings of a config that do not determine the shape."""
    for name, value in config.items():
        if isinstance(value, dict) and not name.startswith(("id2", "label2")):
            yield from _constants(value, f"{prefix}{name}.")
        elif isinstance(value, float | str) and not name.startswith("_") and not any(part in name for part in SETTINGS):
            yield f"{prefix}{name}", value
