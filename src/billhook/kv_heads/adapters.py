"""Fewer KV heads under LoRA: W + s B A pooled is W pooled + s (B pooled) A, so what is pooled of a linear is pooled of its B."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.adapters.beneath import MERGE, adapted, beneath
from billhook.kv_heads.methods.base import KVMethod
from billhook.kv_heads.pooling import Pooled, Shrunk
from billhook.model.shapes.shape import Shape, shape_of


def check_adapters(model: nn.Module, method: KVMethod) -> None:
    """Refuses adapters that are not plain LoRA, or that the method does not pool as it pools weights."""
    if not method.pools_adapters:
        raise ValueError(f"method='{method.name}' pools weights in a way that their adapters cannot follow: {MERGE}")
    if not (layers := adapted(model)):
        return
    from peft.tuners.lora import LoraLayer

    for name, layer in layers.items():
        own = {part.partition(".")[0] for part, _ in layer.named_parameters()} - {"base_layer"}
        if not isinstance(layer, LoraLayer) or own - {"lora_A", "lora_B"}:
            raise ValueError(f"{name} has adapters that are not plain LoRA ({', '.join(sorted(own))}): {MERGE}")


def with_adapters(model: PreTrainedModel, parameters: Mapping[str, Pooled], shape: Shape) -> Shrunk:
    """Returns how a model shrinks from how the one beneath its adapters does; refuses if what adapters read becomes less."""
    layers, now = adapted(model), shape_of(model)
    pooled = {beneath(name, layers): own for name, own in parameters.items()}
    tensors = {beneath(name, layers): size for name, size in shape.tensors.items()}
    attributes = {beneath(name, layers): value for name, value in shape.attributes.items()}
    for name, layer in layers.items():
        own = parameters.get(f"{name}.weight")
        if own is None:
            continue
        outputs = 1 if isinstance(layer.get_base_layer(), Conv1D) else 0
        if own.dim != outputs:
            raise ValueError(f"{name}.weight shrinks along what its adapters read: {MERGE}")
        size = shape.tensors[f"{name}.weight"][outputs]
        attributes[f"{name}.out_features"] = size
        for adapter, second in layer.lora_B.items():
            part = f"{name}.lora_B.{adapter}"
            pooled[f"{part}.weight"] = Pooled(0, own.index)
            tensors[f"{part}.weight"], attributes[f"{part}.out_features"] = (size, second.weight.shape[1]), size
    attributes = {name: value for name, value in attributes.items() if name in now.attributes or name in shape.attributes}
    return pooled, replace(now, tensors=now.tensors | tensors, attributes=now.attributes | attributes, config=shape.config)
