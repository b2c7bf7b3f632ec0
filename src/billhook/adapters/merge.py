"""Merges adapters into the weights that they are on, so that every zero of a pruned weight stays."""

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.adapters.masked import find_adapters, find_masks, require_adapters
from billhook.arguments import check_types
from billhook.display import Printable
from billhook.engine.state import fresh_autocast_cache
from billhook.engine.store import store_of
from billhook.model.layers import base_of, is_adapter, is_trained_copy
from billhook.model.meta import to_meta
from billhook.model.surgery import snapshot

MERGE_HINT = "convert the model first and attach adapters then (get_peft_model), or merge the adapters first (bh.training.merge)"


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Finds the layers of a model that PEFT has put adapters on, by name."""
    return {name: module for name, module in model.named_modules() if is_adapter(module)}


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Copies the model beneath its adapters, to the meta device."""
    meta_model = to_meta(model)
    for name, layer in adapter_layers(meta_model).items():
        meta_model.set_submodule(name, layer.get_base_layer())
    return meta_model


@contextmanager
def adapters_removed(model: nn.Module) -> Iterator[None]:
    """Puts the layers beneath adapters in their places until the end of a `with` block."""
    layers = [(model.get_submodule(name.rpartition(".")[0]), name, layer) for name, layer in adapter_layers(model).items()]
    try:
        for owner, name, layer in layers:
            setattr(owner, name.rpartition(".")[2], layer.get_base_layer())
        yield
    finally:
        for owner, name, layer in layers:
            setattr(owner, name.rpartition(".")[2], layer)


def is_initial_lora(layer: Any) -> bool:  # noqa: ANN401 - any of PEFT's layers
    """Tells whether a layer has LoRA on it that is as it began, with B = 0."""
    second = getattr(layer, "lora_B", None)
    plain = not len(getattr(layer, "lora_magnitude_vector", ())) and not layer.merged
    return plain and isinstance(second, nn.Module) and not any(bool(b.any()) for b in second.parameters())


def base_layer_name(name: str, layers: Collection[str]) -> str:
    """Renames a tensor or attribute as it is called where adapters are on some layers."""
    owner, _, attribute = name.rpartition(".")
    return f"{owner}.base_layer.{attribute}" if owner in layers else name


@dataclass(frozen=True, repr=False)
class Merged(Printable):
    """The result of `merge`, a report and no model; `print` shows it in a line.

    Attributes:
        model: The model without adapters, which is the one that was passed, or what a `PeftModel` held.
        error: The part of the adapters' product that falls on zeros and was left out: its Frobenius norm as a share of the
            whole's, by linear; 0 where the adapters were masked.
        pruned: The linears whose zeros were kept; the others were merged in full.
    """

    no_model: ClassVar[str] = (
        "bh.training.merge works in place and returns a report: use the model that you passed, or its `model`"
    )

    model: nn.Module
    error: dict[str, float]
    pruned: tuple[str, ...]

    @property
    def lost(self) -> bool:
        """True if anything was left out."""
        return any(self.error.values())

    def _renderables(self) -> list[str]:
        return [self._line()]

    def _line(self) -> str:
        if not self.error:
            return "no adapter on a linear was left to merge; what the others add is in the weights"
        what = f"merged adapters of {len(self.error)} linear{'s' * (len(self.error) > 1)} in place"
        if not self.pruned:
            return f"{what}, all in full, as none is pruned"
        what += f", zeros kept{f' in {len(self.pruned)}' * (len(self.pruned) < len(self.error))}"
        if not self.lost:
            return f"{what}; nothing of what the adapters add was left out"
        shares = {name: self.error[name] for name in self.pruned}
        worst = max(shares, key=shares.__getitem__)
        mean = sum(shares.values()) / len(shares)
        what += f"; of what the adapters add there, {mean:.1%} was left out on average"
        return f"{what}, {shares[worst]:.1%} at most ({worst})"


@fresh_autocast_cache()
@torch.no_grad()
def merge(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Merged:
    """Merges adapters in place into weights whose zeros stay zero, W' = (W + scale B A) * mask, and returns a report.

    The model that is passed is merged, and no longer has adapters: go on with it, or with the report's `model`.
    The effect of the adapters at the zeros is lost, unless they were trained under `mask_adapters`.

    Args:
        model: A model with PEFT's adapters attached; its base weights are changed, and adapters taken off, in place.
        masks: Keep-masks by linear, bool, as the weights lie in memory; linears without one are merged in full. By default all
            weights that are not zero now, in linears of which 1 % or more is zero: fewer are zero by chance.

    Raises:
        ValueError: If no adapters are attached, they are merged already or cannot be, or a mask is not bool or of another shape,
            or none fits.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> weight = nn.init.eye_(model[0].weight)
        >>> print(merge(get_peft_model(model, LoraConfig(target_modules=["0"]))))
        merged adapters of 1 linear in place, zeros kept; nothing of what the adapters add was left out
    """
    check_types(merge, locals())
    layers = require_adapters(model)
    if merged := next((name for name, layer in layers.items() if layer.merged), None):
        raise ValueError(f"model: the adapters of {merged} are merged already, and which weights were zero is not known any more")
    _check_alone(model)
    kept = find_masks(layers, masks)
    error = {name: _merge(name, layer, kept.get(name)) for name, layer in layers.items()}
    return Merged(_removed(model), error, tuple(kept))


def has_adapters(model: nn.Module) -> bool:
    """Returns True if anything of PEFT's is in a model."""
    return next(_places(model), None) is not None


@contextmanager
def temporarily_merged(model: nn.Module) -> Iterator[Merged]:
    """Gives what merging makes of a model, within; the model is as it was afterwards.

    It is a copy that is merged, or where blocks come and go, the model itself: weights in blocks are merged whenever these come.
    Adapters on no linear, or merged already, are only taken off.
    """
    if not store_of(model).holds_all:
        with _merged_in_turn(model) as merged:
            yield merged
        return
    copied = copy.deepcopy(model)
    if all(layer.merged for layer in find_adapters(copied).values()):
        _check_alone(copied)
        yield Merged(_removed(copied), {}, ())
    else:
        yield merge(copied)


@contextmanager
def _merged_in_turn(model: nn.Module) -> Iterator[Merged]:
    """Merges weights in blocks whenever these come, and others until the end of a `with` block."""
    store, back, linears = store_of(model), snapshot(model), find_adapters(model)
    named = {id(layer): name for name, layer in linears.items()}
    layers = {id(child): child for _, _, child in _places(model) if is_adapter(child) and not child.merged}
    if layers:
        _check_alone(model)
    error, pruned = dict[str, float](), set[str]()
    outside = [base for layer in layers.values() if (base := base_of(layer)) not in store.owner]
    kept = [(parameter, parameter.detach().clone()) for base in outside for parameter in base.parameters()]

    @torch.no_grad()
    def merged(block: nn.Module | None) -> list[nn.Parameter]:
        """Merges the layers on linears of a block, or of none, and returns their weights."""
        parameters = list[nn.Parameter]()
        for key, layer in layers.items():
            if store.owner.get(base_of(layer)) is not block:
                continue
            layer.merged_adapters.clear()  # of the last time that it came
            if (name := named.get(key)) is None:
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
            yield Merged(subject, {n: error[n] for n in linears if n in error}, tuple(n for n in linears if n in pruned))
    finally:
        back()
        for layer in layers.values():
            layer.merged_adapters.clear()
        for parameter, values in kept:
            parameter.data.copy_(values)


def _check_alone(model: nn.Module) -> None:
    """Refuses adapters that merging would apply in two places, or that compute more than it can know of."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for name, module in model.named_modules():
        if not is_adapter(module) or module.merged:
            continue
        base: Any = base_of(module)
        if "forward" in vars(module) or getattr(module, "base_layer", base) is not base:
            why = "another forward in its place" if "forward" in vars(module) else "another adapter inside"
            raise ValueError(f"model: the adapter of {name} has {why}, so it cannot be merged alone")
        if any(owners[id(parameter)] > 1 for parameter in base.parameters(recurse=False)):
            raise ValueError(f"model: {name} has its weight in common with another module, which merging would change too")


def _merge(name: str, layer: Any, keep: Tensor | None) -> float:  # noqa: ANN401 - PEFT does not type its layers
    """Merges a layer; returns the share of its product that falls on zeros."""
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    _into(name, layer)
    if keep is None:
        return 0.0
    added = (weight - before).float()
    total, lost = float(added.norm()), float(added.masked_fill(keep.to(added.device), 0).norm())
    weight.masked_fill_(~keep.to(weight.device), 0)
    return lost / total if total else 0.0


def _into(name: str, layer: Any) -> None:  # noqa: ANN401
    """Merges the active adapters, if they are not merged yet."""
    if layer.merged or layer.disable_adapters:
        return
    try:
        layer.merge()
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"model: the adapters of {name} cannot be merged: {error}") from error


def _removed(model: nn.Module, merges: bool = True) -> nn.Module:
    """Removes PEFT's layers and wrapper from a model, and `merges` in full those that are not merged yet."""
    wrapped: Any = model
    inner: Any = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    for parent, name, child in list(_places(inner)):
        setattr(parent, name, _taken_off(name, child) if merges or is_trained_copy(child) else child.get_base_layer())
    for module in inner.modules():
        if getattr(module, "_hf_peft_config_loaded", False):
            module._hf_peft_config_loaded = False
        vars(module).pop("peft_config", None)
    _untie(inner)
    return inner  # type: ignore[no-any-return]


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yields the places of PEFT's outermost layers."""
    for name, child in model.named_children():
        if is_adapter(child) or is_trained_copy(child):
            yield model, name, child
        else:
            yield from _places(child)


def _taken_off(name: str, child: Any) -> nn.Module:  # noqa: ANN401
    """Returns the module beneath a layer of PEFT's, changed as the layer changes it."""
    if not is_trained_copy(child):
        _into(name, child)
        return child.get_base_layer()  # type: ignore[no-any-return]
    if child.disable_adapters:
        return child.original_module  # type: ignore[no-any-return]
    return child.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)


def _untie(model: Any) -> None:  # noqa: ANN401
    """Reports in the config that the embeddings are two, where PEFT has trained a copy of one."""
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        inputs, outputs = (getattr(get(), "weight", None) for get in (model.get_input_embeddings, model.get_output_embeddings))
        if inputs is not None and outputs is not None and inputs is not outputs:
            model.config.tie_word_embeddings = False
