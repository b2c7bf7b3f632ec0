"""Finds the attributes and config of a model without some units."""

import itertools
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.adapters.merge import adapter_layers, base_layer_name, without_adapters
from billhook.model import (
    GROUPS,
    Fields,
    Shape,
    Sizes,
    build,
    built_shape,
    configs_of,
    field,
    fields_of,
    find_fields,
    is_adapter,
    nested_configs,
    set_attention,
    set_fields,
    set_shape,
    shape_of,
    to_meta,
    with_kept_tokens,
)
from billhook.pruning.cut import Cut, size_after
from billhook.tracing.trace import trace
from billhook.units import UnitKind, Units, counts, units_of

TRIALS = 64
"""Most assignments of integer attributes to try. None of 551 architectures needs more than 29 (benchmarks/roundtrip.py)."""


def candidate_shapes(model: PreTrainedModel, cut: Cut) -> Iterator[tuple[Shape, Fields]]:
    """Yields possible shapes, the likeliest first: as the class builds it, then by trial."""
    shape_before, usual, tensors = shape_of(model), built_shape(type(model), model.config), _sizes_then(model, cut)
    groups = {name: value for name, value in shape_before.attributes.items() if name.endswith(f".{GROUPS}")}
    eager = groups.items() <= usual.attributes.items() and _runs_eagerly(to_meta(model))
    num_heads = _head_fields(model, cut)[0]
    by_trial = (
        (Shape(tensors, shape_before.attributes | attributes, shape_before.config), fields)
        for fields in ([{}, num_heads] if num_heads else [{}])  # some code reads the config during the forward pass
        for attributes in itertools.islice(_assignments(model, cut, shape_before, tensors), TRIALS)
    )
    for shape, fields in itertools.chain(_built(model, cut, usual, shape_before, tensors), by_trial):
        if _runs(model, cut, shape, fields, eager):
            yield shape, fields


def _sizes_then(model: PreTrainedModel, cut: Cut) -> Sizes:
    """Returns the sizes of all tensors after the cut, tied names included.

    Apart from `candidate_shapes`, which as a generator would keep these parameters in memory.
    """
    first = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    state = model.state_dict(keep_vars=True)
    return {name: size_after(cut.cuts, first.get(id(tensor), name), tensor.shape) for name, tensor in state.items()}


def _built(model: PreTrainedModel, cut: Cut, usual: Shape, shape_before: Shape, tensors: Sizes) -> Iterator[tuple[Shape, Fields]]:
    """Yields shapes built by the class from changed configs, without adapters, if they fit."""
    base, layers, now, wanted, certain = model, adapter_layers(model), shape_before.tensors, tensors, {}
    if layers:
        base, certain = without_adapters(model), _certain(model, tensors)
        now = shape_of(base).tensors
        wanted = {name.replace(".base_layer.", "."): size for name, size in tensors.items() if ".lora_" not in name}
    for fields in _fields(base, cut, usual, wanted) if usual.tensors == now else ():
        attributes = shape_before.attributes | certain
        if (built := build(base, fields)) is not None:
            for name, value in built.shape.attributes.items():
                if usual.attributes.get(name, value) != value:
                    attributes[base_layer_name(name, layers)] = value
        yield Shape(tensors, attributes, shape_before.config), fields


def _kinds(cut: Cut) -> list[UnitKind]:
    return list(dict.fromkeys(cut.kinds.values()))


def _fields(model: PreTrainedModel, cut: Cut, usual: Shape, wanted: Sizes) -> Iterator[Fields]:
    """Yields config fields that give the wanted sizes: set ones, then unset, then defaults."""
    changes: set[tuple[UnitKind, int, int]] = set()
    for name, kind in cut.kinds.items():
        if kind != "token":
            changes.update((kind, old, new) for old, new in zip(cut.before[name], cut.after[name], strict=True))
    if len({(kind, old) for kind, old, _ in changes}) < len(changes):
        return  # modules differ
    general = vars(PretrainedConfig())  # of all models, such as `dtype`
    fields = {
        name: value
        for name, value in fields_of(model.config).items()
        if not name.endswith("token_id") and name.rpartition(".")[2] not in general
    }
    if "head" in _kinds(cut):
        fields.setdefault("head_dim", field(model.config, "head_dim"))  # many classes read it without declaring it
    stated, unset, defaults = [], [], Fields()
    for name, value in fields.items():
        for old, new in sorted({(old, new) for _, old, new in changes if old != new}):
            if value is None:
                unset.append((name, new))
            elif type(value) is int and value > 1 and value % old == 0:
                stated.append((name, value // old * new))
        used = {number for key, number in usual.attributes.items() if key.endswith(f".{name.rpartition('.')[2]}")}
        if value is None and len(used) == 1:
            defaults[name] = used.pop()
    tokens = with_kept_tokens(model.config, *cut.tokens) if cut.tokens else {}
    # head counts of one config go together: some code only divides by the number of KV heads
    now, head_counts = build(model, {}), []
    for heads in _head_fields(model, cut):
        for name, value in list(heads.items()):
            if (built := build(model, {name: value})) is not None and not built.is_between(now, wanted):
                del heads[name]  # of other heads, such as those of linear attention
        if heads:
            head_counts.append(heads)
    stages = [(stated, heads) for heads in head_counts] + [(stated, {}), (stated + unset, {})]
    stages += [(stated + unset, defaults | heads) for heads in [*head_counts, {}]]
    together = 2 + len(_kinds(cut))
    for number, (options, also) in enumerate(stages):
        if stages[number] not in stages[:number]:
            yield from find_fields(
                model, options, tokens | also, wanted, lambda built: built.tensors == wanted, together, refused=False
            )


def _head_fields(model: PreTrainedModel, cut: Cut) -> list[Fields]:
    """Returns head count fields of each nested config, changed; none if layers differ."""
    counts = {(cut.before[name], cut.after[name]) for name, kind in cut.kinds.items() if kind == "head"}
    becomes = dict(zip(*counts.pop(), strict=True)) if len(counts) == 1 else {}
    return [
        {
            f"{prefix}{name}": becomes[value]
            for name, value in vars(nested).items()
            if "head" in name and type(value) is int and becomes.get(value, value) != value
        }
        for prefix, nested in nested_configs(model.config)
    ]


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
        layer = module.get_base_layer() if is_adapter(module) else module
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
    """Returns possible new integer attributes by meaning, the same wherever a class has them."""
    numbers, prefixes = {}, {}
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
                # the last word of a meaning may be part of an attribute's name
                rank = 0 if meaning.split()[-1] in attribute else 1 if meaning.startswith(".") else 3
                ranked.append((rank, changed))
        different = []
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
    """Returns unit counts and tensor sizes before and after, by their meaning."""
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
        kept = cut.cuts.get((member.name, member.dim), np.arange(len(unit_of)))
        left = unit_of[kept] if kept.ndim == 1 else unit_of[~np.isin(unit_of, removed)]
        if new_member is None or not np.array_equal(new_number[left], after.of_member(new_member)):
            return False
    return True
