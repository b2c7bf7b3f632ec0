"""LoRA on a Hugging Face model: put on as the paper of LLM-Pruner does, and told to Lightning checkpoints."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.adapters.masked import MaskedLora, active_in, check_plain, mask_as_weights, on_linears
from billhook.adapters.merge import has_adapters
from billhook.model.handed import handing_of
from billhook.model.linears import weight_of
from billhook.model.shape import KEY

ADAPTERS = "billhook_adapters"
"""Where Lightning checkpoints keep how the adapters on their linears are scaled."""
ALL = "all-linear"
ADAPTER = "default"


@dataclass(frozen=True)
class LoRA:
    """LoRA (2106.09685): W x + alpha / r B A x on linears whose W is frozen; the defaults are LLM-Pruner's (2305.11627).

    Args:
        r: Rank of what is added: A is `[r, in_features]`, B `[out_features, r]`, zero at first.
        alpha: What is added is scaled by alpha / r.
        dropout: Share of the inputs of A that are zero in training.
        target: `"all-linear"` (every linear but the output embedding, the head of a classifier and those that hand out KV
            heads; experts whose weights are one tensor are no linears), or the linears by the ends of their names, such as
            `[q_proj, v_proj]`.

    Raises:
        ValueError: If a number is out of range, or `target` is empty.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target: str | list[str] = ALL

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r={self.r} must be at least 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if not self.target:
            raise ValueError(f"target={self.target!r} must be {ALL!r} or the ends of the names of linears")


def attach(model: PreTrainedModel, lora: LoRA | LoraConfig, classifies: bool = False) -> None:
    """Freezes a model and puts LoRA on its linears, in place; its class stays, adapters are float32 also on half weights.

    Args:
        model: The model.
        lora: What to put where. PEFT's own config is taken as it stands.
        classifies: Whether what is not in the base model is the head of a classifier, which may be new and so trains in full
            (under PEFT's own config: if its `modules_to_save` says so).

    Raises:
        ValueError: If the model has adapters already, or `target` names no linear in it, or one that hands out KV heads.
    """
    if has_adapters(model):
        raise ValueError("lora: the model has adapters already: merge them first (bh.merge), or leave lora out")
    head = _head(model) if classifies and isinstance(lora, LoRA) else {}
    config = _config(model, lora, head) if isinstance(lora, LoRA) else lora
    _check_not_handed(model, config)
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ValueError(f"lora={lora}: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    for module in head.values():
        module.requires_grad_(True)


def _handed(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if handing_of(module) is not None]


def _check_not_handed(model: nn.Module, config: LoraConfig) -> None:
    everything = config.target_modules == ALL and not config.exclude_modules
    if named := [name for name in _handed(model) if everything or check_target_module_exists(config, name)]:
        raise ValueError(
            f"lora: {named[0]} stores few KV heads and hands out many, which PEFT's LoRA cannot do: leave it out of "
            "target, or train it whole"
        )


def _head(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules beside the base model, if it is not the whole."""
    children = dict(model.named_children())
    return {name: module for name, module in children.items() if module is not model.base_model is not model}


def _config(model: PreTrainedModel, lora: LoRA, head: Mapping[str, nn.Module]) -> LoraConfig:
    skipped = [f"{name}.{inner}".rstrip(".") for name, top in head.items() for inner, one in top.named_modules() if _linear(one)]
    skipped += _handed(model) if lora.target == ALL else []
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number
        lora_dropout=lora.dropout,
        target_modules=lora.target,
        exclude_modules=skipped or None,
        fan_in_fan_out=_conv1d(model),
    )


def _conv1d(model: nn.Module) -> bool:
    return any(isinstance(module, Conv1D) for module in model.modules())


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def to_plain(lora: LoRA | LoraConfig) -> dict[str, Any]:
    """As numbers, strings, lists and dicts, which any checkpoint can hold; `from_plain` undoes it."""
    plain = asdict(lora) if isinstance(lora, LoRA) else lora.to_dict()  # type: ignore[no-untyped-call]
    found: dict[str, Any] = json.loads(json.dumps(plain, default=sorted))  # PEFT's sets of names
    return found


def from_plain(lora: Mapping[str, Any]) -> LoRA | LoraConfig:
    """What `to_plain` made."""
    if "peft_type" not in lora:
        return LoRA(**lora)
    return LoraConfig(**{name: value for name, value in lora.items() if name != "peft_type"})


def save_adapters(model: PreTrainedModel, checkpoint: dict[str, Any]) -> None:
    """Tells a Lightning checkpoint how the adapters in it are scaled, so that it can be exported without the script.

    It says nothing of a model without adapters, and of one with other adapters than one plain LoRA on each of some linears.
    """
    layers = on_linears(model)
    if not layers or sum(1 for name, _ in model.named_modules() if name.endswith("lora_A")) != len(layers):
        return
    try:
        check_plain(layers, "lora")
    except ValueError:
        return
    if all(active_in(layer) == list(layer.lora_A) == [ADAPTER] for layer in layers.values()):
        checkpoint[ADAPTERS] = {
            name: {
                "rank": int(layer.lora_A[ADAPTER].weight.shape[0]),
                "scaling": float(layer.scaling[ADAPTER]),
                "masked": isinstance(layer, MaskedLora),
            }
            for name, layer in layers.items()
        }


def without_adapters(checkpoint: dict[str, Any], name: str) -> dict[str, Any]:
    """A Lightning checkpoint of the base model alone; the checkpoint itself, if it does not say how its adapters are scaled.

    Args:
        checkpoint: A checkpoint that says what model it holds; it is not changed.
        name: Of its file.

    Raises:
        ValueError: If what it says of adapters is not as `save_adapters` writes it.
    """
    said = checkpoint.get(ADAPTERS)
    if said is None:
        return checkpoint
    kinds = {"rank": int, "scaling": float, "masked": bool}
    entries = list(said.values()) if isinstance(said, dict) else [None]
    if not all(isinstance(e, dict) and all(type(e.get(k)) is kind for k, kind in kinds.items()) for e in entries):
        raise ValueError(f"'{name}' does not say how its adapters are scaled as billhook writes it")
    shape = checkpoint[KEY]["shape"]
    plain = {part: _of_base(shape.get(part, {})) for part in ("tensors", "attributes")}
    held = checkpoint[KEY] | {"shape": shape | plain}
    return checkpoint | {"state_dict": _of_base(checkpoint["state_dict"]), KEY: held}


def _of_base(entries: Mapping[str, Any]) -> dict[str, Any]:
    """What is by the name of a tensor or attribute, without those of adapters, and by the names of the base model."""
    return {name.replace(".base_layer.", "."): value for name, value in entries.items() if ".lora_" not in name}


def put_back(model: PreTrainedModel, checkpoint: Mapping[str, Any], name: str) -> None:
    """Puts the adapters of a Lightning checkpoint on its base model, if it says how they are scaled.

    Args:
        model: What was built from `without_adapters`.
        checkpoint: The whole checkpoint.
        name: Of its file.

    Raises:
        ValueError: If they do not fit the model.
    """
    if not (said := checkpoint.get(ADAPTERS)):
        return
    prefix = checkpoint[KEY]["prefix"]
    state = {key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items()}
    linears = {key for key, module in model.named_modules() if _linear(module)}
    if unknown := sorted(said.keys() - linears):
        raise ValueError(f"'{name}' has adapters on {unknown[0][:80]}, which is no linear of its {type(model).__name__}")
    for key, entry in said.items():
        tensors = [state.get(f"{key}.{part}.{ADAPTER}.weight") for part in ("lora_A", "lora_B")]
        out, into = weight_of(model.get_submodule(key)).shape
        if [None if t is None else tuple(t.shape) for t in tensors] != [(entry["rank"], into), (out, entry["rank"])]:
            raise ValueError(f"'{name}' has adapters on {key} that do not fit its {type(model).__name__}")
    ranks = {re.escape(key): entry["rank"] for key, entry in said.items()}
    config = LoraConfig(r=1, rank_pattern=ranks, target_modules=list(said), fan_in_fan_out=_conv1d(model))
    inject_adapter_in_model(config, model)
    layers = on_linears(model)
    for key, entry in said.items():
        layers[key].scaling[ADAPTER] = entry["scaling"]
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    if any(entry["masked"] for entry in said.values()):
        mask_as_weights(model)
