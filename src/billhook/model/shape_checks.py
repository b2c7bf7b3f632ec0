"""Whether what a checkpoint says of a model's shape is as billhook writes it; asked before anything is made of it."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

PER_HEAD = ("head_dim", "attention_head_size", "key_value_proj_dim")

TOLD = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")

HARMLESS = ("dtype", "version", "name_or_path", "implementation", "drop", "problem_type", "initializer")

VERSION = 1
DIMENSIONS = 8  # more than any layer's weight has
KINDS = {"class": str, "config": str, "prefix": str, "shape": Mapping}
"""What a Lightning checkpoint says of its model."""


def check_plain_shape(plain: object) -> None:
    """Refuses what `Shape.to_dict` does not make.

    Raises:
        ValueError: With the part that is not as it should be.
    """
    parts: dict[str, tuple[Callable[[Any], bool], str]] = {
        "tensors": (_is_size, "a short list of whole numbers"),
        "attributes": (_is_whole, "a whole number of 64 bits"),
        "config": (_is_whole, "a whole number of 64 bits"),
        "lists": (_is_plain_list, "a list of plain values"),
        "blocks": (_are_blocks, "a number of blocks, and which of them are there, ascending"),
        "handed": (lambda said: isinstance(said, list), "a list"),
    }
    for part, (holds, legal) in parts.items():
        said = plain.get(part, {} if part in ("lists", "blocks", "handed") else None) if isinstance(plain, Mapping) else None
        if not isinstance(said, Mapping):
            raise ValueError(f"shape.{part} is {str(said)[:80]!r}, and must be a mapping")
        for name, value in said.items():
            if not isinstance(name, str) or not holds(value):
                raise ValueError(f"shape.{part}: {str(name)[:200]} is {str(value)[:80]!r}, and must be {legal}")


def check_held(held: object, state: object) -> None:
    """Refuses what a Lightning checkpoint says of its model if it is not as billhook writes it, or not what its weights are.

    Args:
        held: What it says.
        state: Its weights by name, as far as it holds them.

    Raises:
        ValueError: With what is wrong.
    """
    for key, kind in KINDS.items():
        if not isinstance(held, Mapping) or not isinstance(held.get(key), kind):
            raise ValueError(f"the checkpoint does not say what model it holds as billhook writes it: {key} is missing or wrong")
    assert isinstance(held, Mapping)
    if held.get("version", VERSION) != VERSION:
        raise ValueError(f"the checkpoint was written by another billhook (version {str(held['version'])[:80]} of what it says)")
    try:
        config = json.loads(held["config"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the checkpoint does not say what model it holds as billhook writes it: config: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("the checkpoint does not say what model it holds as billhook writes it: config is no mapping")
    check_plain_shape(held["shape"])
    weights = {k: tuple(v.shape) for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    unheld = 0
    for name, size in held["shape"]["tensors"].items():
        found = weights.get(held["prefix"] + name)
        if found is not None and found != tuple(size):
            raise ValueError(f"the checkpoint says that {name} is {tuple(size)}, and holds it as {found}")
        unheld += prod(size) if found is None else 0
    if weights and unheld > 10**8 + 10 * sum(map(prod, weights.values())):
        raise ValueError(f"the checkpoint says that there are {unheld} numbers, of which it holds none")


def _is_size(said: object) -> bool:
    return isinstance(said, list | tuple) and len(said) <= DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in said)


def _is_whole(said: object) -> bool:
    return isinstance(said, int) and abs(said) < 2**63


def _is_plain_list(said: object) -> bool:
    return isinstance(said, list) and all(value is None or isinstance(value, bool | int | float | str) for value in said)


def _are_blocks(said: object) -> bool:
    if not isinstance(said, list) or len(said) != 2 or type(said[0]) is not int or not isinstance(said[1], list | tuple):
        return False
    first, there = said
    return all(type(n) is int and 0 <= n < first for n in there) and list(there) == sorted(set(there))


"""What attentions call the width of a head, which nothing changes."""
"""The fields of a config that messages name."""
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
