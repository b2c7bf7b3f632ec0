"""Finds a model's attributes and config without some units: as its class builds them, or by trial on meta tensors."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.adapters.merge import adapter_layers, base_layer_name, without_adapters
from billhook.model.config_fields import Fields, configs_of, field, read_back, set_fields, with_fields
from billhook.model.layers import is_adapter
from billhook.model.meta import to_meta
from billhook.model.shape import GROUPS, Shape, built_shape, set_shape, shape_of
from billhook.model.transformers_internals import set_attention
from billhook.pruning.cut import Cut, size_after
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Kind
from billhook.tracing.trace import trace
from billhook.units.fields import FieldFinder
from billhook.units.find import units_of
from billhook.units.units import UnitKind, Units, counts

TRIALS = 64
"""The most assignments of whole-number attributes that are tried; none of 551 architectures needs more than 29 (roundtrip.py)."""

Sizes = dict[str, tuple[int, ...]]
"""Sizes of tensors, by name."""


def candidate_shapes(model: PreTrainedModel, cut: Cut) -> Iterator[tuple[Shape, Fields]]:
    """Yields shapes that the model may have then, the likeliest first: as its class builds it, or with attributes by trial."""
    now, usual, tensors = shape_of(model), _build_shape(model, {}), _sizes_then(model, cut)
    yield from _built(model, cut, usual, now, tensors)
    eager = all(usual.attributes.get(name) == value for name, value in now.attributes.items() if name.endswith(f".{GROUPS}"))
    eager = eager and _runs_eagerly(to_meta(model))
    num_heads = _head_fields(model, cut)
    for fields in ({}, num_heads) if num_heads else ({},):  # some code asks the config in the middle of a forward
        for attributes in itertools.islice(_assignments(model, cut, now, tensors), TRIALS):
            shape = Shape(tensors, now.attributes | attributes, now.config)
            if _runs(model, cut, shape, fields, eager):
                yield shape, fields


def _built(model: PreTrainedModel, cut: Cut, usual: Shape, now: Shape, tensors: Sizes) -> Iterator[tuple[Shape, Fields]]:
    """Yields the shape that the model's class builds, beneath adapters, from a changed config, if it has these tensors."""
    base, structure, units, layers, built_now = model, cut.structure, cut.all_units, adapter_layers(model), now.tensors
    plain = tensors
    if layers:
        base = without_adapters(model)
        structure, built_now = trace(base), shape_of(base).tensors
        units = units_of(base, structure, _kinds(cut))
        plain = {name.replace(".base_layer.", "."): size for name, size in tensors.items() if ".lora_" not in name}
    fields = _fields(base, cut, structure, units) if usual.tensors == built_now else {}
    if not fields:
        return
    try:
        built = _build_shape(base, fields)
    except Exception:  # whatever a class of configs or models raises
        return
    if built.tensors == plain:
        changed = {name: value for name, value in built.attributes.items() if usual.attributes.get(name, value) != value}
        attributes = {base_layer_name(name, layers): value for name, value in changed.items()}
        certain = _certain(model, tensors) if layers else {}
        yield Shape(tensors, now.attributes | attributes | certain, now.config), fields


def _build_shape(model: PreTrainedModel, fields: Fields) -> Shape:
    """Builds the model's class from its config with some fields changed, and returns its shape."""
    config = with_fields(model.config, fields)
    read_back(config)  # which refuses what its class does not allow
    return built_shape(type(model), config)


def _sizes_then(model: PreTrainedModel, cut: Cut) -> Sizes:
    """Returns the sizes of all tensors after the cut, also of those that are the same under another name."""
    first = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    state = model.state_dict(keep_vars=True)
    return {name: size_after(cut.cuts, first.get(id(tensor), name), tensor.shape) for name, tensor in state.items()}


def _kinds(cut: Cut) -> list[UnitKind]:
    return list(dict.fromkeys(cut.kinds.values()))


def _fields(model: PreTrainedModel, cut: Cut, structure: Structure, units: Mapping[str, Units]) -> Fields:
    """Returns the config's fields with their new values, if they can say them: as many units of a kind everywhere."""
    finder, leaves = FieldFinder(model), {leaf for layer in units.values() for leaf in layer.leaves}
    fields: Fields = {}
    for kind in _kinds(cut):
        sizes = _group_sizes(cut, kind)
        if sizes is None:
            return {}
        for kinds, size, size_then in sizes:
            if size_then == size:
                continue
            groups = [g for g in structure.groups if g.leaf in leaves and g.kind in kinds and g.size == size]
            values = finder.values(size, finder.find(groups), size_then) if groups else {}
            if not values and kind == "head" and (with_width := _head_fields(model, cut, width=True)):
                fields |= with_width
                break
            if not values:
                return {}
            for name, value in values.items():
                changed = fields.get(name) if field(model.config, name) is not None else None
                fields[name] = value if changed is None else changed // size * size_then
    return fields


def _group_sizes(cut: Cut, kind: UnitKind) -> list[tuple[tuple[Kind, ...], int, int]] | None:
    """Returns the kinds of groups that a kind of unit is made of, each with its size before and after; None if layers differ."""
    changes = {(cut.before[name], cut.after[name]) for name in cut.kinds if cut.kinds[name] == kind}
    if all(before == after for before, after in changes):
        return []
    if len({before for before, _ in changes}) < len(changes) or (kind == "head" and len(changes) > 1):
        return None
    if kind != "head":
        assert kind != "block"
        return [((kind,), before[0], after[0]) for before, after in sorted(changes)]
    ((query, kv), (query_then, kv_then)) = changes.pop()
    return [(("kv_head", "head"), kv, kv_then), (("query_head",), query // kv, query_then // kv_then)]


def _head_fields(model: PreTrainedModel, cut: Cut, width: bool = False) -> Fields:
    """Returns the fields of the config that are numbers of heads, with their new values; none if layers differ.

    With `width`, also that of heads, which many classes read of a config that does not declare it; or none if that says nothing.
    """
    before, after = ({numbers[name] for name, kind in cut.kinds.items() if kind == "head"} for numbers in (cut.before, cut.after))
    if len(before) != 1 or len(after) != 1:
        return {}
    becomes = dict(zip(before.pop(), after.pop(), strict=True))
    config = vars(model.config)
    fields = {
        name: becomes[value] for name, value in config.items() if "head" in name and type(value) is int and value in becomes
    }
    if not width or not fields:
        return fields
    widths = {value for name, value in shape_of(model).attributes.items() if name.endswith(".head_dim")}
    return fields | {"head_dim": widths.pop()} if len(widths) == 1 and not hasattr(type(model.config), "head_dim") else {}


def _assignments(model: PreTrainedModel, cut: Cut, now: Shape, tensors: Sizes) -> Iterator[dict[str, int]]:
    """Yields values of whole-number attributes, the likeliest first: few attributes with another meaning than the likeliest."""
    certain = _certain(model, tensors)
    options = _meanings(model, cut, now, tensors, certain)
    for count in range(len(options) + 1):
        for unlikely in itertools.combinations(range(len(options)), count):
            some = (values[1:] if number in unlikely else values[:1] for number, values in enumerate(options))
            for chosen in itertools.product(*some):
                yield certain | {name: value for values in chosen for name, value in values.items()}


def _certain(model: PreTrainedModel, tensors: Sizes) -> dict[str, int]:
    """Returns the attributes that say the size of a tensor."""
    certain: dict[str, int] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        layer: Any = module.get_base_layer() if is_adapter(module) else module
        size = tensors.get(names.get(id(layer._parameters.get("weight")), ""))
        stated = _stated_sizes(layer, size) if size is not None else {}
        if layer is not module:  # PEFT's layers say them by these names, and of convolutions none
            stated = {} if "groups" in stated else dict(zip(("in_features", "out_features"), stated.values(), strict=False))
        certain |= {f"{name}.{attribute}": value for attribute, value in stated.items() if hasattr(module, attribute)}
    return certain


def _stated_sizes(layer: nn.Module, size: tuple[int, ...]) -> dict[str, int]:
    """Returns the attributes of a layer whose weight has this size: first its inputs, then its outputs."""
    if isinstance(layer, nn.Linear):
        return {"in_features": size[1], "out_features": size[0]}
    if isinstance(layer, Conv1D):
        return {"nx": size[0], "nf": size[1]}
    if isinstance(layer, nn.Embedding):
        return {"num_embeddings": size[0], "embedding_dim": size[1]}
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        groups = layer.groups
        if groups == layer.in_channels > 1:  # a depthwise one has as many groups as inputs
            groups = size[0] // (layer.out_channels // groups)
        return {"in_channels": size[1] * groups, "out_channels": size[0], "groups": groups}
    return {"num_features": size[0]} if isinstance(layer, nn.modules.batchnorm._BatchNorm) else {}


def _meanings(
    model: PreTrainedModel, cut: Cut, now: Shape, tensors: Sizes, certain: Collection[str]
) -> list[list[dict[str, int]]]:
    """Returns new values of the attributes of layers, by what they may mean, which is the same wherever a class has them."""
    numbers = {name: _numbers(cut, name, now, tensors) for name in cut.before}
    prefixes = {name: _outermost_prefix(model, name) for name in numbers}
    alike: dict[tuple[type, str, UnitKind], list[tuple[str, str]]] = {}
    for key in now.attributes:
        inside = [name for name in numbers if key.startswith(prefixes[name])]
        if inside and key not in certain:
            owner, _, attribute = key.rpartition(".")
            name = max(inside, key=lambda name: len(prefixes[name]))
            alike.setdefault((type(model.get_submodule(owner)), attribute, cut.kinds[name]), []).append((key, name))
    options = []
    for (_, attribute, _), keys in alike.items():
        ranked = [(2, {key: now.attributes[key] for key, _ in keys})]
        for meaning in numbers[keys[0][1]]:
            if all(numbers[name].get(meaning, (0, 0))[0] == now.attributes[key] for key, name in keys):
                rank = 0 if meaning.split()[-1] in attribute else 1 if meaning.startswith(".") else 3
                ranked.append((rank, {key: numbers[name][meaning][1] for key, name in keys}))
        different: list[dict[str, int]] = []
        for _, values in sorted(ranked, key=lambda option: option[0]):
            different += [] if values in different else [values]
        if len(different) > 1:
            options.append(different)
    return options


def _outermost_prefix(model: PreTrainedModel, layer: str) -> str:
    """Returns the prefix of the outermost module that contains this layer and no other parameters."""
    prefix = _prefix(layer)
    while "." in prefix[:-1]:
        outer = prefix[:-1].rpartition(".")[0]
        if not all(name.startswith(prefix) for name, _ in model.get_submodule(outer).named_parameters(outer)):
            break
        prefix = f"{outer}."
    return prefix


def _prefix(layer: str) -> str:
    module = layer.partition(" ")[0]  # after a space stands the kind of its units
    return f"{module}." if module else ""


def _numbers(cut: Cut, layer: str, now: Shape, tensors: Sizes) -> dict[str, tuple[int, int]]:
    """Returns numbers of units and sizes of tensors, before and after; the last word of a key may be in an attribute's name."""
    before, after, kind = cut.before[layer], cut.after[layer], cut.kinds[layer]
    numbers: dict[str, tuple[int, int]] = {kind: (before[0], after[0])}
    if kind == "head":
        numbers |= {"kv head": (before[1], after[1]), "group": (before[0] // before[1], after[0] // after[1])}
    prefix = _prefix(layer)
    for name, size in now.tensors.items():
        if name.startswith(prefix):
            for dim, (old, new) in enumerate(zip(size, tensors[name], strict=True)):
                meaning = f".{name.removeprefix(prefix)}[{dim}]"
                numbers[meaning] = (old, new)
                if old % 3 == new % 3 == 0:  # queries, keys and values in one
                    numbers[f"{meaning} / 3"] = (old // 3, new // 3)
    return numbers


def _runs(model: PreTrainedModel, cut: Cut, shape: Shape, fields: Fields, eager: bool) -> bool:
    """Tells whether the model's code runs with a shape, on meta tensors, and has the planned units."""
    meta_model = to_meta(model)
    set_shape(meta_model, shape)
    set_fields(meta_model.config, fields)
    try:
        units = units_of(meta_model, trace(meta_model), _kinds(cut))
    except ValueError:
        return False
    if eager and not _runs_eagerly(meta_model):  # which may ask for what a faster implementation does not
        return False
    expected = {name: left for name, left in cut.after.items() if name in units or max(left) > 1}  # a single unit is no group
    if {name: counts(layer) for name, layer in units.items()} != expected:
        return False
    several = [name for name in cut.units if name in units and units[name].count() > 1]
    return all(_are_left(cut.all_units[name], units[name], cut, cut.units[name]) for name in several)


def _runs_eagerly(meta_model: PreTrainedModel) -> bool:
    """Tells whether a model on meta tensors runs with attention of its own code, and leaves it with that."""
    for config in configs_of(meta_model):
        set_attention(config, "eager")
    try:
        trace(meta_model)
    except ValueError:
        return False
    return True


def _are_left(before: Units, after: Units, cut: Cut, removed: Sequence[int]) -> bool:
    """Tells whether the units that remain are where they were left, and not dealt out again, as to cores."""
    new_number = np.append(np.cumsum(~np.isin(np.arange(before.count()), removed)) - 1, -1)  # -1 stays -1
    members = {(member.name, member.dim): member for member in after.members_by_unit()}
    for member in before.members_by_unit():
        unit_of, then = before.of_member(member), members.get((member.name, member.dim))
        left = unit_of[cut.cuts.get((member.name, member.dim), np.arange(len(unit_of)))]
        if then is None or not np.array_equal(new_number[left], after.of_member(then)):
            return False
    return True
