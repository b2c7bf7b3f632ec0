"""Whether what a checkpoint holds may be the model of a run, cut or not; and what either is, for messages."""

import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

PER_HEAD = ("head_dim", "attention_head_size", "key_value_proj_dim")
"""What attentions call the width of a head, which nothing changes."""

TOLD = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
"""The fields of a config that messages name."""

HARMLESS = ("dtype", "version", "name_or_path", "implementation", "drop", "problem_type", "initializer")
"""Parts of the names of fields that may be otherwise in a run that goes on."""


def check_same_model(model: PreTrainedModel, held: Mapping[str, Any]) -> None:
    """Refuses what is of another family, or has other heads or ties; warns of numbers that are others in the config.

    Args:
        model: The model of the run.
        held: What a Lightning checkpoint says of its model.

    Raises:
        ValueError: With what the checkpoint holds and what the run has.
    """
    then, now = json.loads(held["config"]), _config_of(model)
    reasons = [
        f"its {name} is {then[name]!r}, here it is {now[name]!r}"
        for name in ("model_type", "tie_word_embeddings")
        if name in then and name in now and then[name] != now[name]
    ]
    attributes = held["shape"]["attributes"]
    for name, module in model.named_modules():
        for own in PER_HEAD:
            said, here = attributes.get(f"{name}.{own}"), vars(module).get(own)
            if type(said) is int and type(here) is int and said != here:
                reasons.append(f"{name} has heads of {said}, here they are of {here}")
    if reasons:
        raise ValueError(f"the checkpoint holds another model than the run: {reasons[0]}; {told(model, held)}")
    here = dict(_constants(now))
    others = [f"{name} {value!r}, here {here[name]!r}" for name, value in _constants(then) if here.get(name, value) != value]
    if others:
        warnings.warn(f"the checkpoint is of a model whose config says {'; '.join(others[:3])}: what is here holds", stacklevel=2)


def told(model: PreTrainedModel, held: Mapping[str, Any]) -> str:
    """What a checkpoint holds and what a run has, in words."""
    there = _described(held["class"], json.loads(held["config"]), any(".lora_" in name for name in held["shape"]["tensors"]))
    adapted = any(".lora_" in name for name, _ in model.named_parameters())
    return f"the checkpoint holds {there}, the run has {_described(type(model).__name__, _config_of(model), adapted)}"


def _described(kind: str, config: Mapping[str, Any], adapted: bool) -> str:
    numbers = ", ".join(f"{name} {config[name]}" for name in TOLD if name in config)
    return f"{kind}{' with LoRA' if adapted else ''} ({numbers or 'config without sizes'})"


def _config_of(model: PreTrainedModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return config


def _constants(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    """The numbers and words of a config that are of no shape."""
    for name, value in config.items():
        if isinstance(value, dict) and not name.startswith(("id2", "label2")):
            yield from _constants(value, f"{prefix}{name}.")
        elif isinstance(value, float | str) and not name.startswith("_") and not any(part in name for part in HARMLESS):
            yield f"{prefix}{name}", value
