"""LoRA on pruned weights: the product that it adds to a weight, and masks that keep it from changing zeros."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from billhook.arguments import annotated
from billhook.model.linears import is_pruned, prunable, weight_of
from billhook.running.sharded.shards import reshard, whole

WRAPPED = "base_model.model."
"""Prefix of PEFT's for the names of the model that it wraps."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where a module has its hooks."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A keep-mask, bool, that copies of a layer have in common, as it is never changed, but replaced.

    Of a weight that is sharded over ranks there is none (None): the weights that are not zero are kept.
    """

    keep: Tensor | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class MaskedLora(LoraLinear):
    """LoRA that adds nothing where a mask is False, in the forward and when it is merged; `mask_adapters` makes such layers.

    Attributes:
        mask: Where it may add, as the weight lies in memory; no part of the state dict.
    """

    mask: Mask

    @property
    def keep(self) -> Tensor:
        """The mask, bool; of a weight that is sharded, all ranks ask for it together, or while the weight is gathered."""
        return whole(self.base_layer.get_parameter("weight")) != 0 if self.mask.keep is None else self.mask.keep

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Computes the product scale B A, masked; PEFT merges and unmerges this."""
        product = super().get_delta_weight(adapter)
        return torch.where(self.keep.to(product.device), product, 0)

    def forward(self, x: Tensor, adapter_names: list[str] | None = None) -> Tensor:
        """Computes the base layer's output plus those of the active adapters."""
        if adapter_names is not None:
            raise ValueError(f"adapter_names={adapter_names} must be None: a masked adapter is the same for the whole batch")
        if self.disable_adapters and self.merged:
            self.unmerge()
        base: Any = self.base_layer
        active = [] if self.merged else active_in(self)
        if self._is_summed(x, active):
            weight: Tensor = sum(map(self.get_delta_weight, active), base.weight)
            return linear(x, weight.t() if self.fan_in_fan_out else weight, base.bias)
        result: Tensor = base(x)
        dtype = result.dtype
        for adapter in active:
            product = self.get_delta_weight(adapter)
            inputs = self.lora_dropout[adapter](x.to(product.dtype))
            result = result + linear(inputs, product.t() if self.fan_in_fan_out else product)
        return result.to(dtype)

    def _is_summed(self, x: Tensor, active: Sequence[str]) -> bool:
        """Tells whether one product by the sum of the weight and what is added to it gives what a product by each does.

        It does not where dropout changes an adapter's inputs, where the base layer's own forward or hooks have to be called (a
        quantized one's, a walk's), and in half precision, in which the sum rounds away what is small beside the weight.
        """
        base = self.base_layer
        tensors = [base.weight, x, *(one[adapter].weight for adapter in active for one in (self.lora_A, self.lora_B))]
        dropouts = [self.lora_dropout[adapter] for adapter in active]
        return (
            bool(active)
            and type(base) in (nn.Linear, Conv1D)
            and not ("forward" in base.__dict__ or any(getattr(base, hooks) for hooks in HOOKS))
            and all(type(one) is nn.Identity or (type(one) is nn.Dropout and not one.training) for one in dropouts)
            and not isinstance(base.weight, DTensor)
            and x.dtype in (torch.float32, torch.float64)
            and len({(one.dtype, one.device) for one in tensors}) == 1
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.mask = Mask(None if self.mask.keep is None else fn(self.mask.keep))
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]


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
        >>> bh.merge(model).lost
        False
    """
    annotated(mask_adapters, locals())
    reshard(model)  # what a forward has left gathered is held as shards
    layers = adapted_linears(model)
    kept = fitting(layers, masks)
    if not kept:
        raise ValueError(f"masks=None: of no linear with adapters, such as {next(iter(layers))}, is 1 % zero: prune first")
    check_plain({name: layers[name] for name in kept}, "model")
    if masks is None:
        unmask_adapters(model)
    for name, keep in kept.items():
        weight = layers[name].base_layer.weight
        layers[name].__class__ = MaskedLora
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
    annotated(unmask_adapters, locals())
    layers = adapted_linears(model)
    for name in layers if names is None else names:
        if isinstance(layers[name], MaskedLora):
            del layers[name].mask
            layers[name].__class__ = LoraLinear


def on_linears(model: nn.Module) -> dict[str, Any]:
    """Finds PEFT's layers on linears, by the name of the linear."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            owners.setdefault(id(BaseTunerLayer.get_base_layer(module)), module)
    linears = prunable(model, output_embeddings=True, convolutions="all") if owners else {}
    return {name: owners[id(one)] for name, one in linears.items() if id(one) in owners}


def adapted_linears(model: nn.Module) -> dict[str, Any]:
    """Finds PEFT's layers on linears, and refuses a model without any."""
    layers = on_linears(model)
    if not layers:
        raise ValueError(f"model: no adapters are attached to the linears of this {type(model).__name__}")
    return layers


def mask_as_weights(model: nn.Module) -> None:
    """Masks LoRA as the weights are now, also if none of them is pruned: `mask_adapters`, or else `unmask_adapters`."""
    if fitting(adapted_linears(model), None):
        mask_adapters(model)
    else:
        unmask_adapters(model)


def plain_adapters(model: nn.Module, linears: Iterable[str], asked: str) -> dict[str, Any]:
    """Finds the layers with plain LoRA on these linears, as the argument `asked` needs them, and refuses if there are none."""
    try:
        layers = adapted_linears(model)
    except ValueError as error:
        raise ValueError(f"{asked} needs LoRA on the linears, and there is none: {error}") from None
    found = {name: layers[name] for name in linears if name in layers}
    if not found:
        raise ValueError(f"{asked} needs LoRA on the linears that are pruned; it is only on others, such as {next(iter(layers))}")
    check_plain(found, asked)
    return found


def check_plain(layers: Mapping[str, Any], asked: str) -> None:
    """Refuses adapters whose product is not simply scale B A, as the argument `asked` needs it, or is in the weight already."""
    for name, layer in layers.items():
        kind = type(layer).__name__
        if type(layer) in (LoraLinear, MaskedLora):
            extras = [type(one).__name__ for one in layer.lora_variant.values()]
            extras += ["a bias of its own"] * any(layer.lora_bias.values())
            extras += ["another forward in its place"] * ("forward" in vars(layer))
            extras += ["another adapter inside"] * (layer.base_layer is not layer.get_base_layer())
            kind = f"LoRA with {', '.join(extras)}" if extras else ""
        if kind:
            raise ValueError(f"{asked}: the adapter of {name} must be plain LoRA without bias, got {kind}")
        if layer.merged:
            raise ValueError(f"{asked}: the adapters of {name} are merged already, and must not be: unmerge them first")


def fitting(layers: Mapping[str, Any], masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Returns the keep-masks of these layers' weights, by linear; by default the nonzero weights of those that are pruned."""
    weights = {name: layer.get_base_layer().weight.detach() for name, layer in layers.items()}
    if masks is None:
        kept = {name: whole(weight) != 0 for name, weight in weights.items()}
        return {name: keep for name, keep in kept.items() if is_pruned(int((~keep).sum()), keep.numel())}
    found = {name: masks.get(name, masks.get(name.removeprefix(WRAPPED))) for name in weights}
    given = {name: mask for name, mask in found.items() if mask is not None}
    if not given:
        raise ValueError(f"masks: none is of a linear with adapters, such as {next(iter(weights))}")
    for name, mask in given.items():
        if mask.dtype != torch.bool or mask.shape != weights[name].shape:
            wanted = list(weights[name].shape)
            raise ValueError(f"masks: that of {name} must be bool of shape {wanted}, got {mask.dtype} {list(mask.shape)}")
    return given


def active_in(layer: Any) -> list[str]:  # noqa: ANN401 - PEFT does not type its layers
    """Lists the adapters with which a layer of LoRA computes now."""
    return [] if layer.disable_adapters else [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]


@torch.no_grad()
def product_of(layer: Any) -> Tensor:  # noqa: ANN401
    """Computes scale B A, which plain LoRA adds to its weight: of the active adapters, float32, `[out_features, in_features]`."""
    weight = weight_of(layer.base_layer)
    product = torch.zeros(weight.shape, device=weight.device)
    for adapter in active_in(layer):
        b, a = (whole(one[adapter].weight).float().to(weight.device) for one in (layer.lora_B, layer.lora_A))
        product.addmm_(b, a, alpha=layer.scaling[adapter])  # in place, so in float32 under autocast too
    if isinstance(layer, MaskedLora):
        keep = layer.keep.to(weight.device)
        product.masked_fill_(~(keep.t() if layer.fan_in_fan_out else keep), 0)
    return product


def counted(weight: Tensor, layer: Any | None) -> Tensor:  # noqa: ANN401
    """Returns the weight that a criterion scores: W, or W + scale B A in float32, zero where W is, as pruned weights stay so."""
    return weight if layer is None else product_of(layer).add_(weight).masked_fill_(weight == 0, 0)
