"""Finds a model's attributes and config without some units: as its class builds them, or by trial on meta tensors."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.adapters.merge import adapted, beneath, without_adapters
from billhook.model.config_fields import Fields, configs_of, field, read_back, set_fields, with_fields
from billhook.model.linears import is_adapter
from billhook.model.meta import to_meta
from billhook.model.shape import GROUPS, Shape, built_shape, set_shape, shape_of
from billhook.model.transformers_internals import set_attention
from billhook.pruning.cuts import Cut
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import Kind
from billhook.tracing.trace import trace
from billhook.units.fields import FieldFinder
from billhook.units.find import units_of
from billhook.units.units import UnitKind, Units, counts

TRIALS = 64
"""The most assignments of whole-number attributes that are tried; none of 551 architectures needs more than 29 (roundtrip.py)."""


def shapes_then(model: PreTrainedModel, cut: Cut) -> Iterator[tuple[Shape, Fields]]:
    """Yields shapes that the model may have then, the likeliest first: as its class builds it, or with attributes by trial."""
    now, tensors, usual = shape_of(model), _sizes_then(model, cut), _build_shape(model, {})
    if adapted(model):
        built, fields = _beneath_adapters(model, cut, usual, now, tensors)
    else:
        fields = _fields(model, cut, cut.structure, cut.places) if usual.tensors == now.tensors else {}
        built = _built(model, fields, usual, now, tensors) if fields else None
    if built is not None:
        yield built, fields
    eager = all(usual.attributes.get(name) == value for name, value in now.attributes.items() if name.endswith(f".{GROUPS}"))
    eager = eager and _runs_eagerly(to_meta(model))
    said = _heads_said(model, cut)
    for changed in ({}, said) if said else ({},):  # some code asks the config in the middle of a forward
        for attributes in itertools.islice(_assignments(model, cut, now, tensors), TRIALS):
            shape = Shape(tensors, now.attributes | attributes, now.config)
            if _runs(model, cut, shape, changed, eager):
                yield shape, changed


def _beneath_adapters(
    model: PreTrainedModel, cut: Cut, usual: Shape, now: Shape, tensors: dict[str, tuple[int, ...]]
) -> tuple[Shape | None, Fields]:
    """Finds the shape of a model with LoRA, from what its class builds beneath that."""
    base, layers = without_adapters(model), adapted(model)
    before = shape_of(base)
    structure = trace(base)
    units = units_of(base, structure, _kinds(cut))
    fields = _fields(base, cut, structure, units) if usual.tensors == before.tensors else {}
    plain = {name.replace(".base_layer.", "."): size for name, size in tensors.items() if ".lora_" not in name}
    built = _built(base, fields, usual, before, plain) if fields else None
    if built is None:
        return None, {}
    attributes = {beneath(name, layers): value for name, value in built.attributes.items()} | _certain(model, tensors)
    return Shape(tensors, now.attributes | attributes, now.config), fields


def _fields(model: PreTrainedModel, cut: Cut, structure: Structure, units: Mapping[str, Units]) -> Fields:
    """Returns the config's fields with their new values, if they can say them: as many units of a kind everywhere."""
    finder, leaves = FieldFinder(model), {leaf for one in units.values() for leaf in one.leaves}
    groups = [group for group in structure.groups if group.leaf in leaves]
    changes: Fields = {}
    for kind in _kinds(cut):
        steps = _steps(cut, kind)
        if steps is None:
            return {}
        for kinds, size, count in steps:
            if count == size:
                continue
            own = [group for group in groups if group.kind in kinds and group.size == size]
            found = finder.values(size, finder.find(own), count) if own else {}
            if not found and kind == "head" and (found := _with_width(model, cut)):
                changes |= found
                break
            if not found:
                return {}
            for name, value in found.items():
                already = changes.get(name) if field(model.config, name) is not None else None
                changes[name] = value if already is None else already // size * count
    return changes


def _kinds(cut: Cut) -> list[UnitKind]:
    return list(dict.fromkeys(cut.kinds.values()))


def _steps(cut: Cut, kind: UnitKind) -> list[tuple[tuple[Kind, ...], int, int]] | None:
    """Returns the kinds of groups that a kind of unit is made of, each with its size before and after; None if layers differ."""
    places = [name for name, own in cut.kinds.items() if own == kind]
    changes = {(cut.before[name], cut.after[name]) for name in places}
    if all(before == after for before, after in changes):
        return []
    if len({before for before, _ in changes}) < len(changes) or (kind == "head" and len(changes) > 1):
        return None
    if kind != "head":
        assert kind != "block"
        return [((kind,), before[0], after[0]) for before, after in sorted(changes)]
    ((query, kv), (query_then, kv_then)) = changes.pop()
    return [(("kv_head", "head"), kv, kv_then), (("query_head",), query // kv, query_then // kv_then)]


def _heads_said(model: PreTrainedModel, cut: Cut) -> Fields:
    """Returns the fields of the config that are numbers of heads, with their new values; none if layers differ."""
    before, after = ({numbers[name] for name, kind in cut.kinds.items() if kind == "head"} for numbers in (cut.before, cut.after))
    if len(before) != 1 or len(after) != 1:
        return {}
    becomes = dict(zip(before.pop(), after.pop(), strict=True))
    return {f: becomes[v] for f, v in vars(model.config).items() if "head" in f and type(v) is int and v in becomes}


def _with_width(model: PreTrainedModel, cut: Cut) -> Fields:
    """Returns the numbers of heads and their width, which many classes read of a config that does not declare it."""
    said, kept = _heads_said(model, cut), shape_of(model).attributes
    widths = {value for name, value in kept.items() if name.endswith(".head_dim")}
    declared = hasattr(type(model.config), "head_dim")
    return said | {"head_dim": widths.pop()} if said and len(widths) == 1 and not declared else {}


def _built(model: PreTrainedModel, fields: Fields, usual: Shape, now: Shape, tensors: dict[str, tuple[int, ...]]) -> Shape | None:
    """Returns the shape that the model's class builds from a changed config, if it has these tensors."""
    try:
        built = _build_shape(model, fields)
    except Exception:  # whatever a class of configs or models raises
        return None
    if built.tensors != tensors:
        return None
    attributes = {k: v for k, v in built.attributes.items() if usual.attributes.get(k, v) != v}
    return Shape(tensors, now.attributes | attributes, now.config)


def _build_shape(model: PreTrainedModel, fields: Fields) -> Shape:
    """Builds the model's class from its config with some fields changed, and returns its shape."""
    config = with_fields(model.config, fields)
    read_back(config)  # which refuses what its class does not allow
    return built_shape(type(model), config)


def _assignments(model: PreTrainedModel, cut: Cut, now: Shape, tensors: dict[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    """Yields values of whole-number attributes, the likeliest first: few attributes with another meaning than the likeliest."""
    certain = _certain(model, tensors)
    options = _meanings(model, cut, now, tensors, certain)
    for count in range(len(options) + 1):
        for others in itertools.combinations(range(len(options)), count):
            some = (own[1:] if number in others else own[:1] for number, own in enumerate(options))
            for chosen in itertools.product(*some):
                yield certain | {key: value for one in chosen for key, value in one.items()}


def _certain(model: PreTrainedModel, tensors: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Returns the attributes that say the size of a tensor."""
    certain: dict[str, int] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        layer: Any = module.get_base_layer() if is_adapter(module) else module
        says = _says(layer)
        if is_adapter(module):
            says = dict(zip(("in_features", "out_features"), says.values(), strict=False))
        for attr, dim in says.items():
            weight = names.get(id(layer.weight), "")
            if weight in tensors and hasattr(module, attr):
                certain[f"{name}.{attr}"] = tensors[weight][dim]
        held = module._parameters.get("weight") if isinstance(module, nn.Conv1d | nn.Conv2d) else None
        if isinstance(module, nn.Conv1d | nn.Conv2d) and (weight := names.get(id(held), "")) in tensors:
            certain |= {f"{name}.{attr}": value for attr, value in _of_convolution(module, tensors[weight]).items()}
    return certain


def _of_convolution(convolution: nn.Conv1d | nn.Conv2d, size: tuple[int, ...]) -> dict[str, int]:
    """Returns the attributes of a convolution whose weight has this size; a depthwise one has as many groups as inputs."""
    outputs, read = size[:2]
    groups = convolution.groups
    if groups == convolution.in_channels > 1:
        groups = outputs // (convolution.out_channels // groups)
    return {"out_channels": outputs, "in_channels": read * groups, "groups": groups}


def _meanings(
    model: PreTrainedModel, cut: Cut, now: Shape, tensors: dict[str, tuple[int, ...]], certain: Collection[str]
) -> list[list[dict[str, int]]]:
    """Returns new values of the attributes of places, by what they may mean, which is the same wherever a class has them."""
    numbers = {name: _numbers(cut, name, now, tensors) for name in cut.before}
    alone = {name: _alone(model, name) for name in numbers}
    places: dict[tuple[type, str, UnitKind], list[tuple[str, str]]] = {}
    for key in now.attributes:
        inside = [name for name in numbers if key.startswith(alone[name])]
        if inside and key not in certain:
            owner, _, attr = key.rpartition(".")
            name = max(inside, key=lambda name: len(alone[name]))
            places.setdefault((type(model.get_submodule(owner)), attr, cut.kinds[name]), []).append((key, name))
    found = []
    for (_, attr, _), own in places.items():
        means = [m for m in numbers[own[0][1]] if all(numbers[n].get(m, (0, 0))[0] == now.attributes[k] for k, n in own)]
        ranks = {meaning: 0 if meaning.split()[-1] in attr else 1 if meaning.startswith(".") else 3 for meaning in means}
        options = [(ranks[m], {key: numbers[name][m][1] for key, name in own}) for m in means]
        options.append((2, {key: now.attributes[key] for key, _ in own}))
        ranked = [values for _, values in sorted(options, key=lambda option: option[0])]
        if any(values != ranked[0] for values in ranked):
            found.append([values for place, values in enumerate(ranked) if values not in ranked[:place]])
    return found


def _prefix(place: str) -> str:
    """Returns the prefix of all names in a place; after a space stands its kind."""
    module = place.partition(" ")[0]
    return f"{module}." if module else ""


def _alone(model: PreTrainedModel, place: str) -> str:
    """Returns the prefix of the outermost module that contains this place and no other parameters."""
    prefix = _prefix(place)
    while "." in prefix[:-1]:
        outer = prefix[:-1].rpartition(".")[0]
        if not all(name.startswith(prefix) for name, _ in model.get_submodule(outer).named_parameters(outer)):
            break
        prefix = f"{outer}."
    return prefix


def _numbers(cut: Cut, place: str, now: Shape, tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Returns numbers of units and sizes of tensors, before and after; the last word of a key may be in an attribute's name."""
    before, after = cut.before[place], cut.after[place]
    numbers: dict[str, tuple[int, int]] = {cut.kinds[place]: (before[0], after[0])}
    if cut.kinds[place] == "head":
        numbers |= {"kv head": (before[1], after[1]), "group": (before[0] // before[1], after[0] // after[1])}
    prefix = _prefix(place)
    for name, size in now.tensors.items():
        if name.startswith(prefix):
            for dim, (old, new) in enumerate(zip(size, tensors[name], strict=True)):
                where = f".{name.removeprefix(prefix)}[{dim}]"
                numbers[where] = (old, new)
                if old % 3 == new % 3 == 0:  # queries, keys and values in one
                    numbers[f"{where} / 3"] = (old // 3, new // 3)
    return numbers


def _says(module: nn.Module) -> dict[str, int]:
    """Returns the attributes of a layer that say a size of its weight, and of which dimension: its inputs, and its outputs."""
    if isinstance(module, nn.Linear):
        return {"in_features": 1, "out_features": 0}
    if isinstance(module, Conv1D):
        return {"nx": 0, "nf": 1}
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
        return {"num_features": 0}
    return {"num_embeddings": 0, "embedding_dim": 1} if isinstance(module, nn.Embedding) else {}


def _runs(model: PreTrainedModel, cut: Cut, shape: Shape, fields: Fields, eager: bool) -> bool:
    """Tells whether the model's code runs with a shape, on meta tensors, and has the planned units."""
    shadow = to_meta(model)
    set_shape(shadow, shape)
    set_fields(shadow.config, fields)
    try:
        units = units_of(shadow, trace(shadow), _kinds(cut))
    except ValueError:
        return False
    if eager and not _runs_eagerly(shadow):  # which may ask for what a faster implementation does not
        return False
    expected = {name: left for name, left in cut.after.items() if name in units or max(left) > 1}  # one alone is no group
    if {name: counts(one) for name, one in units.items()} != expected:
        return False
    gone = {name: own for name, own in cut.units.items() if name in units and units[name].count() > 1}
    return all(_stand(cut.places[name], units[name], cut, own) for name, own in gone.items())


def _runs_eagerly(shadow: PreTrainedModel) -> bool:
    """Tells whether a model on meta tensors runs with attention of its own code, and leaves it with that."""
    for config in configs_of(shadow):
        set_attention(config, "eager")
    try:
        trace(shadow)
    except ValueError:
        return False
    return True


def _stand(before: Units, after: Units, cut: Cut, gone: Sequence[int]) -> bool:
    """Tells whether the units that remain are where they were left, and not dealt out again, as to cores."""
    number = np.append(np.cumsum(~np.isin(np.arange(before.count()), gone)) - 1, -1)
    places = {(member.name, member.dim): member for member in after.held_by()}
    for member in before.held_by():
        own, there = before.of_member(member), places.get((member.name, member.dim))
        left = own[cut.cuts.get((member.name, member.dim), np.arange(len(own)))]
        if there is None or not np.array_equal(number[left], after.of_member(there)):
            return False
    return True


def _sizes_then(model: PreTrainedModel, cut: Cut) -> dict[str, tuple[int, ...]]:
    """Returns the sizes of all tensors after the cut, also of those that are the same under another name."""
    first = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    sizes = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        own = first.get(id(tensor), name)
        sizes[name] = tuple(len(cut.cuts.get((own, d), range(n))) for d, n in enumerate(tensor.shape))
    return sizes
