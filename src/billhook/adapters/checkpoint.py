"""LoRA in Lightning checkpoints: its scaling, and the checkpoint of the base model."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.adapters.masked import check_plain_lora, find_adapters, mask_nonzero
from billhook.model import KEY, Checkpoint, active_in, is_linear, size_of

ADAPTERS = "billhook_adapters"  # key of Lightning checkpoints for the scaling of their adapters
ADAPTER = "default"  # PEFT's name for an unnamed adapter


def save_adapters(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Records the scaling of adapters in a Lightning checkpoint, so that it can be exported.

    Records nothing unless every adapter is one plain LoRA on a linear layer.
    """
    layers = find_adapters(model)
    if not layers or sum(1 for name, _ in model.named_modules() if name.endswith("lora_A")) != len(layers):
        return
    from billhook.adapters.masked_layer import MaskedLora

    try:
        check_plain_lora(layers, "lora")
    except ValueError:
        return
    recorded = {}
    for name, layer in layers.items():
        if not active_in(layer) == list(layer.lora_A) == [ADAPTER]:
            return
        recorded[name] = {
            "rank": int(layer.lora_A[ADAPTER].weight.shape[0]),
            "scaling": float(layer.scaling[ADAPTER]),
            "masked": isinstance(layer, MaskedLora),
        }
    checkpoint[ADAPTERS] = recorded


def base_checkpoint(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Returns the Lightning checkpoint of the base model; unchanged without adapters."""
    recorded = checkpoint.get(ADAPTERS)
    if recorded is None:
        return checkpoint
    types = {"rank": int, "scaling": float, "masked": bool}
    entries = recorded.values() if isinstance(recorded, dict) else [None]
    if not all(isinstance(entry, dict) and all(type(entry.get(key)) is types[key] for key in types) for entry in entries):
        raise ValueError(f"'{name}' has a malformed entry {ADAPTERS!r} for its adapters")
    shape = checkpoint[KEY]["shape"]
    plain = {part: _of_base(shape.get(part, {})) for part in ("tensors", "attributes")}
    of_base = checkpoint[KEY] | {"shape": shape | plain, "constants": _of_base(checkpoint[KEY]["constants"])}
    return checkpoint | {"state_dict": _of_base(checkpoint["state_dict"]), KEY: of_base}


def _of_base(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Drops adapter entries and renames the rest to the base model's names."""
    return {name.replace(".base_layer.", "."): value for name, value in entries.items() if ".lora_" not in name}


def restore_adapters(model: PreTrainedModel, checkpoint: Checkpoint, name: str) -> None:
    """Puts the adapters of a Lightning checkpoint on its base model, if it records them."""
    if not (recorded := checkpoint.get(ADAPTERS)):
        return
    from peft import LoraConfig, inject_adapter_in_model

    prefix = checkpoint[KEY]["prefix"]
    modules = dict(model.named_modules())
    state = {key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items()}
    for key, entry in recorded.items():
        if not is_linear(modules.get(key, model)):
            raise ValueError(f"'{name}' has adapters on {key[:80]}, which is not a linear layer of its {type(model).__name__}")
        out, into = size_of(modules[key])
        for part, size in (("lora_A", (entry["rank"], into)), ("lora_B", (out, entry["rank"]))):
            tensor = state.get(f"{key}.{part}.{ADAPTER}.weight")
            if tensor is None or tensor.shape != size:
                raise ValueError(f"'{name}' has adapters on {key} that do not fit its {type(model).__name__}")
    config = LoraConfig(
        r=1,
        rank_pattern={re.escape(key): entry["rank"] for key, entry in recorded.items()},
        target_modules=list(recorded),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    inject_adapter_in_model(config, model)
    layers = find_adapters(model)
    for key, entry in recorded.items():
        layers[key].scaling[ADAPTER] = entry["scaling"]
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    if any(entry["masked"] for entry in recorded.values()):
        mask_nonzero(model)
