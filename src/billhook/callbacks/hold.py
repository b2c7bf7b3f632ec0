"""Masks that are held: pruned weights are zero after every step of an optimizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from billhook.sparsity.linears import prunable
from billhook.structure.shape import find_transformer


class Hold:
    """Keep-masks of a model's linears, one byte a weight, and the hooks that hold them.

    Attributes:
        masks: By linear, bool, as the weights lie in memory.
    """

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._copies: list[dict[str, Tensor]] = []
        self._hooks: list[RemovableHandle] = []

    def attach(self, model: nn.Module, optimizers: Sequence[Optimizer], copies: Sequence[nn.Module]) -> None:
        """Holds from now on: in the model after each step of these optimizers, and in averaged copies of it."""
        self.detach()
        self._weights = _weights(model)
        self._copies = [_weights(find_transformer(copy)) for copy in copies]
        self._hooks = [optimizer.register_step_post_hook(self._step) for optimizer in optimizers]
        self.hold(self.masks)

    def hold(self, masks: dict[str, Tensor]) -> None:
        """Takes other masks, and applies them."""
        self.masks = {name: mask.to(self._weights[name].device) for name, mask in masks.items()}
        for weights in (self._weights, *self._copies):
            self._apply(weights)

    def detach(self) -> None:
        """Lets go of model and optimizers; the masks stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._weights, self._copies = [], {}, []

    def _step(self, *_: object) -> None:
        self._apply(self._weights)

    def _apply(self, weights: dict[str, Tensor]) -> None:
        if self.masks:
            torch._foreach_mul_([weights[name].data for name in self.masks], list(self.masks.values()))

    def state_dict(self) -> dict[str, Any]:
        """The masks, one bit a weight."""
        return {
            name: {"shape": list(mask.shape), "bits": torch.from_numpy(np.packbits(mask.cpu().numpy()))}
            for name, mask in self.masks.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Masks that were saved."""
        self.masks = {}
        for name, saved in state.items():
            bits = np.unpackbits(saved["bits"].cpu().numpy(), count=int(np.prod(saved["shape"])))
            self.masks[name] = torch.from_numpy(bits.view(np.bool_)).view(saved["shape"])


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: linear.get_parameter("weight") for name, linear in prunable(model, output_embeddings=True).items()}
