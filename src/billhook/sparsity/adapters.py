"""LoRA on pruned weights: merged so that every zero stays, or masked from the start so that merging changes nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from billhook.sparsity.linears import prunable

WRAPPED = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""


@dataclass(frozen=True)
class Merged:
    """What `merge` did; `print` says it in a line.

    Attributes:
        model: The model without adapters.
        error: How much of what the adapters add falls on zeros and was left out: its Frobenius norm as a share of the whole's,
            by linear; 0 where the adapters were masked.
    """

    model: nn.Module
    error: dict[str, float]

    def __str__(self) -> str:
        worst = max(self.error, key=self.error.__getitem__)
        mean = sum(self.error.values()) / len(self.error)
        return (
            f"merged {len(self.error)} linears, zeros kept; of what the adapters add, {mean:.1%} was left out on average, "
            f"{self.error[worst]:.1%} at most ({worst})"
        )


@torch.no_grad()
def merge(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Merged:
    """Merges adapters into weights of which every zero stays zero: W' = (W + scale B A) * mask.

    What the adapters do at the zeros is lost, unless they were trained under `mask_adapters`.

    Args:
        model: A model with PEFT's adapters attached; its base weights are changed in place.
        masks: Keep-masks by linear, bool, as the weights lie in memory; linears without one are merged in full. By default what
            is not zero now.

    Raises:
        ValueError: If no adapters are attached, they are merged already, or a mask is not bool or of another shape, or none fits.
    """
    layers = _layers(model)
    if merged := next((name for name, layer in layers.items() if layer.merged), None):
        raise ValueError(f"model: the adapters of {merged} are merged already, and which weights were zero is not known any more")
    kept = _fitting(layers, masks)
    error: dict[str, float] = {}
    for name, layer in layers.items():
        exact = _unmask(layer)
        weight = layer.get_base_layer().weight
        before = weight.clone()
        layer.merge()
        added = (weight - before).float()
        whole = float(added.norm())
        error[name] = 0.0 if exact or not whole else float(added.masked_fill(kept[name], 0).norm()) / whole
        weight.masked_fill_(~kept[name], 0)
    return Merged(_without_adapters(model), error)


def mask_adapters(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
    """Makes LoRA act only where weights are not zero: x (W + (scale B A) * mask)^T, so that merging changes nothing.

    It costs a second product of the weight's size in each forward. The masks are not part of the state dict.

    Args:
        model: A model with LoRA attached, not merged.
        masks: As in `merge`.

    Raises:
        ValueError: If no adapters are attached, one is not plain LoRA on a linear layer, or a mask is not bool or of another
            shape, or none fits.
    """
    layers = _layers(model)
    kept = _fitting(layers, masks)
    for name, layer in layers.items():
        if not isinstance(layer, LoraLinear) or layer.lora_variant or any(layer.lora_bias.values()):
            raise ValueError(f"model: the adapter of {name} is not plain LoRA without bias, and cannot be masked")
        if layer.merged:
            raise ValueError(f"model: the adapters of {name} are merged already")
    for name, layer in layers.items():
        vars(layer)["forward"] = partial(_masked_forward, layer, kept[name])


def unmask_adapters(model: nn.Module) -> None:
    """Undoes `mask_adapters`."""
    for layer in _layers(model).values():
        _unmask(layer)


def _masked_forward(layer: Any, mask: Tensor, x: Tensor) -> Tensor:  # noqa: ANN401 - PEFT does not type its layers
    result: Tensor = layer.base_layer(x)
    if layer.disable_adapters or layer.merged:
        return result
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            product = layer.get_delta_weight(adapter)
            product = product.masked_fill(~mask.to(product.device), 0)
            given = layer.lora_dropout[adapter](x.to(product.dtype))
            added = linear(given, product.t() if layer.fan_in_fan_out else product)
            result = result + added.to(result.dtype)
    return result


def _layers(model: nn.Module) -> dict[str, Any]:
    """The layers that adapters are on, by the name of their linear."""
    owners = {id(BaseTunerLayer.get_base_layer(m)): m for m in model.modules() if isinstance(m, BaseTunerLayer)}
    linears = prunable(model, output_embeddings=True)
    layers = {name: owners[id(one)] for name, one in linears.items() if id(one) in owners}
    if not layers:
        raise ValueError(f"model: no adapters are attached to the linears of this {type(model).__name__}")
    return layers


def _fitting(layers: Mapping[str, Any], masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    if masks is None:
        return {name: weight.detach() != 0 for name, weight in weights.items()}
    given = {name: masks.get(name, masks.get(name.removeprefix(WRAPPED))) for name in weights}
    if not any(mask is not None for mask in given.values()):
        raise ValueError(f"masks: none is of a linear with adapters, such as {next(iter(weights))}")
    for name, mask in given.items():
        if mask is not None and (mask.dtype != torch.bool or mask.shape != weights[name].shape):
            raise ValueError(f"masks: that of {name} must be bool of shape {list(weights[name].shape)}, got {list(mask.shape)}")
    return {name: torch.ones_like(weights[name], dtype=torch.bool) if m is None else m for name, m in given.items()}


def _unmask(layer: nn.Module) -> bool:
    return vars(layer).pop("forward", None) is not None


def _without_adapters(model: nn.Module) -> nn.Module:
    if isinstance(model, PeftModel):
        base: Any = model.base_model
        return base.unload()  # type: ignore[no-any-return]
    for parent, name, layer in list(_places(model)):
        setattr(parent, name, layer.get_base_layer())
    return model


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, BaseTunerLayer):
                yield parent, name, child
