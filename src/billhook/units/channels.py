"""The channels of feed-forward blocks, the channels of the residual stream, and the experts of a model, as units."""

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import numpy as np
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from billhook.model.find import find_transformer
from billhook.tracing.axes import find
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Group, Member
from billhook.tracing.trace import trace
from billhook.units.heads import find_heads
from billhook.units.units import UnitKind, Units


def find_units(
    model: nn.Module, kinds: Iterable[UnitKind] = get_args(UnitKind), structure: Structure | None = None
) -> dict[str, Units]:
    """The units of a model of some kinds, by the names of their places: attentions in the order in which they run, and so on.

    A place is called as the innermost module that holds it; the second of one name gets its kind added.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        kinds: `"head"`, `"channel"` (of feed-forward blocks within the model's stacks of blocks), `"residual"` and `"expert"`.
        structure: What `trace` has found of it; by default it is traced.

    Raises:
        ValueError: If a kind is not legal, or attentions cannot be told apart. A model may have none of a kind.
    """
    wanted = list(dict.fromkeys(kinds))
    if wrong := [kind for kind in wanted if kind not in get_args(UnitKind)]:
        raise ValueError(f"kinds={wrong[0]!r} must be one of {', '.join(get_args(UnitKind))}")
    subject = find_transformer(model)
    structure = structure or trace(subject)
    found: dict[str, Units] = {}
    for kind in wanted:
        if kind == "head":
            found |= find_heads(subject, structure) if structure.attention else {}
            continue
        for one in _of_groups(subject, structure, kind):
            name = one.name if one.name not in found else f"{one.name} {kind}s"
            found[name if name not in found else f"{name} {len(found)}"] = one
    return found


def of_kind(units: Mapping[str, Units], *kinds: UnitKind) -> dict[str, Units]:
    """Those of some kinds."""
    return {name: one for name, one in units.items() if one.kind in kinds}


def _of_groups(model: nn.Module, structure: Structure, kind: UnitKind) -> list[Units]:
    fed = {one.channel for one in structure.feed_forward}
    groups = [group for group in structure.groups if group.kind == kind and (kind != "channel" or group.leaf in fed)]
    if kind == "channel":
        groups = [group for group in groups if _in_block(model, group.where) and not _convolved(model, group)]
    return [_units(model, structure, group, kind) for group in groups]


def _units(model: nn.Module, structure: Structure, group: Group, kind: UnitKind) -> Units:
    members = tuple({(m.name, m.dim): m for m in group.members if not m.buffer}.values())
    reading = [(name, member) for member in members if member.reads for name in _linears(model, structure, member)]
    indices = [group.index(member) for _, member in reading]
    alike = [name for (name, _), index in zip(reading, indices, strict=True) if np.array_equal(index, indices[0])]
    once = {
        id(model.get_submodule(name)): name for name in reversed(alike)
    }  # a module that stands in several places has one gate
    told = len(alike) == len(reading) and kind != "expert"
    readers = tuple(name for name in dict.fromkeys(alike) if name in once.values()) if told else ()
    index = indices[0] if readers else np.zeros(0, dtype=np.int64)
    return Units(kind, group.where, readers, index, np.arange(group.size), (group.leaf,), (group.leaf,), members)


def _linears(model: nn.Module, structure: Structure, member: Member) -> list[str]:
    """The linear layers that get what a parameter reads; an adapter's stands for the layer that it is added to."""
    found = []
    for parameter in [member.name, *(alias for alias, name in structure.tied.items() if name == member.name)]:
        path = parameter.split(".")[:-1]
        outer = next((end for end in range(len(path)) if isinstance(_at(model, path[:end]), BaseTunerLayer)), len(path))
        module = _at(model, path[:outer])
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, nn.Linear | Conv1D):
            found.append(".".join(path[:outer]))
    return found


def _at(model: nn.Module, path: Sequence[str]) -> nn.Module:
    return model.get_submodule(".".join(path))


def _in_block(model: nn.Module, name: str) -> bool:
    """Whether a module is within one that stands in a list."""
    path = name.split(".")
    return any(isinstance(_at(model, path[:end]), nn.ModuleList) for end in range(len(path)))


def _convolved(model: nn.Module, group: Group) -> bool:
    modules = [_at(model, member.name.split(".")[:-1]) for member in group.members]
    return any(isinstance(module, nn.modules.conv._ConvNd) for module in modules) or find(group.leaf).size < 2
