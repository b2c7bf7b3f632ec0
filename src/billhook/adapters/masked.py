"""LoRA on sparse weights: its product, and masks that keep it from changing zeros."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D
from typing_extensions import Self

from billhook.arguments import check_types
from billhook.engine.sharding import full_tensor, reshard
from billhook.model.layers import active_in, base_of, is_adapter, is_pruned, prunable

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Attributes that hold a module's hooks."""


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask (bool) that copies of a layer share, because it is replaced and never changed.

    None for a weight that is sharded over ranks: its nonzero entries are kept.
    """

    keep: Tensor | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


class MaskedLora(LoraLinear):
    """LoRA that adds nothing where its mask is False, in the forward pass and when merged.

    Attributes:
        mask: Mask in the memory layout of the weight, not in the state dict.
    """

    mask: Mask

    @property
    def keep(self) -> Tensor:
        """The mask (bool). For a sharded weight, all ranks must read it together."""
        return full_tensor(self.base_layer.get_parameter("weight")) != 0 if self.mask.keep is None else self.mask.keep

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Computes the masked product scale B A, which PEFT merges and unmerges."""
        product = super().get_delta_weight(adapter)
        return torch.where(self.keep.to(product.device), product, 0)

    def forward(self, x: Tensor, adapter_names: list[str] | None = None) -> Tensor:
        """Computes the base layer's output plus the active adapters' outputs."""
        if adapter_names is not None:
            raise ValueError(f"adapter_names={adapter_names} must be None: a masked adapter applies to the whole batch")
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
        """Returns whether a single product with the summed weight gives the same output.

        It does not with active dropout, with a custom forward or hooks on the base layer (quantized layers, walks), and in half
        precision, where the sum rounds small updates away.
        """
        base = self.base_layer
        if not active or type(base) not in (nn.Linear, Conv1D) or isinstance(base.weight, DTensor):
            return False
        if "forward" in vars(base) or any(getattr(base, hooks) for hooks in HOOKS):
            return False
        if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type):
            return False
        weights = [base.weight]
        for adapter in active:
            dropout = self.lora_dropout[adapter]
            if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.training):
                return False
            weights += [self.lora_A[adapter].weight, self.lora_B[adapter].weight]
        return all((weight.dtype, weight.device) == (x.dtype, x.device) for weight in weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.mask = Mask(None if self.mask.keep is None else fn(self.mask.keep))
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]


WRAPPED = "base_model.model."
"""PEFT's name prefix for the model that it wraps."""


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
    from billhook.adapters.masked import Mask, MaskedLora

    for name, keep in kept.items():
        weight = layers[name].base_layer.weight
        layers[name].__class__ = MaskedLora  # a class, unlike a hook, also serves merging and survives copies
        sharded = isinstance(weight, DTensor)
        layers[name].mask = Mask(None if sharded else keep.to(weight.device) & (weight.detach() != 0))


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

    from billhook.adapters.masked import MaskedLora

    for name in layers if names is None else names:
        if isinstance(layers[name], MaskedLora):
            del layers[name].mask
            layers[name].__class__ = LoraLinear


def find_adapters(model: nn.Module) -> dict[str, Any]:
    """Returns PEFT's layers on linear layers and convolutions, by layer name."""
    owners: dict[int, Any] = {}
    for module in model.modules():
        if is_adapter(module):
            owners.setdefault(id(base_of(module)), module)
    linears = prunable(model, output_embeddings=True, convolutions="all") if owners else {}
    return {name: owners[id(linear)] for name, linear in linears.items() if id(linear) in owners}


def require_adapters(model: nn.Module) -> dict[str, Any]:
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
    from billhook.adapters.masked import Mask, MaskedLora

    adapted = find_adapters(model)
    layers = [adapted[name] for name in names]
    before = [(type(layer), vars(layer).get("mask")) for layer in layers]
    try:
        for layer in layers:
            layer.__class__, layer.mask = MaskedLora, Mask(None)
        yield
    finally:
        for layer, (kind, mask) in zip(layers, before, strict=True):
            layer.__class__, layer.mask = kind, mask
            if mask is None:
                del layer.mask


def require_plain_adapters(model: nn.Module, linears: Iterable[str], argument: str) -> dict[str, Any]:
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


def check_plain_lora(layers: Mapping[str, Any], argument: str) -> None:
    """Raises for adapters that are merged or whose product is not scale B A."""
    if not layers:
        return
    from peft.tuners.lora import Linear as LoraLinear

    from billhook.adapters.masked import MaskedLora

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


def find_masks(layers: Mapping[str, Any], masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
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
