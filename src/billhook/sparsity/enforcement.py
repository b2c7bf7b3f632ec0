"""Enforces masks: pruned weights are zero after every optimizer step."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from billhook.adapters.masked import mask_adapters, unmask_adapters
from billhook.arguments import check_types
from billhook.engine import full_tensor, local, reshard, sharded_as
from billhook.linalg import TensorDict
from billhook.model import weight_holders
from billhook.sparsity.weight_plan import pack_mask, unpack_mask


class EnforcedMasks:
    """Masks of a model's linear layers, a byte per weight, and the hooks that enforce them."""

    def __init__(self) -> None:
        self._masks: TensorDict = {}
        self._saved: Mapping[str, Any] = {}  # masks of a checkpoint, a bit per weight, until the memory layout is known
        self._packed: dict[str, Any] = {}  # masks in checkpoint format, cached by the first save
        self._models: list[nn.Module] = []
        self._holders: list[dict[str, tuple[nn.Module, str]]] = []
        self._weights: dict[str, nn.Parameter] = {}
        self._adapted: Collection[str] = ()
        self._optimizers: Sequence[Optimizer] = ()
        self._hooks: list[RemovableHandle] = []

    @property
    def masks(self) -> TensorDict:
        """Masks by linear layer, or by stack of experts, bool, as the weights are laid out."""
        return self._masks or {name: _unpacked(saved, torch.device("cpu")) for name, saved in self._saved.items()}

    def attach(
        self, model: nn.Module, optimizers: Sequence[Optimizer], copies: Sequence[nn.Module] = (), adapted: Collection[str] = ()
    ) -> None:
        """Enforces the masks after each step of these optimizers, in the model and its averages.

        Args:
            model: The model in training.
            optimizers: Its optimizers.
            copies: Averaged copies of the model.
            adapted: Linear layers whose LoRA adapters are masked, too.
        """
        self._let_go()
        self._models, self._adapted, self._optimizers = [model, *copies], adapted, optimizers
        for masked in self._models if adapted else ():
            unmask_adapters(masked, adapted)
        # saved masks are unpacked one after the other, each sharded like its weight
        holders, restored = _holders(model) if self._saved else {}, {}
        for name, saved in self._saved.items():
            weight = _weight(holders[name]) if name in holders else None
            mask = _unpacked(saved, torch.device("cpu") if weight is None else weight.device)
            restored[name] = mask if weight is None or weight.shape != mask.shape else sharded_as(mask, weight)
        self.hold(self._masks or restored)
        self._saved = {}
        self._hooks = [optimizer.register_step_post_hook(self._step) for optimizer in optimizers]

    def hold(self, masks: Mapping[str, Tensor], change: Callable[[], None] | None = None) -> None:
        """Replaces the masks and applies them; if `change` fails, the old masks stay.

        Args:
            masks: Masks by parameter name, bool, `[*shape]` of the parameter.
            change: Changes the weights that the masks are for.

        Raises:
            ValueError: If a mask does not fit the model.
        """
        holders = list(map(_holders, self._models))
        first = holders[0]
        for name, mask in masks.items():
            if name not in first or _weight(first[name]).shape != mask.shape:
                raise ValueError(f"the masks belong to another model: this model has no {name} of shape {list(mask.shape)}.")
        before = self._holders, self._masks
        self._holders, self._packed = holders, {}
        self._masks = {name: sharded_as(mask, _weight(first[name])).contiguous() for name, mask in masks.items()}
        try:
            if change is not None:
                change()
        except BaseException:
            self._holders, self._masks = before
            raise
        self._weights = {name: _weight(first[name]) for name in self._masks}  # `change` may have replaced them
        self.apply()
        adapted = {name: self._masks[name] for name in self._adapted if name in self._masks}
        for model in self._models if adapted else ():
            mask_adapters(model, adapted)

    def follow(self) -> None:
        """Follows new shapes; in new weights, zeros are kept at zero."""
        if not self._masks or not self._models:
            return
        mask_of, masks = {id(weight): self._masks[name] for name, weight in self._weights.items()}, {}
        masked = {self._holders[0][name] for name in self._masks}
        for name, holder in _holders(self._models[0]).items():
            weight = _weight(holder)
            if id(weight) in mask_of:  # the same parameter, perhaps with a new name
                masks[name] = mask_of[id(weight)]
            elif holder in masked or name in self._masks:  # FSDP2 creates new parameters, and blocks may be renumbered
                masks[name] = weight.detach() != 0
        self.hold(masks)

    def apply(self) -> None:
        """Zeroes masked weights, in the model and its averages."""
        for model, holders in zip(self._models, self._holders, strict=False) if self._masks else ():
            reshard(model)
            weights = [_weight(holders[name]).data for name in self._masks]
            _mask(weights, [mask.to(weight.device) for mask, weight in zip(self._masks.values(), weights, strict=True)])
        for optimizer in self._optimizers:
            pairs = [(_weight(self._holders[0][name]), mask) for name, mask in self._masks.items()]
            _mask(*_averaged_by(optimizer, pairs))

    def detach(self) -> None:
        """Applies the masks a last time and releases model and optimizers; the masks stay."""
        self.apply()
        self._let_go()

    def clear(self) -> None:
        """Drops the masks."""
        self._masks, self._saved, self._packed = {}, {}, {}

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._models, self._holders, self._weights, self._optimizers = [], [], [], {}, ()

    def _step(self, optimizer: Optimizer, *_: object) -> None:
        for model, holders in zip(self._models[:1], self._holders, strict=False):
            reshard(model)
            pairs = []
            for name, mask in self._masks.items():
                weight = _weight(holders[name])
                if weight.shape != mask.shape:
                    raise ValueError(f"{name} has changed its shape since the masks were made. Call follow() after each change.")
                if weight.requires_grad or weight.grad is not None:
                    pairs.append((weight, mask))
            weights, masks = _averaged_by(optimizer, pairs)
            if pairs:
                _mask([*(weight.data for weight, _ in pairs), *weights], [*(mask for _, mask in pairs), *masks])

    def state_dict(self) -> dict[str, Any]:
        """Returns the masks, a bit per weight; packed again only if they have changed."""
        if not self._packed:
            # assigned only when complete, so that a save after an error still contains all masks
            self._packed = {
                name: {"shape": list(mask.shape), "bits": torch.from_numpy(pack_mask(full_tensor(mask)))}
                for name, mask in self._masks.items()
            }
        return dict(self._saved or self._packed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores saved masks."""
        self._masks, self._saved, self._packed = {}, state, {}


def hold_masks(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], masks: Mapping[str, Tensor | Mapping[str, Any]]
) -> EnforcedMasks:
    """Keeps pruned weights at zero after each optimizer step, in a loop of your own.

    Under momentum and weight decay, too. Call `follow()` on the result after shapes have changed, and `detach()` when training
    ends. To resume, save its `state_dict()`, a bit per weight, and pass that as `masks`.

    Args:
        model: The model. Under DDP, the model inside (`module`).
        optimizer: Its optimizer, or accelerate's wrapper of it; a list if several optimizers train the masked weights.
        masks: Keep-masks (bool) by linear layer, such as `plan.masks(model)` of `prune`, or a saved `state_dict()`.

    Raises:
        ValueError: If a mask is not bool or does not fit a layer of the model, or no optimizer holds a masked weight that is
            trained.

    Example:
        >>> import torch, billhook as bh
        >>> model = bh.load("tiny", dtype="float32")
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> plan = bh.prune(model, bh.Magnitude(), sparsity=0.5)
        >>> held = bh.hold_masks(model, optimizer, plan.masks(model))
        >>> loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
        >>> loss.backward(); optimizer.step()
        >>> round(float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()), 2)
        0.5
    """
    check_types(hold_masks, locals())
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper renames layers
    wrapped = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    optimizers = [getattr(inner, "optimizer", inner) for inner in wrapped]
    trained = {id(parameter) for inner in optimizers for group in inner.param_groups for parameter in group["params"]}
    holders = _holders(model)
    for name, mask in masks.items():
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            raise ValueError(f"masks: the mask of {name} has dtype {mask.dtype}. Masks are bool, True where a weight is kept.")
        weight = _weight(holders[name]) if name in holders else None
        if weight is not None and weight.requires_grad and id(weight) not in trained:
            raise ValueError(
                f"optimizer: {' and '.join(type(inner).__name__ for inner in optimizers)} does not hold the weight of {name}, so "
                "its zeros would be lost. Pass the optimizer that trains it, or a list of all optimizers."
            )
    enforced = EnforcedMasks()
    enforced.load_state_dict({name: mask for name, mask in masks.items() if not isinstance(mask, Tensor)})
    enforced.attach(model, optimizers)
    if tensors := {name: mask for name, mask in masks.items() if isinstance(mask, Tensor)}:
        enforced.hold(tensors)
    return enforced


def _holders(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Returns where the weights are that can be masked; with FSDP2, the sharded ones."""
    reshard(model)  # its forward pass may leave gathered copies
    return weight_holders(model)


def _weight(holder: tuple[nn.Module, str]) -> nn.Parameter:
    module, attribute = holder
    return module.get_parameter(attribute)


def _unpacked(saved: Mapping[str, Any], device: torch.device) -> Tensor:
    """Unpacks a saved mask on a device."""
    return unpack_mask(saved["bits"].cpu().numpy(), math.prod(saved["shape"]), device).view(saved["shape"])


def _averaged_by(optimizer: Optimizer, pairs: Iterable[tuple[nn.Parameter, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the copies of weights that a schedule-free optimizer keeps, and their masks.

    Its `eval()` and `train()` mix them into the weights.
    Defazio et al., The Road Less Scheduled (2024), https://arxiv.org/abs/2405.15682: x = (1 - 1/b) z + y/b, with y the weight.
    """
    copies, masks = [], []
    for weight, mask in pairs if callable(getattr(optimizer, "eval", None)) else ():
        copy = optimizer.state.get(weight, {}).get("z")
        if isinstance(copy, Tensor):
            copies.append(copy)
            masks.append(mask)
    return copies, masks


def _mask(weights: list[Tensor], masks: list[Tensor]) -> None:
    """Multiplies weights by masks in place, as bytes 0 and 1 (three times faster than bool)."""
    if weights:
        torch._foreach_mul_([local(weight) for weight in weights], [local(mask).view(torch.uint8) for mask in masks])
