"""Models without weights: from a config or a name, and the shadow of one that has weights."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from billhook.assets import model_path
from billhook.structure.hooks import stand_ins
from billhook.structure.shape import KEY
from billhook.structure.shaped import take_said

Module = TypeVar("Module", bound=nn.Module)

MAPPINGS = [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in
            ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_CLASSIFICATION", "CTC")]  # fmt: skip
MAPPINGS.append("MODEL_MAPPING_NAMES")


def to_meta(model: Module) -> Module:
    """A copy on the meta device, in eval mode; nothing is copied but what the modules are."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in tensors}
    memo |= {id(p): nn.Parameter(memo[id(p)], p.requires_grad) for p in model.parameters()}
    memo |= stand_ins(model)
    for module in model.modules():  # those that a hook or the code has computed from parameters
        memo |= {id(t): t.detach().clone() for t in vars(module).values() if isinstance(t, Tensor) and t.grad_fn is not None}
    try:
        shadow = copy.deepcopy(model, dict(memo))
    except (TypeError, ValueError, RuntimeError):
        shadow = copy.deepcopy(model, memo | _not_copied(model, memo))
    shadow.train(False)
    return shadow


def _not_copied(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Attributes that cannot be copied, such as locks and files, by id: a shadow has the same ones."""
    found = dict[int, Any]()
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:  # whatever a class of somebody's own raises
                    found[id(value)] = value
    return found


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
    classes = (getattr(transformers, name, None) for name in _candidates(config))
    built = next((one for one in classes if isinstance(one, type) and issubclass(one, PreTrainedModel)), None)
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


def from_name(name: str | os.PathLike[str]) -> PreTrainedModel:
    """The model that a folder, a config.json, a hub name or "tiny" describes, on the meta device; no weights are read.

    It has the shape that the config says under `"billhook"`, if it says one.

    Raises:
        ValueError: If there is no config, it is of no family that transformers knows, or it says a shape that is not one of it.
    """
    name = model_path(os.fspath(name))
    if not Path(name).is_file():
        check_checkpoint(name)
    try:
        config = _read_config(name)
    except Exception as error:  # transformers raises all kinds
        first = (str(error).strip().splitlines() or [""])[0]
        unread = isinstance(error, OSError)
        said = "has no config that can be read" if unread else "is not a config of a family that transformers knows"
        raise ValueError(f"'{name}' {said}: {type(error).__name__}: {first}") from error
    entry = vars(config).pop(KEY, None)
    model = from_config(config)
    if entry is not None:
        take_said(model, entry, name)
    return model


def _read_config(name: str) -> PretrainedConfig:
    if not Path(name).is_file():
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        return config
    plain = json.loads(Path(name).read_text())
    kind: type[PretrainedConfig] = transformers.CONFIG_MAPPING[plain["model_type"]]
    return kind.from_dict(plain)


def _candidates(config: PretrainedConfig) -> Iterator[str]:
    yield from config.architectures or []
    for mapping in MAPPINGS:
        names = getattr(modeling_auto, mapping).get(config.model_type, ())
        yield from (names,) if isinstance(names, str) else names
