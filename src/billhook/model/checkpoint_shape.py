"""The shape of a model in a Lightning checkpoint: a model of any other shape takes it before the weights are loaded."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.fsdp import class_of
from billhook.model.constants import record_constants
from billhook.model.find import find_transformer, locate_transformer
from billhook.model.shape import KEY, Shape, check_plain_shape, record_shape, set_shape, shape_of
from billhook.model.surgery import restored_on_error

VERSION = 1
PARTS = {"class": str, "config": str, "prefix": str, "shape": Mapping}
"""The parts of what a checkpoint says of its model."""
PER_HEAD = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""Names that attentions give to the width of a head, which nothing changes."""
SHOWN = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
"""Fields of a config that messages show."""
HARMLESS = ("dtype", "version", "name_or_path", "implementation", "drop", "problem_type", "initializer")
"""Parts of the names of fields that may have changed in a run that is resumed."""


def save_shape(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Puts shape, class, config and constants of the Hugging Face model in a module into a Lightning checkpoint of that module.

    Nothing is collective here: every rank may call it, or one.
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


def load_shape(module: nn.Module, checkpoint: Mapping[str, Any], otherwise: Shape | None = None) -> None:
    """Gives the Hugging Face model in a module the shape that a Lightning checkpoint holds, or else the shape `otherwise`."""
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
    """Refuses what a Lightning checkpoint says of its model if it is not as billhook writes it, or not what its weights are."""
    unlike = "the checkpoint does not say what model it holds as billhook writes it"
    for key, kind in PARTS.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get(key), kind):
            raise ValueError(f"{unlike}: {key} is missing or wrong")
    assert isinstance(entry, Mapping)
    if entry.get("version", VERSION) != VERSION:
        raise ValueError(f"the checkpoint was written by another billhook (version {str(entry['version'])[:80]} of what it says)")
    try:
        config = json.loads(entry["config"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{unlike}: config: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{unlike}: config is no mapping")
    check_plain_shape(entry["shape"])
    weights = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    missing = 0
    for name, size in entry["shape"]["tensors"].items():
        weight = weights.get(entry["prefix"] + name)
        if weight is None:
            missing += prod(size)
        elif weight != tuple(size):
            raise ValueError(f"the checkpoint says that {name} is {tuple(size)}, and holds it as {weight}")
    if weights and missing > 10**8 + 10 * sum(map(prod, weights.values())):
        raise ValueError(f"the checkpoint says that there are {missing} numbers, of which it holds none")


def check_same_model(model: PreTrainedModel, entry: Mapping[str, Any]) -> None:
    """Refuses what is of another family, or has other heads or ties; warns of numbers that are others in the config."""
    then, now = json.loads(entry["config"]), _config_of(model)
    reasons = [
        f"its {name} is {then[name]!r}, here it is {now[name]!r}"
        for name in ("model_type", "tie_word_embeddings")
        if name in then and name in now and then[name] != now[name]
    ]
    attributes = entry["shape"]["attributes"]
    for name, module in model.named_modules():
        for attr in PER_HEAD:
            before, width = attributes.get(f"{name}.{attr}"), vars(module).get(attr)
            if type(before) is int and type(width) is int and before != width:
                reasons.append(f"{name} has heads of {before}, here they are of {width}")
    if reasons:
        raise ValueError(f"the checkpoint holds another model than the run: {reasons[0]}; {_both_described(model, entry)}")
    ours = dict(_constants(now))
    others = [f"{name} {value!r}, here {ours[name]!r}" for name, value in _constants(then) if ours.get(name, value) != value]
    if others:
        warnings.warn(f"the checkpoint is of a model whose config says {'; '.join(others[:3])}: what is here holds", stacklevel=2)


def _both_described(model: PreTrainedModel, entry: Mapping[str, Any]) -> str:
    """Describes the model that a checkpoint holds and that of a run."""
    parameters = (name for name, _ in model.named_parameters())
    theirs = _described(entry["class"], json.loads(entry["config"]), entry["shape"]["tensors"])
    return f"the checkpoint holds {theirs}, the run has {_described(type(model).__name__, _config_of(model), parameters)}"


def _described(kind: str, config: Mapping[str, Any], parameters: Iterable[str]) -> str:
    numbers = ", ".join(f"{name} {config[name]}" for name in SHOWN if name in config)
    lora = " with LoRA" if any(".lora_" in name for name in parameters) else ""
    return f"{kind}{lora} ({numbers or 'config without sizes'})"


def _config_of(model: PreTrainedModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return config


def _constants(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    """Yields the numbers and words of a config that are of no shape."""
    for name, value in config.items():
        if isinstance(value, dict) and not name.startswith(("id2", "label2")):
            yield from _constants(value, f"{prefix}{name}.")
        elif isinstance(value, float | str) and not name.startswith("_") and not any(part in name for part in HARMLESS):
            yield f"{prefix}{name}", value
