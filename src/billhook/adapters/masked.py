"""LoRA on pruned weights: the product that it adds to a weight, and masks that keep it from changing zeros."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from billhook.arguments import check_types
from billhook.engine.sharding import full_tensor, reshard
from billhook.model.layers import active_in, base_of, is_adapter, is_pruned, prunable, weight_of

WRAPPED = "base_model.model."
"""Prefix of PEFT's for the names of the model that it wraps."""


def mask_adapters(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
    """Makes LoRA act only where weights are not zero: x (W + (scale B A) * mask)^T, so that merging changes nothing.

    Each forward makes B A as large as the weight, and multiplies by their sum; in half precision and with dropout it costs a
    second product of the weight's size instead. The layers become `MaskedLora`, also in copies of the model, deep or pickled;
    the masks are no part of the state dict. `unmask_adapters` undoes it.

    Args:
        model: A model with LoRA attached, not merged.
        masks: Keep-masks by linear, bool, as the weights lie in memory; zeros stay zeros in any case, and linears without a mask
            stay as they are. By default all weights that are not zero now, in linears of which 1 % or more is zero.

    Raises:
        ValueError: If no adapters are attached, one is not plain LoRA on a linear layer or merged already, a mask is not bool or
            of another shape, none fits, or there is none and no linear is pruned.

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
    reshard(model)  # what a forward has left gathered is held as shards
    layers = require_adapters(model)
    kept = find_masks(layers, masks)
    if not kept:
        raise ValueError(f"masks=None: of no linear with adapters, such as {next(iter(layers))}, is 1 % zero: prune first")
    check_plain_lora({name: layers[name] for name in kept}, "model")
    if masks is None:
        unmask_adapters(model)
    from billhook.adapters.masked_layer import Mask, MaskedLora

    for name, keep in kept.items():
        weight = layers[name].base_layer.weight
        layers[name].__class__ = MaskedLora  # PEFT's merging asks it for its product, too, and copies keep it: no hook does that
        sharded = isinstance(weight, DTensor)
        layers[name].mask = Mask(None if sharded else keep.to(weight.device) & (weight.detach() != 0))


def unmask_adapters(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Undoes `mask_adapters`.

    Args:
        model: A model with adapters attached.
        names: Of linears; all by default.

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


def find_adapters(model: nn.Module) -> dict[str, Any]:
    """Finds PEFT's layers on linears, by the name of the linear."""
    owners: dict[int, Any] = {}
    for module in model.modules():
        if is_adapter(module):
            owners.setdefault(id(base_of(module)), module)
    linears = prunable(model, output_embeddings=True, convolutions="all") if owners else {}
    return {name: owners[id(linear)] for name, linear in linears.items() if id(linear) in owners}


def require_adapters(model: nn.Module) -> dict[str, Any]:
    """Finds PEFT's layers on linears, and refuses a model without any."""
    layers = find_adapters(model)
    if not layers:
        raise ValueError(f"model: no adapters are attached to the linears of this {type(model).__name__}")
    return layers


def mask_nonzero(model: nn.Module) -> None:
    """Masks LoRA as the weights are now, also if none of them is pruned: `mask_adapters`, or else `unmask_adapters`."""
    if find_masks(require_adapters(model), None):
        mask_adapters(model)
    else:
        unmask_adapters(model)


def require_plain_adapters(model: nn.Module, linears: Iterable[str], argument: str) -> dict[str, Any]:
    """Finds the layers with plain LoRA on these linears, as an argument needs them, and refuses if there are none."""
    try:
        layers = require_adapters(model)
    except ValueError as error:
        raise ValueError(f"{argument} needs LoRA on the linears, and there is none: {error}") from None
    pruned = {name: layers[name] for name in linears if name in layers}
    if not pruned:
        elsewhere = f"it is only on others, such as {next(iter(layers))}"
        raise ValueError(f"{argument} needs LoRA on the linears that are pruned; {elsewhere}")
    check_plain_lora(pruned, argument)
    return pruned


def check_plain_lora(layers: Mapping[str, Any], argument: str) -> None:
    """Refuses adapters whose product is not simply scale B A, as an argument needs it, or is in the weight already."""
    if not layers:
        return
    from peft.tuners.lora import Linear as LoraLinear

    from billhook.adapters.masked_layer import MaskedLora

    for name, layer in layers.items():
        kind = type(layer).__name__
        if type(layer) in (LoraLinear, MaskedLora):
            extras = [type(variant).__name__ for variant in layer.lora_variant.values()]
            extras += ["a bias of its own"] * any(layer.lora_bias.values())
            extras += ["another forward in its place"] * ("forward" in vars(layer))
            extras += ["another adapter inside"] * (layer.base_layer is not layer.get_base_layer())
            kind = f"LoRA with {', '.join(extras)}" if extras else ""
        if kind:
            raise ValueError(f"{argument}: the adapter of {name} must be plain LoRA without bias, got {kind}")
        if layer.merged:
            raise ValueError(f"{argument}: the adapters of {name} are merged already, and must not be: unmerge them first")


def find_masks(layers: Mapping[str, Any], masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Returns the keep-masks of these layers' weights, by linear; by default the nonzero weights of those that are pruned."""
    weights = {name: layer.get_base_layer().weight.detach() for name, layer in layers.items()}
    if masks is None:
        nonzero = {name: full_tensor(weight) != 0 for name, weight in weights.items()}
        return {name: keep for name, keep in nonzero.items() if is_pruned(int((~keep).sum()), keep.numel())}
    kept = dict[str, Tensor]()
    for name, weight in weights.items():
        mask = masks.get(name, masks.get(name.removeprefix(WRAPPED)))
        if mask is None:
            continue
        if mask.dtype != torch.bool or mask.shape != weight.shape:
            wanted = list(weight.shape)
            raise ValueError(f"masks: that of {name} must be bool of shape {wanted}, got {mask.dtype} {list(mask.shape)}")
        kept[name] = mask
    if not kept:
        raise ValueError(f"masks: none is of a linear with adapters, such as {next(iter(weights))}")
    return kept


@torch.no_grad()
def lora_product(layer: Any) -> Tensor:  # noqa: ANN401
    """Computes scale B A, which plain LoRA adds to its weight: of the active adapters, float32, `[out_features, in_features]`."""
    from billhook.adapters.masked_layer import MaskedLora

    weight = weight_of(layer.base_layer)
    product = torch.zeros(weight.shape, device=weight.device)
    for adapter in active_in(layer):
        b, a = (full_tensor(part[adapter].weight).float().to(weight.device) for part in (layer.lora_B, layer.lora_A))
        product.addmm_(b, a, alpha=layer.scaling[adapter])  # in place, so in float32 under autocast too
    if isinstance(layer, MaskedLora):
        keep = layer.keep.to(weight.device)
        product.masked_fill_(~(keep.t() if layer.fan_in_fan_out else keep), 0)
    return product


def effective_weight(weight: Tensor, layer: Any | None) -> Tensor:  # noqa: ANN401
    """Returns the weight that a criterion scores: W, or W + scale B A in float32, zero where W is, as pruned weights stay so."""
    return weight if layer is None else lora_product(layer).add_(weight).masked_fill_(weight == 0, 0)
