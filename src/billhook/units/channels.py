"""Finds the channels of feed-forwards, the channels of the residual stream, and the experts of a traced model."""

from collections.abc import Sequence

import numpy as np
from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook.model.adapter_layers import is_adapter
from billhook.model.convolutions import is_convolution
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Group, Member
from billhook.units.units import UnitKind, Units


def find_channels(model: nn.Module, structure: Structure, kind: UnitKind) -> list[Units]:
    """Finds the feed-forward channels (in blocks), residual channels or experts of a traced model."""
    groups = [group for group in structure.groups if group.kind == kind]
    if kind == "channel":
        groups = [group for group in groups if not why_not(model, structure, group)]
    return [_units(model, structure, group, kind) for group in groups]


def why_none(model: nn.Module, structure: Structure, kind: UnitKind) -> str:
    """Says why no channels of a model are those of a feed-forward; empty if there are none at all, or of another kind."""
    groups = [group for group in structure.groups if kind == group.kind == "channel"]
    first = {why_not(model, structure, group): group.where or "the model" for group in reversed(groups)}
    return "".join(f"; those of {where} {reason}" for reason, where in reversed(first.items()) if reason)


def why_not(model: nn.Module, structure: Structure, group: Group) -> str:
    """Says why channels are not those of a feed-forward; empty if they are."""
    own = next((one for one in structure.feed_forward if one.channel is group.leaf), None)
    modules = [_at(model, member.name.split(".")[:-1]) for member in group.members]
    convolutions = [module for module in modules if isinstance(module, nn.modules.conv._ConvNd)]
    if group.size < 2:
        return "are one"
    if own is None:
        return "are not made and read as those of a feed-forward"
    if not _in_block(model, group.where):
        return "are in no block"
    if any(module.groups not in (1, group.size) for module in convolutions):
        return "are made or read by a convolution of several groups"
    mixing = [module for module in convolutions if module.groups == 1]
    if not all(map(is_convolution, mixing)):
        return "are made or read by a convolution that is no plain nn.Conv1d or nn.Conv2d"
    if mixing and (group.reason or "normed" in group.leaf.notes):
        return f"are made or read by a convolution, and {group.reason or 'a norm spans all of them'}"
    if convolutions and (own.gate or len(own.down) > 1):
        return "go through a convolution and a gate, or are read twice, as those of a recurrence"
    return ""


def _units(model: nn.Module, structure: Structure, group: Group, kind: UnitKind) -> Units:
    members = tuple({(m.name, m.dim): m for m in group.members if not m.buffer}.values())
    reading = [
        (name, member) for member in members if member.reads for name in _linears(model, structure, member, kind == "channel")
    ]
    indices = [group.index(member) for _, member in reading]
    alike = [name for (name, _), index in zip(reading, indices, strict=True) if np.array_equal(index, indices[0])]
    once = {id(model.get_submodule(name)): name for name in reversed(alike)}  # one gate for a module in several places
    separate = len(alike) == len(reading) and kind != "expert"
    readers = tuple(name for name in dict.fromkeys(alike) if name in once.values()) if separate else ()
    index = indices[0] if readers else np.zeros(0, dtype=np.int64)
    return Units(kind, group.where, readers, index, np.arange(group.size), (group.leaf,), (group.leaf,), members)


def _linears(model: nn.Module, structure: Structure, member: Member, convolutions: bool) -> list[str]:
    """Returns the linears that get what a parameter reads; an adapter's stands for the layer that it is added to.

    Convolutions that mix all channels are such, too, where they are asked for.
    """
    found = []
    for parameter in [member.name, *(alias for alias, name in structure.tied.items() if name == member.name)]:
        path = parameter.split(".")[:-1]
        outer = next((end for end in range(len(path)) if is_adapter(_at(model, path[:end]))), len(path))
        module = _at(model, path[:outer])
        layer = module.get_base_layer() if is_adapter(module) else module
        if isinstance(layer, nn.Linear | Conv1D) or (convolutions and is_convolution(layer) and layer.groups == 1):
            found.append(".".join(path[:outer]))
    return found


def _at(model: nn.Module, path: Sequence[str]) -> nn.Module:
    return model.get_submodule(".".join(path))


def _in_block(model: nn.Module, name: str) -> bool:
    """Tells whether a module is within one that stands in a list."""
    path = name.split(".")
    return any(isinstance(_at(model, path[:end]), nn.ModuleList) for end in range(len(path)))
