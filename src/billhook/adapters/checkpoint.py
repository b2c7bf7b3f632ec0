"""LoRA in Lightning checkpoints: how it is scaled, and the checkpoint of the base model that is beneath."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.adapters.masked import check_plain_lora, find_adapters, mask_nonzero
from billhook.model.layers import active_in, is_linear, size_of
from billhook.model.shape import KEY

ADAPTERS = "billhook_adapters"
"""The key of Lightning checkpoints under which they keep how the adapters on their linears are scaled."""
ADAPTER = "default"
"""What peft calls an adapter that is given no name."""


def save_adapters(model: PreTrainedModel, checkpoint: dict[str, Any]) -> None:
    """Records in a Lightning checkpoint how the adapters in it are scaled, so that it can be exported without the script.

    Nothing is recorded of a model without adapters, or with other adapters than one plain LoRA on each of some linears.
    """
    layers = find_adapters(model)
    if not layers or sum(1 for name, _ in model.named_modules() if name.endswith("lora_A")) != len(layers):
        return
    from billhook.adapters.masked_layer import MaskedLora

    try:
        check_plain_lora(layers, "lora")
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


def base_checkpoint(checkpoint: dict[str, Any], name: str) -> dict[str, Any]:
    """Makes a Lightning checkpoint of the base model alone; returns the checkpoint itself, if it records no adapters."""
    recorded = checkpoint.get(ADAPTERS)
    if recorded is None:
        return checkpoint
    kinds = {"rank": int, "scaling": float, "masked": bool}
    entries = list(recorded.values()) if isinstance(recorded, dict) else [None]
    if not all(isinstance(e, dict) and all(type(e.get(k)) is kind for k, kind in kinds.items()) for e in entries):
        raise ValueError(f"'{name}' does not say how its adapters are scaled as billhook writes it")
    shape = checkpoint[KEY]["shape"]
    plain = {part: _of_base(shape.get(part, {})) for part in ("tensors", "attributes")}
    of_base = checkpoint[KEY] | {"shape": shape | plain}
    if constants := of_base.get("constants"):
        of_base["constants"] = {part: _of_base(entries) for part, entries in constants.items()}
    return checkpoint | {"state_dict": _of_base(checkpoint["state_dict"]), KEY: of_base}


def _of_base(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Drops adapter entries and renames the rest to the base model's names."""
    return {name.replace(".base_layer.", "."): value for name, value in entries.items() if ".lora_" not in name}


def restore_adapters(model: PreTrainedModel, checkpoint: Mapping[str, Any], name: str) -> None:
    """Puts the adapters of a Lightning checkpoint on its base model, if it records how they are scaled."""
    if not (recorded := checkpoint.get(ADAPTERS)):
        return
    prefix, modules = checkpoint[KEY]["prefix"], dict(model.named_modules())
    state = {key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items()}
    for key, entry in recorded.items():
        if not is_linear(modules.get(key, model)):
            raise ValueError(f"'{name}' has adapters on {key[:80]}, which is no linear of its {type(model).__name__}")
        out, into = size_of(modules[key])
        for part, size in (("lora_A", (entry["rank"], into)), ("lora_B", (out, entry["rank"]))):
            tensor = state.get(f"{key}.{part}.{ADAPTER}.weight")
            if tensor is None or tensor.shape != size:
                raise ValueError(f"'{name}' has adapters on {key} that do not fit its {type(model).__name__}")
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=1,
        rank_pattern={re.escape(key): entry["rank"] for key, entry in recorded.items()},
        target_modules=list(recorded),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules.values()),
    )
    inject_adapter_in_model(config, model)
    layers = find_adapters(model)
    for key, entry in recorded.items():
        layers[key].scaling[ADAPTER] = entry["scaling"]
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    if any(entry["masked"] for entry in recorded.values()):
        mask_nonzero(model)
