"""Merges adapters into their weights, keeping all zeros of sparse weights."""

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.adapters.masked import Layers, find_adapters, find_masks, require_adapters
from billhook.arguments import check_types
from billhook.display import Printable
from billhook.engine import fresh_autocast_cache, store_of
from billhook.model import base_of, is_adapter, is_pruned, is_trained_copy, snapshot, stacks_of, to_meta

MERGE_HINT = "convert the model first and attach adapters then (get_peft_model), or merge the adapters first (bh.training.merge)"


def adapter_layers(model: nn.Module) -> Layers:
    """Returns the layers with PEFT adapters, by name."""
    return {name: module for name, module in model.named_modules() if is_adapter(module)}


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Copies the base model to the meta device."""
    meta_model = to_meta(model)
    for name, layer in adapter_layers(meta_model).items():
        meta_model.set_submodule(name, layer.get_base_layer())
    return meta_model


@contextmanager
def adapters_removed(model: nn.Module) -> Iterator[None]:
    """Replaces adapted layers and trained copies with the base model's layers."""
    layers = list(_outermost_layers(model))
    try:
        for owner, name, layer in layers:
            setattr(owner, name, layer.original_module if is_trained_copy(layer) else layer.get_base_layer())
        yield
    finally:
        for owner, name, layer in layers:
            setattr(owner, name, layer)


def is_initial_lora(layer: Any) -> bool:  # noqa: ANN401 - any of PEFT's layers
    """Returns whether a layer has LoRA in its initial state, with B = 0."""
    second = getattr(layer, "lora_B", None)
    plain = not len(getattr(layer, "lora_magnitude_vector", ())) and not layer.merged
    return plain and isinstance(second, nn.Module) and not any(bool(b.any()) for b in second.parameters())


def base_layer_name(name: str, layers: Collection[str]) -> str:
    """Returns the name of a tensor or attribute in a model with adapters on some layers."""
    owner, _, attribute = name.rpartition(".")
    return f"{owner}.base_layer.{attribute}" if owner in layers else name


@dataclass(frozen=True, repr=False)
class Merged(Printable):
    """Report of `merge`; `print` shows a line.

    Attributes:
        model: The model without adapters: the model that was passed, or the one inside a `PeftModel`.
        error: Lost part of the adapters' product, by layer: the Frobenius norm on zeros relative to the whole. 0 if the adapters
            were masked.
        pruned: Sparse layers, whose zeros were kept. All other layers were merged in full.
    """

    no_model: ClassVar[str] = (
        "bh.training.merge works in place and returns a report. Use the model that you passed, or `.model` of the report."
    )

    model: nn.Module
    error: dict[str, float]
    pruned: tuple[str, ...]

    @property
    def lost(self) -> bool:
        """True if any part of an adapter was lost."""
        return any(self.error.values())

    def _renderables(self) -> list[str]:
        if not self.error:
            return ["no adapters on linear layers were left to merge; updates of other adapters are in the weights"]
        line = f"merged adapters of {len(self.error)} layer{'s' * (len(self.error) > 1)} in place"
        if not self.pruned:
            return [f"{line}, all in full, because none is sparse"]
        line += f", zeros kept{f' in {len(self.pruned)}' * (len(self.pruned) < len(self.error))}"
        if not self.lost:
            return [f"{line}; no update was lost"]
        shares = {name: self.error[name] for name in self.pruned}
        worst = max(shares, key=shares.__getitem__)
        mean = sum(shares.values()) / len(shares)
        return [f"{line}; {mean:.1%} of the updates of sparse layers was lost on average, at most {shares[worst]:.1%} ({worst})"]


@fresh_autocast_cache()
@torch.no_grad()
def merge(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Merged:
    """Merges adapters in place, W' = (W + scale B A) * mask, and returns a report.

    The model no longer has adapters afterwards. Updates of zero weights are lost, unless the adapters were trained under
    `mask_adapters`.

    Args:
        model: A model with PEFT adapters. Its base weights are changed and its adapters removed in place.
        masks: Masks by linear layer: bool, in the memory layout of the weight. Layers without a mask are merged in full. Defaults
            to the nonzero weights of all layers with at least 1% zeros.

    Raises:
        ValueError: If there are no adapters, they are merged already or cannot be merged, or a mask has another type or shape or
            matches no layer.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> weight = nn.init.eye_(model[0].weight)
        >>> print(merge(get_peft_model(model, LoraConfig(target_modules=["0"]))))
        merged adapters of 1 layer in place, zeros kept; no update was lost
    """
    check_types(merge, locals())
    on_parameters = any(stacks_of(base_of(layer)) for layer in adapter_layers(model).values())
    layers = find_adapters(model) if on_parameters else require_adapters(model)
    if merged := next((name for name, layer in layers.items() if layer.merged), None):
        raise ValueError(
            f"model: the adapters of {merged} are merged already, so its zero weights are unknown. Unmerge them first."
        )
    _check_mergeable(model)
    kept = find_masks(layers, masks)
    error = {name: _merge(name, layer, kept.get(name)) for name, layer in layers.items()}
    return Merged(_removed(model), error, tuple(kept))


def has_adapters(model: nn.Module) -> bool:
    """Returns True if a model contains PEFT layers."""
    return next(_outermost_layers(model), None) is not None


@contextmanager
def temporarily_merged(model: nn.Module) -> Iterator[Merged]:
    """Yields the report of a merge; the original is unchanged afterwards.

    It merges a copy or, for a streamed or sharded model, each block when it is loaded. Adapters that are merged already or not on
    linear layers are only removed.
    """
    if not store_of(model).holds_all:
        with _merged_in_turn(model) as merged:
            yield merged
        return
    copied = copy.deepcopy(model)
    if all(layer.merged for layer in find_adapters(copied).values()):
        _check_mergeable(copied)
        yield Merged(_removed(copied), {}, ())
    else:
        yield merge(copied)


@contextmanager
def _merged_in_turn(model: nn.Module) -> Iterator[Merged]:
    """Merges each block when it is loaded, and other weights until the `with` block ends."""
    store = store_of(model)
    back = snapshot(model)
    on_layers = find_adapters(model)
    names = {layer: name for name, layer in on_layers.items()}
    layers = [child for _, _, child in _outermost_layers(model) if is_adapter(child) and not child.merged]
    if layers:
        _check_mergeable(model)
    error = dict[str, float]()
    pruned = set[str]()
    kept = []  # weights outside of blocks, to restore them
    for layer in layers:
        if base_of(layer) not in store.owner:
            kept += [(parameter, parameter.detach().clone()) for parameter in base_of(layer).parameters()]

    @torch.no_grad()
    def merged(block: nn.Module | None) -> list[nn.Parameter]:
        """Merges the layers of a block, or of no block (None), and returns their weights."""
        parameters = list[nn.Parameter]()
        for layer in layers:
            if store.owner.get(base_of(layer)) is not block:
                continue
            for wrapper in _wrappers(layer):
                wrapper.merged_adapters.clear()  # set when the block was loaded before
            if (name := names.get(layer)) is None:
                _into(type(layer).__name__, layer)
            else:
                masks = find_masks({name: layer}, None)
                error[name] = _merge(name, layer, masks.get(name))
                pruned.update(masks)
            parameters += base_of(layer).parameters()
        return parameters

    try:
        with fresh_autocast_cache(), store.altered(merged):
            merged(None)
            for block in store.blocks.values():
                store.load(block)
            subject = _removed(model, merges=False)
            ordered_error = {name: error[name] for name in on_layers if name in error}
            yield Merged(subject, ordered_error, tuple(filter(pruned.__contains__, on_layers)))
    finally:
        back()
        for wrapper in chain.from_iterable(map(_wrappers, layers)):
            wrapper.merged_adapters.clear()
        for parameter, values in kept:
            parameter.data.copy_(values)


def _check_mergeable(model: nn.Module) -> None:
    """Raises for adapters whose merge would affect other modules or be incomplete."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for name, module in model.named_modules():
        if not is_adapter(module) or module.merged:
            continue
        base: Any = base_of(module)
        nested = getattr(module, "base_layer", base) is not base and not stacks_of(base)
        if "forward" in vars(module) or nested:
            why = "a replaced forward" if "forward" in vars(module) else "a nested adapter"
            raise ValueError(f"model: the adapter of {name} has {why} and cannot be merged separately")
        if any(owners[id(parameter)] > 1 for parameter in base.parameters(recurse=False)):
            raise ValueError(f"model: {name} shares its weight with another module, which merging would change, too")


def _merge(name: str, layer: Any, keep: Tensor | None) -> float:  # noqa: ANN401 - PEFT does not type its layers
    """Merges a layer and returns the fraction of its product that falls on zeros."""
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    _into(name, layer)
    if keep is None:
        return 0.0
    added = (weight - before).float()
    total = float(added.norm())
    lost = float(added.masked_fill(keep.to(added.device), 0).norm())
    weight.masked_fill_(~keep.to(weight.device), 0)
    return lost / total if total else 0.0


def _into(name: str, layer: Any) -> None:  # noqa: ANN401
    """Merges the active adapters of a layer, unless they are merged or disabled.

    Zeros of sparse experts are kept.
    """
    if layer.merged or layer.disable_adapters:
        return
    stacks = [base_of(layer).get_parameter(stack).data for stack in stacks_of(base_of(layer))]
    zeros = [(stack, stack == 0) for stack in stacks if is_pruned(int((stack == 0).sum()), stack.numel())]
    try:
        for wrapper in _wrappers(layer):
            wrapper.merge()
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"model: the adapters of {name} cannot be merged: {error}") from error
    for stack, removed in zeros:
        stack.masked_fill_(removed, 0)


def _wrappers(layer: Any) -> Iterator[Any]:  # noqa: ANN401
    """Yields nested layers with adapters, one for each parameter of experts."""
    while is_adapter(layer):
        yield layer
        layer = getattr(layer, "base_layer", None)


def _removed(model: nn.Module, merges: bool = True) -> nn.Module:
    """Removes PEFT's layers and wrapper, merging unmerged ones in full if `merges`."""
    wrapped: Any = model
    inner: Any = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    for parent, name, child in list(_outermost_layers(inner)):
        if not is_trained_copy(child):
            if merges:
                _into(name, child)
            base = child.get_base_layer()
        elif child.disable_adapters:
            base = child.original_module
        else:
            base = child.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        setattr(parent, name, base)
    for module in inner.modules():
        if getattr(module, "_hf_peft_config_loaded", False):
            module._hf_peft_config_loaded = False
        vars(module).pop("peft_config", None)
    if getattr(getattr(inner, "config", None), "tie_word_embeddings", False):  # PEFT may have trained a copy of an embedding
        inputs, outputs = (getattr(get(), "weight", None) for get in (inner.get_input_embeddings, inner.get_output_embeddings))
        if inputs is not None and outputs is not None and inputs is not outputs:
            inner.config.tie_word_embeddings = False
    return inner  # type: ignore[no-any-return]


def _outermost_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yields the parent, name, and module of PEFT's outermost layers."""
    for name, child in model.named_children():
        if is_adapter(child) or is_trained_copy(child):
            yield model, name, child
        else:
            yield from _outermost_layers(child)
