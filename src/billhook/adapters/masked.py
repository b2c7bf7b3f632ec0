"""LoRA on sparse weights: its product, and masks that keep it from changing zeros."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from billhook.arguments import check_types
from billhook.engine import full_tensor, reshard
from billhook.model import base_of, is_adapter, is_pruned, prunable

WRAPPED = "base_model.model."  # PEFT's name prefix for the model that it wraps


Layers = dict[str, Any]
"""PEFT's layers, which have no types, by name."""


def mask_adapters(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
    """Restricts LoRA to nonzero weights, so that zeros survive merging.

    The layers compute x (W + (scale B A) * mask)^T.

    Each forward pass computes B A at the size of the weight and multiplies by the sum; in half precision and with dropout, it
    needs a second product of that size. The layers become `MaskedLora`, also in copies. Masks are not in the state dict.
    `unmask_adapters` undoes it.

    Args:
        model: A model with LoRA attached, not merged.
        masks: Masks by linear layer: bool, in the memory layout of the weight. Zeros always stay zero; layers without a mask are
            unchanged. Defaults to the nonzero weights of all layers with at least 1% zeros.

    Raises:
        ValueError: If there are no adapters, an adapter is merged or is not plain LoRA on a linear layer, a mask has another type
            or shape, or no layer has a mask.

    Example:
        >>> import billhook as bh
        >>> from peft import LoraConfig, get_peft_model
        >>> model = bh.load("tiny")
        >>> plan = bh.prune(model, bh.Magnitude(), sparsity=0.5)
        >>> model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        >>> mask_adapters(model)
        >>> bh.training.merge(model).lost
        False
    """
    check_types(mask_adapters, locals())
    reshard(model)  # a forward pass may have left parameters gathered
    layers = require_adapters(model)
    kept = find_masks(layers, masks)
    if not kept:
        raise ValueError(f"masks=None: no adapted layer, such as {next(iter(layers))}, has 1% zeros. Prune the model first.")
    check_plain_lora({name: layers[name] for name in kept}, "model")
    if masks is None:
        unmask_adapters(model)
    from billhook.adapters.masked_layer import Mask, MaskedLora

    for name, keep in kept.items():
        weight = layers[name].base_layer.weight
        layers[name].__class__ = MaskedLora  # a class, unlike a hook, also serves merging and survives copies
        layers[name].mask = Mask(None if isinstance(weight, DTensor) else keep.to(weight.device) & (weight.detach() != 0))


def unmask_adapters(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Undoes `mask_adapters`.

    Args:
        model: A model with adapters attached.
        names: Names of linear layers. Defaults to all.

    Raises:
        ValueError: If no adapters are attached.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> weight = nn.init.eye_(model[0].weight)
        >>> model = get_peft_model(model, LoraConfig(target_modules=["0"]))
        >>> mask_adapters(model)
        >>> unmask_adapters(model)
    """
    check_types(unmask_adapters, locals())
    layers = require_adapters(model)
    from peft.tuners.lora import Linear as LoraLinear

    from billhook.adapters.masked_layer import MaskedLora

    for name in layers if names is None else names:
        if isinstance(layers[name], MaskedLora):
            del layers[name].mask
            layers[name].__class__ = LoraLinear


def find_adapters(model: nn.Module) -> Layers:
    """Returns PEFT's layers on linear layers and convolutions, by layer name."""
    owners: dict[int, Any] = {}
    for module in model.modules():
        if is_adapter(module):
            owners.setdefault(id(base_of(module)), module)
    linears = prunable(model, output_embeddings=True, convolutions="all") if owners else {}
    return {name: owners[id(linear)] for name, linear in linears.items() if id(linear) in owners}


def require_adapters(model: nn.Module) -> Layers:
    """Returns PEFT's layers on linear layers, and raises if there are none."""
    layers = find_adapters(model)
    if not layers:
        raise ValueError(f"model: this {type(model).__name__} has no adapters on linear layers")
    return layers


def mask_nonzero(model: nn.Module) -> None:
    """Updates adapter masks to the nonzero weights; removes them if no layer is sparse."""
    if find_masks(require_adapters(model), None):
        mask_adapters(model)
    else:
        unmask_adapters(model)


@contextmanager
def masked_by_zeros(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Masks LoRA by the zeros of current weights, which a walk replaces by pruned ones."""
    from billhook.adapters.masked_layer import Mask, MaskedLora

    adapted = find_adapters(model)
    layers = [adapted[name] for name in names]
    before = [(type(layer), vars(layer).get("mask")) for layer in layers]
    try:
        for layer in layers:
            layer.__class__ = MaskedLora
            layer.mask = Mask(None)
        yield
    finally:
        for layer, (kind, mask) in zip(layers, before, strict=True):
            layer.__class__ = kind
            layer.mask = mask
            if mask is None:
                del layer.mask


def require_plain_adapters(model: nn.Module, linears: Iterable[str], argument: str) -> Layers:
    """Returns the plain LoRA adapters of some layers, and raises if there are none."""
    try:
        layers = require_adapters(model)
    except ValueError as error:
        raise ValueError(f"{argument} requires LoRA adapters: {error}") from None
    pruned = {name: layers[name] for name in linears if name in layers}
    if not pruned:
        raise ValueError(f"{argument} requires LoRA on the pruned layers; it is only on others, such as {next(iter(layers))}")
    check_plain_lora(pruned, argument)
    return pruned


def check_plain_lora(layers: Layers, argument: str) -> None:
    """Raises for adapters that are merged or whose product is not scale B A."""
    if not layers:
        return
    from peft.tuners.lora import Linear as LoraLinear

    from billhook.adapters.masked_layer import MaskedLora

    for name, layer in layers.items():
        kind = type(layer).__name__
        if type(layer) in (LoraLinear, MaskedLora):
            extras = [type(variant).__name__ for variant in layer.lora_variant.values()]
            extras += ["a bias"] * any(layer.lora_bias.values())
            extras += ["a replaced forward"] * ("forward" in vars(layer))
            extras += ["a nested adapter"] * (layer.base_layer is not layer.get_base_layer())
            kind = f"LoRA with {', '.join(extras)}" if extras else ""
        if kind:
            raise ValueError(f"{argument}: the adapter of {name} must be plain LoRA without bias, got {kind}")
        if layer.merged:
            raise ValueError(f"{argument}: the adapters of {name} are merged. Unmerge them first.")


def find_masks(layers: Layers, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Returns masks by layer; by default the nonzero weights of sparse layers."""
    weights = {name: layer.get_base_layer().weight.detach() for name, layer in layers.items()}
    kept = {}
    if masks is None:
        for name, weight in weights.items():
            keep = full_tensor(weight) != 0
            if is_pruned(int((~keep).sum()), keep.numel()):
                kept[name] = keep
        return kept
    for name, weight in weights.items():
        mask = masks.get(name, masks.get(name.removeprefix(WRAPPED)))
        if mask is None:
            continue
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            shapes = f"bool of shape {list(weight.shape)}, got {mask.dtype} {list(mask.shape)}"
            raise ValueError(f"masks: the mask of {name} must be {shapes}")
        kept[name] = mask
    if not kept:
        raise ValueError(f"masks: no name matches an adapted layer, such as {next(iter(weights))}")
    return kept
