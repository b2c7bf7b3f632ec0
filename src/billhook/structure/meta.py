"""Models without weights: from a config or a name, and the shadow of one that has weights."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from billhook.assets import model_path

Module = TypeVar("Module", bound=nn.Module)

MAPPINGS = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in
            ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_CLASSIFICATION", "CTC")]  # fmt: skip
MAPPINGS.append("MODEL_MAPPING_NAMES")


def to_meta(model: Module) -> Module:
    """A copy on the meta device, in eval mode; nothing is copied but what the modules are."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)], p.requires_grad) for p in model.parameters()}
    hooks = [h for m in model.modules() for name, h in vars(m).items() if name.endswith("_hooks") and isinstance(h, dict)]
    memo |= {id(h): type(h)() for h in hooks}  # what others hung on the model is neither copied nor called
    shadow = copy.deepcopy(model, memo)
    shadow.train(False)
    return shadow


def check_checkpoint(name: str) -> None:
    """Refuses a path that is not a Hugging Face checkpoint; a hub name passes.

    Raises:
        ValueError: With what is missing.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"the folder '{name}' has no config.json, so it is not a Hugging Face checkpoint")
    if path.is_file() or (not path.exists() and (path.is_absolute() or name.startswith(".") or name.count("/") > 1)):
        raise ValueError(f"'{name}' is not a folder with a Hugging Face checkpoint")


def model_class(config: PretrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class that a config names.

    Raises:
        ValueError: If it names none, or one that transformers does not have.
    """
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if not isinstance(found, type) or not issubclass(found, PreTrainedModel):
        raise ValueError(f"the config of '{name}' names the class {names or None}, which transformers does not have")
    return found


def from_config(config: PretrainedConfig) -> PreTrainedModel:
    """The class that a config names, or else the first that its family has for language modelling and so on, on the meta device.

    Raises:
        ValueError: If transformers has no class for it, or the class does not accept it.
    """
    config = copy.deepcopy(config)
    built = next((found for name in _candidates(config) if (found := getattr(transformers, name, None))), None)
    if built is None:
        raise ValueError(f"transformers has no model class for the config of type '{config.model_type}' ({config.architectures})")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model: PreTrainedModel = built(config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, ZeroDivisionError) as error:
        raise ValueError(f"{built.__name__} does not accept its config: {type(error).__name__}: {error}") from error
    if isinstance(config.dtype, torch.dtype):
        nn.Module.to(model, dtype=config.dtype)
    model.train(False)
    return model


def from_name(name: str) -> PreTrainedModel:
    """The model that a folder, a config.json, a hub name or "tiny" describes, on the meta device; no weights are read.

    Raises:
        ValueError: If there is no config, or it is of no family that transformers knows.
    """
    name = model_path(name)
    path = Path(name)
    if not path.is_file():
        check_checkpoint(name)
        return from_config(transformers.AutoConfig.from_pretrained(name))
    try:
        plain = json.loads(path.read_text())
        kind = transformers.CONFIG_MAPPING[plain["model_type"]]
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"'{name}' is not a config of a family that transformers knows: {reason}") from error
    return from_config(kind.from_dict(plain))


def _candidates(config: PretrainedConfig) -> Iterator[str]:
    yield from config.architectures or []
    for mapping in MAPPINGS:
        names = getattr(modeling_auto, mapping).get(config.model_type, ())
        yield from (names,) if isinstance(names, str) else names
