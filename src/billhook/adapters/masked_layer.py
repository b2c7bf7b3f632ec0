"""LoRA layer with a mask. Its base class is PEFT's, which is imported only if needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D
from typing_extensions import Self

from billhook.engine import full_tensor
from billhook.model import active_in

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
