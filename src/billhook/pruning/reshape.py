"""Finds the attributes and config of a model without some units."""

import itertools
import operator
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
from billhook.model.token_ids import with_kept_tokens
from billhook.model.transformers_internals import set_attention
from billhook.pruning.cut import Cut, size_after
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Kind
from billhook.tracing.trace import trace
from billhook.units.fields import FieldFinder
from billhook.units.find import units_of
from billhook.units.units import UnitKind, Units, counts

TRIALS = 64
"""Most assignments of integer attributes to try. None of 551 architectures needs more than 29 (benchmarks/roundtrip.py)."""

Sizes = dict[str, tuple[int, ...]]
"""Tensor sizes by name."""


def candidate_shapes(model: PreTrainedModel, cut: Cut) -> Iterator[tuple[Shape, Fields]]:
    """Yields possible shapes, the likeliest first: as the class builds it, then by trial."""
    shape_before, built_before, tensors = shape_of(model), _build_shape(model, {}), _sizes_then(model, cut)
    yield from _built(model, cut, built_before, shape_before, tensors)
    eager = all(
        built_before.attributes.get(name) == value
        for name, value in shape_before.attributes.items()
        if name.endswith(f".{GROUPS}")
    )
    eager = eager and _runs_eagerly(to_meta(model))
    num_heads = _head_fields(model, cut)
    for fields in ({}, num_heads) if num_heads else ({},):  # some code reads the config during the forward pass
        for attributes in itertools.islice(_assignments(model, cut, shape_before, tensors), TRIALS):
            shape = Shape(tensors, shape_before.attributes | attributes, shape_before.config)
            if _runs(model, cut, shape, fields, eager):
                yield shape, fields


def _sizes_then(model: PreTrainedModel, cut: Cut) -> Sizes:
    """Returns the sizes of all tensors after the cut, tied names included.

    Apart from `candidate_shapes`, which as a generator would keep these parameters in memory.
    """
    first = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    state = model.state_dict(keep_vars=True)
    return {name: size_after(cut.cuts, first.get(id(tensor), name), tensor.shape) for name, tensor in state.items()}


def _built(
    model: PreTrainedModel, cut: Cut, built_before: Shape, shape_before: Shape, tensors: Sizes
) -> Iterator[tuple[Shape, Fields]]:
    """Yields the shape that the class builds from a changed config, if its tensors fit.

    Adapters are left out for the build.
    """
    base, structure, units, layers, built_now = model, cut.structure, cut.all_units, adapter_layers(model), shape_before.tensors
    sizes_without_adapters = tensors
    if layers:
        base = without_adapters(model)
        structure, built_now = trace(base), shape_of(base).tensors
        units = units_of(base, structure, _kinds(cut))
        sizes_without_adapters = {
            name.replace(".base_layer.", "."): size for name, size in tensors.items() if ".lora_" not in name
        }
    fields = _fields(base, cut, structure, units) if built_before.tensors == built_now else {}
    if not fields:
        return
    try:
        built = _build_shape(base, fields)
    except Exception:  # whatever a class of configs or models raises
        return
    if built.tensors == sizes_without_adapters:
        attributes = {}
        for name, value in built.attributes.items():
            if built_before.attributes.get(name, value) != value:
                attributes[base_layer_name(name, layers)] = value
        certain = _certain(model, tensors) if layers else {}
        yield Shape(tensors, shape_before.attributes | attributes | certain, shape_before.config), fields


def _build_shape(model: PreTrainedModel, fields: Fields) -> Shape:
    """Builds the model's class from a changed config and returns its shape."""
    config = with_fields(model.config, fields)
    read_back(config)  # raises if the config class does not allow the values
    return built_shape(type(model), config)


def _kinds(cut: Cut) -> list[UnitKind]:
    return list(dict.fromkeys(cut.kinds.values()))


def _fields(model: PreTrainedModel, cut: Cut, structure: Structure, units: Mapping[str, Units]) -> Fields:
    """Returns changed config fields, if all modules keep the same number of units per kind."""
    finder, leaves = FieldFinder(model), {leaf for layer in units.values() for leaf in layer.leaves}
    fields: Fields = {}
    for kind in _kinds(cut):
        if kind == "token":
            fields |= with_kept_tokens(model.config, *cut.tokens) if cut.tokens else {}
            continue
        sizes = _group_sizes(cut, kind)
        if sizes is None:
            return {}
        for kinds, size, size_then in sizes:
            if size_then == size:
                continue
            groups = [g for g in structure.groups if g.leaf in leaves and g.kind in kinds and g.size == size]
            values = finder.values(size, finder.find(groups), size_then) if groups else {}
            if not values and kind == "head" and (with_head_dim := _head_fields(model, cut, width=True)):
                fields |= with_head_dim
                break
            if not values:
                return {}
            for name, value in values.items():
                changed = fields.get(name) if field(model.config, name) is not None else None
                fields[name] = value if changed is None else changed // size * size_then
    return fields


def _group_sizes(cut: Cut, kind: UnitKind) -> list[tuple[tuple[Kind, ...], int, int]] | None:
    """Returns the groups of a unit kind with sizes before and after; None if modules differ."""
    changes = {(cut.before[name], cut.after[name]) for name in cut.kinds if cut.kinds[name] == kind}
    if all(itertools.starmap(operator.eq, changes)):
        return []
    if len(dict(changes)) < len(changes) or (kind == "head" and len(changes) > 1):
        return None
    if kind != "head":
        assert kind != "block"
        assert kind != "token"
        return [((kind,), before[0], after[0]) for before, after in sorted(changes)]
    ((query, kv), (query_then, kv_then)) = changes.pop()
    return [(("kv_head", "head"), kv, kv_then), (("query_head",), query // kv, query_then // kv_then)]


def _head_fields(model: PreTrainedModel, cut: Cut, width: bool = False) -> Fields:
    """Returns config fields that hold head counts, with new values; none if layers differ.

    With `width`, also `head_dim`, which many classes read although their config does not declare it.
    """
    before, after = set[tuple[int, ...]](), set[tuple[int, ...]]()
    for name, kind in cut.kinds.items():
        if kind == "head":
            before.add(cut.before[name])
            after.add(cut.after[name])
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


def _assignments(model: PreTrainedModel, cut: Cut, shape_before: Shape, tensors: Sizes) -> Iterator[dict[str, int]]:
    """Yields values of integer attributes, with few attributes in an unlikely meaning first."""
    certain = _certain(model, tensors)
    options = _meanings(model, cut, shape_before, tensors, certain)
    for count in range(len(options) + 1):
        for unlikely in itertools.combinations(range(len(options)), count):
            options_of_trial = (values[1:] if number in unlikely else values[:1] for number, values in enumerate(options))
            for chosen in itertools.product(*options_of_trial):
                yield certain | {name: value for values in chosen for name, value in values.items()}


def _certain(model: PreTrainedModel, tensors: Sizes) -> dict[str, int]:
    """Returns the attributes that hold the size of a tensor."""
    certain: dict[str, int] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        layer: Any = module.get_base_layer() if is_adapter(module) else module
        size = tensors.get(names.get(id(layer._parameters.get("weight")), ""))
        stated = _stated_sizes(layer, size) if size is not None else {}
        if layer is not module:  # PEFT's layers use these names, and none for convolutions
            stated = {} if "groups" in stated else dict(zip(("in_features", "out_features"), stated.values(), strict=False))
        certain |= {f"{name}.{attribute}": value for attribute, value in stated.items() if hasattr(module, attribute)}
    return certain


def _stated_sizes(layer: nn.Module, size: tuple[int, ...]) -> dict[str, int]:
    """Returns a layer's size attributes for this weight size: inputs, then outputs."""
    if isinstance(layer, nn.Linear):
        return {"in_features": size[1], "out_features": size[0]}
    if isinstance(layer, Conv1D):
        return {"nx": size[0], "nf": size[1]}
    if isinstance(layer, nn.Embedding):
        return {"num_embeddings": size[0], "embedding_dim": size[1]}
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        groups = layer.groups
        if groups == layer.in_channels > 1:  # a depthwise convolution has one group per input
            groups = size[0] // (layer.out_channels // groups)
        return {"in_channels": size[1] * groups, "out_channels": size[0], "groups": groups}
    return {"num_features": size[0]} if isinstance(layer, nn.modules.batchnorm._BatchNorm) else {}


def _meanings(
    model: PreTrainedModel, cut: Cut, shape_before: Shape, tensors: Sizes, certain: Collection[str]
) -> list[list[dict[str, int]]]:
    """Returns possible new values of integer attributes, by their possible meanings.

    An attribute has the same meaning wherever a class has it.
    """
    numbers, prefixes = dict[str, dict[str, tuple[int, int]]](), dict[str, str]()
    for name in cut.before:
        numbers[name], prefixes[name] = _numbers(cut, name, shape_before, tensors), _outermost_prefix(model, name)
    keys_of: dict[tuple[type, str, UnitKind], list[tuple[str, str]]] = {}
    for key in shape_before.attributes:
        modules_around = [name for name in numbers if key.startswith(prefixes[name])]
        if modules_around and key not in certain:
            owner, _, attribute = key.rpartition(".")
            name = max(modules_around, key=lambda name: len(prefixes[name]))
            keys_of.setdefault((type(model.get_submodule(owner)), attribute, cut.kinds[name]), []).append((key, name))
    options = []
    for (_, attribute, _), keys in keys_of.items():
        ranked = [(2, {key: shape_before.attributes[key] for key, _ in keys})]
        for meaning in numbers[keys[0][1]]:
            changed = {}
            for key, name in keys:
                before, after = numbers[name].get(meaning, (None, 0))
                if before == shape_before.attributes[key]:
                    changed[key] = after
            if len(changed) == len(keys):
                rank = 0 if meaning.split()[-1] in attribute else 1 if meaning.startswith(".") else 3
                ranked.append((rank, changed))
        different: list[dict[str, int]] = []
        for _, values in sorted(ranked, key=lambda option: option[0]):
            different += [] if values in different else [values]
        if len(different) > 1:
            options.append(different)
    return options


def _outermost_prefix(model: PreTrainedModel, layer: str) -> str:
    """Returns the prefix of the outermost module with only this module's parameters."""
    prefix = _prefix(layer)
    while "." in prefix[:-1]:
        outer = prefix[:-1].rpartition(".")[0]
        if not all(name.startswith(prefix) for name, _ in model.get_submodule(outer).named_parameters(outer)):
            break
        prefix = f"{outer}."
    return prefix


def _prefix(layer: str) -> str:
    module = layer.partition(" ")[0]  # after a space comes the kind of its units
    return f"{module}." if module else ""


def _numbers(cut: Cut, layer: str, shape_before: Shape, tensors: Sizes) -> dict[str, tuple[int, int]]:
    """Returns unit counts and tensor sizes before and after, by their meaning.

    The last word of a key may be part of an attribute's name.
    """
    before, after, kind = cut.before[layer], cut.after[layer], cut.kinds[layer]
    numbers: dict[str, tuple[int, int]] = {kind: (before[0], after[0])}
    if kind == "head":
        numbers |= {"kv head": (before[1], after[1]), "group": (before[0] // before[1], after[0] // after[1])}
    prefix = _prefix(layer)
    for name, size in shape_before.tensors.items():
        if name.startswith(prefix):
            for dim, (old, new) in enumerate(zip(size, tensors[name], strict=True)):
                meaning = f".{name.removeprefix(prefix)}[{dim}]"
                numbers[meaning] = (old, new)
                if old % 3 == new % 3 == 0:  # fused queries, keys, and values
                    numbers[f"{meaning} / 3"] = (old // 3, new // 3)
    return numbers


def _runs(model: PreTrainedModel, cut: Cut, shape: Shape, fields: Fields, eager: bool) -> bool:
    """Returns whether the model's code runs with a shape on meta and has the planned units."""
    meta_model = to_meta(model)
    set_shape(meta_model, shape)
    set_fields(meta_model.config, fields)
    try:
        units = units_of(meta_model, trace(meta_model), _kinds(cut))
    except ValueError:
        return False
    if eager and not _runs_eagerly(meta_model):  # eager code may read attributes that faster code does not
        return False
    for name, left in cut.after.items():
        if name not in units and max(left) > 1:  # tracing reports no group of a single unit
            return False
    for name, layer in units.items():
        if counts(layer) != cut.after.get(name):
            return False
        removed = cut.units.get(name)
        if removed is not None and layer.count() > 1 and not _are_left(cut.all_units[name], layer, cut, removed):
            return False
    return True


def _runs_eagerly(meta_model: PreTrainedModel) -> bool:
    """Returns whether a meta model runs with eager attention, and leaves it set."""
    for config in configs_of(meta_model):
        set_attention(config, "eager")
    try:
        trace(meta_model)
    except ValueError:
        return False
    return True


def _are_left(before: Units, after: Units, cut: Cut, removed: Sequence[int]) -> bool:
    """Returns whether the remaining units kept their place and were not regrouped."""
    new_number = np.append(np.cumsum(~np.isin(np.arange(before.count()), removed)) - 1, -1)  # -1 stays -1
    members = {(member.name, member.dim): member for member in after.members_by_unit()}
    for member in before.members_by_unit():
        unit_of, new_member = before.of_member(member), members.get((member.name, member.dim))
        left = unit_of[cut.cuts.get((member.name, member.dim), np.arange(len(unit_of)))]
        if new_member is None or not np.array_equal(new_number[left], after.of_member(new_member)):
            return False
    return True
