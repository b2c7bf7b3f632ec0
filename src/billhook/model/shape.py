"""The shape of a model, absolute: the sizes of its tensors, its blocks, and what modules and config say of both.

A checkpoint carries it, so that a model of any other shape can take the checkpoint's shape before the weights are loaded.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import Self

from billhook.model.cache import cached
from billhook.model.config_fields import Fields, build_class_on_meta, fields_of, read_back, set_fields
from billhook.model.constants import Numbers, derived_constants, set_constants
from billhook.model.layers import is_linear
from billhook.model.repeat_kv import RepeatLayout, repeat_layout_of, set_repeat_layout
from billhook.model.surgery import restored_on_error

_REMOVED = "_billhook_removed"  # on a module list: by their first numbers, the blocks that were removed, without weights


def block_numbers(stack: nn.ModuleList) -> list[int]:
    """Returns the numbers that the blocks of a stack had before any was taken out."""
    return [number for number in range(original_count(stack)) if number not in _removed_from(stack)]


def original_count(stack: nn.ModuleList) -> int:
    """Returns how many blocks a stack had before any was taken out."""
    return len(stack) + len(_removed_from(stack))


def removed_blocks(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Finds the stacks that have lost blocks: by name, how many blocks there were at first, and the numbers of those there."""
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: (original_count(stack), tuple(block_numbers(stack))) for name, stack in stacks.items() if _removed_from(stack)}


def keep_blocks(stack: nn.ModuleList, numbers: Sequence[int]) -> None:
    """Leaves these blocks in a stack, by the numbers that they had at first; removed ones come back, without weights."""
    blocks, removed = dict(zip(block_numbers(stack), stack, strict=True)), dict(_removed_from(stack))
    tensor = next(stack.parameters(), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    back = {number: _filled(removed.pop(number), number, device) for number in numbers if number not in blocks}
    for number in blocks.keys() - set(numbers):
        try:
            removed[number] = _copied(blocks[number], torch.device("meta"))
        except Exception:  # whatever a class of somebody's own raises
            removed[number] = None
    blocks |= back
    for block in back.values():
        block.train(stack.training)
    stack._modules.clear()
    stack._modules.update({str(position): blocks[number] for position, number in enumerate(numbers)})
    vars(stack)[_REMOVED] = removed
    if not removed:
        del vars(stack)[_REMOVED]


def _removed_from(stack: nn.ModuleList) -> dict[int, nn.Module | None]:
    removed: dict[int, nn.Module | None] = vars(stack).get(_REMOVED, {})
    return removed


def _filled(block: nn.Module | None, number: int, device: torch.device) -> nn.Module:
    if block is None:
        raise ValueError(f"block {number}, which was removed, cannot come back: load the checkpoint into a new model")
    return _copied(block, device)


def _copied(block: nn.Module, device: torch.device) -> nn.Module:
    """Copies a block, but not its configs, with parameters on a device that hold nothing meaningful."""
    memo: dict[int, Any] = {}
    for module in block.modules():
        memo |= {id(config): config for config in vars(module).values() if isinstance(config, PretrainedConfig)}
    for parameter in block.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
    return copy.deepcopy(block, memo)


T = TypeVar("T")

KEY = "billhook"
"""Where Lightning checkpoints keep the shape, and config.json what the model's class does not build of it."""

VERSIONS = (1, 2)
"""Those of an entry that are read: the first has no linears that hand out heads, and is written where there are none."""

GROUPS = "num_key_value_groups"
"""The attribute of an attention, its class's or given to it, with which transformers reads fewer KV heads than query heads."""

FLAG = "multi_query"
"""The field of config and attention that says in some families that there is one KV head: the only flag in a shape."""
DIMENSIONS = 8  # more than any layer's weight has


@dataclass(frozen=True)
class Shape:
    """Sizes of tensors by name, and whole numbers by `module.attribute` and by config field.

    Attributes:
        tensors: The sizes of what `state_dict` holds.
        attributes: The whole-number attributes of the modules that hold parameters.
        config: The whole-number fields of the config, nested configs with dots.
        lists: The fields of the config that are lists of plain values, such as one for each block.
        blocks: By the module lists from which blocks were removed: how many there were at first, and which of them are there.
        handed: The linears that store fewer heads than they hand out; None where a shape says nothing of them.
    """

    tensors: dict[str, tuple[int, ...]]
    attributes: dict[str, int]
    config: dict[str, int]
    lists: dict[str, list[Any]] = field(default_factory=dict)
    blocks: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    handed: dict[str, RepeatLayout] | None = None

    def over(self, other: "Shape") -> "Shape":
        """Returns a complete shape in which this one, where it says anything, stands instead."""
        parts = {part: vars(other)[part] | stated for part, stated in vars(self).items() if part != "handed"}
        return Shape(**parts, handed=other.handed if self.handed is None else self.handed)

    def to_dict(self) -> dict[str, Any]:
        """Returns lists, dicts and numbers, which any checkpoint format can hold."""
        return {
            "tensors": {name: list(size) for name, size in self.tensors.items()},
            "attributes": dict(self.attributes),
            "config": dict(self.config),
            "lists": {name: list(values) for name, values in self.lists.items()},
            "blocks": {name: [first, list(numbers)] for name, (first, numbers) in self.blocks.items()},
            "handed": {name: handing.to_list() for name, handing in (self.handed or {}).items()},
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """Makes a shape of what `to_dict` returned, also before it knew of lists, blocks and linears that hand out heads."""
        check_plain_shape(plain)
        tensors = {name: tuple(size) for name, size in plain["tensors"].items()}
        blocks = {name: (first, tuple(numbers)) for name, (first, numbers) in plain.get("blocks", {}).items()}
        handed = {name: RepeatLayout.from_list(pieces) for name, pieces in plain.get("handed", {}).items()}
        return cls(tensors, dict(plain["attributes"]), dict(plain["config"]), dict(plain.get("lists", {})), blocks, handed)


def check_plain_shape(plain: object) -> None:
    """Refuses what `Shape.to_dict` does not make."""
    parts: dict[str, tuple[Callable[[str, Any], bool], str]] = {
        "tensors": (_is_size, "a short list of whole numbers"),
        "attributes": (_is_whole, "a whole number of 64 bits"),
        "config": (_is_whole, "a whole number of 64 bits"),
        "lists": (_is_plain_list, "a list of plain values"),
        "blocks": (_are_blocks, "a number of blocks, and which of them are there, ascending"),
        "handed": (lambda _, stated: isinstance(stated, list), "a list"),
    }
    for part, (holds, legal) in parts.items():
        stated = plain.get(part, {} if part in ("lists", "blocks", "handed") else None) if isinstance(plain, Mapping) else None
        if not isinstance(stated, Mapping):
            raise ValueError(f"shape.{part} is {str(stated)[:80]!r}, and must be a mapping")
        for name, value in stated.items():
            if not isinstance(name, str) or not holds(name, value):
                raise ValueError(f"shape.{part}: {str(name)[:200]} is {str(value)[:80]!r}, and must be {legal}")


def _is_size(_: str, size: object) -> bool:
    return isinstance(size, list | tuple) and len(size) <= DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in size)


def _is_whole(name: str, stated: object) -> bool:
    """Tells whether an attribute or field is a number that a shape can hold, or the flag that it does."""
    return (type(stated) is int and abs(stated) < 2**63) or (type(stated) is bool and name.rpartition(".")[2] == FLAG)


def _is_plain_list(_: str, stated: object) -> bool:
    """Tells whether a field is a list that a shape can hold."""
    return isinstance(stated, list) and all(value is None or isinstance(value, bool | int | float | str) for value in stated)


def _are_blocks(_: str, stated: object) -> bool:
    if not isinstance(stated, list) or len(stated) != 2 or type(stated[0]) is not int or not isinstance(stated[1], list | tuple):
        return False
    first, numbers = stated
    return all(type(n) is int and 0 <= n < first for n in numbers) and list(numbers) == sorted(set(numbers))


def shape_of(model: nn.Module) -> Shape:
    """Returns the shape that a model has now."""
    state = model.state_dict(keep_vars=True)
    if packed := next((name for name, value in state.items() if not isinstance(value, Tensor)), None):
        raise ValueError(
            f"model: {packed} is a {type(state[packed]).__name__} and no tensor, as in layers that torch.ao has quantised: "
            "work on the model before it is quantised"
        )
    shape = Shape({name: tuple(tensor.shape) for name, tensor in state.items()}, {}, {}, blocks=removed_blocks(model), handed={})
    for name, module, attr in _numbers(model):
        shape.attributes[name] = getattr(module, attr)
    for name, value in _fields(model).items():
        if isinstance(value, list):
            shape.lists[name] = list(value)
        else:
            shape.config[name] = value
    for name, module in model.named_modules():
        if shape.handed is not None and (handing := repeat_layout_of(module)) is not None:
            shape.handed[name] = handing
    return shape


def built_shape(kind: type[PreTrainedModel], config: PretrainedConfig) -> Shape:
    """Returns the shape that a class builds from a config as it is read back from a checkpoint; the config stays as it is."""

    def built() -> Shape:
        try:
            read = read_back(config)
        except Exception:  # whatever a class of configs raises
            read = copy.deepcopy(config)
        return shape_of(build_class_on_meta(kind, read))

    return cached(built, (kind, config), "shape")


def shape_beyond_config(model: PreTrainedModel, now: Shape | None = None) -> Shape:
    """Returns the part of a model's shape that its config cannot express; without tensors if the config describes the model.

    The attributes alone may differ in such a model too, as when a field of the config was changed after building. Linears count
    as those that they are without adapters. Its shape `now` is not looked for again if it is known.
    """
    now, built = now or shape_of(model), built_shape(type(model), model.config)
    sizes, numbers, handed = _bare(now.tensors), _bare(now.attributes), _bare(now.handed or {})
    tensors = {name: size for name, size in sizes.items() if built.tensors.get(name, size) != size}
    attributes = {
        name: value
        for name, value in numbers.items()
        if built.attributes.get(name, None if name.endswith(f".{GROUPS}") else value) != value
    }
    return Shape(tensors, attributes, {}, handed=handed or None)


def _bare(stated: Mapping[str, T]) -> dict[str, T]:
    """Names linears as if they had no adapters."""
    return {name.replace(".base_layer.", ".").removesuffix(".base_layer"): value for name, value in stated.items()}


def to_entry(shape: Shape) -> dict[str, Any]:
    """Returns the entry of a config under `KEY` for a shape."""
    plain = shape.to_dict()
    parts = ("tensors", "attributes", "handed") if shape.handed else ("tensors", "attributes")
    return {"version": VERSIONS[len(parts) - 2], "shape": {part: plain[part] for part in parts}}


def record_shape(model: nn.Module) -> None:
    """Has a model's config report, for whoever saves the model, what its class does not build of its shape."""
    if not isinstance(model, PreTrainedModel) or model.device.type == "meta":
        return
    vars(model.config).pop(KEY, None)
    try:
        shape = shape_beyond_config(model)
    except Exception:  # a class of somebody's own that is not built from a config alone
        return
    if shape.tensors:
        setattr(model.config, KEY, to_entry(shape))


def set_shape(model: nn.Module, shape: Shape) -> None:
    """Gives a model another shape; tensors whose size changes are new and hold nothing meaningful until weights are loaded.

    What else a module says of a tensor's size follows it: `normalized_shape` of a `LayerNorm`. Blocks that were removed by then
    are removed, and those that were not come back; what attentions and linears have of fewer KV heads follows likewise.

    Raises:
        ValueError: If the shape is of a model with other tensors.
    """
    with restored_on_error(model):
        for stack, numbers in list(_blocks_then(model, shape)):
            keep_blocks(stack, numbers)
        _check_names(model, shape)
    renewed: dict[int, Tensor] = {}  # tied parameters stay tied
    for name, old in model.state_dict(keep_vars=True).items():
        if tuple(old.shape) != shape.tensors[name]:
            if id(old) not in renewed:
                renewed[id(old)] = _like(old, shape.tensors[name])
            owner, _, attr = name.rpartition(".")
            _put(model.get_submodule(owner), attr, renewed[id(old)])
    if shape.handed is not None:
        for name, module in list(model.named_modules()):
            if (stated := shape.handed.get(name)) != repeat_layout_of(module):
                set_repeat_layout(module, stated)
    _set_groups(model, shape)
    for name, module, attr in list(_numbers(model)):
        setattr(module, attr, shape.attributes.get(name, getattr(module, attr)))
    then: Fields = shape.config | shape.lists
    if changed := {name: then[name] for name, value in _fields(model).items() if then.get(name, value) != value}:
        before = copy.deepcopy(model.config)
        set_fields(cast(PretrainedConfig, model.config), changed)
        if isinstance(model, PreTrainedModel):
            set_constants(model, changed_constants(model, cast(PretrainedConfig, before)))


def changed_constants(model: PreTrainedModel, before: PretrainedConfig) -> Numbers:
    """Finds numbers that a model takes from its config instead of an earlier one; none if that does not describe the model."""
    return {} if shape_beyond_config(model).tensors else derived_constants(model, before)


def _set_groups(model: nn.Module, shape: Shape) -> None:
    """Gives attentions the attribute that others of their class lack; a complete shape that lacks it takes it from them."""
    complete = shape.handed is not None
    for name, module in model.named_modules():
        stated = shape.attributes.get(f"{name}.{GROUPS}")
        if stated is not None:
            setattr(module, GROUPS, stated)
        elif complete and type(vars(module).get(GROUPS)) is int and next(module.parameters(), None) is not None:
            delattr(module, GROUPS)


def _check_names(model: nn.Module, shape: Shape) -> None:
    names = model.state_dict().keys()
    if names != shape.tensors.keys():
        missing, extra = sorted(names - shape.tensors.keys()), sorted(shape.tensors.keys() - names)
        raise ValueError(
            f"the checkpoint holds another model than the run: it lacks {_some(missing)} of {type(model).__name__}, "
            f"and has {_some(extra)}, which {type(model).__name__} lacks"
        )
    modules = dict(model.named_modules())
    for name, handing in (shape.handed or {}).items():
        if not is_linear(modules.get(name, model)):
            raise ValueError(f"the checkpoint holds another model than the run: {name} is no linear in {type(model).__name__}")
        if handing.stored not in shape.tensors.get(f"{name}.weight", (handing.stored,)):
            raise ValueError(f"{name} is said to hand out heads of {handing.stored} stored outputs, which it does not store")


def _like(old: Tensor, size: tuple[int, ...]) -> Tensor:
    new = torch.empty(size, dtype=old.dtype, device=old.device)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _put(module: nn.Module, attr: str, new: Tensor) -> None:
    """Sets a tensor, and where it is the weight what the module keeps of its size."""
    size = tuple(getattr(module, attr).shape)
    for name, value in vars(module).items():
        if attr == "weight" and isinstance(value, tuple | list) and tuple(value) == size:
            setattr(module, name, type(value)(new.shape))
    setattr(module, attr, new)


def _numbers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for name, module in model.named_modules():
        if next(module.parameters(), None) is not None:
            for attr, value in vars(module).items():
                if _is_whole(attr, value) and not attr.startswith("_"):
                    yield f"{name}.{attr}", module, attr


def _fields(model: nn.Module) -> Fields:
    """Returns the fields of a model's config that are whole numbers or lists of plain values, except the names of its class."""
    config = getattr(model, "config", None)
    fields = fields_of(config).items() if isinstance(config, PretrainedConfig) else ()
    plain = {name: value for name, value in fields if _is_whole(name, value) or _is_plain_list(name, value)}
    return {name: value for name, value in plain.items() if name.rpartition(".")[2] != "architectures"}


def _blocks_then(model: nn.Module, shape: Shape) -> Iterator[tuple[nn.ModuleList, list[int]]]:
    """Yields the stacks that hold other blocks in a shape, and their numbers; by default all of them, or those there."""
    for name, stack in list(model.named_modules()):
        if not isinstance(stack, nn.ModuleList):
            continue
        now, first, prefix = block_numbers(stack), original_count(stack), f"{name}."
        blocks = {tensor.removeprefix(prefix).partition(".")[0] for tensor in shape.tensors if tensor.startswith(prefix)}
        before, then = shape.blocks.get(name, (first, range(first) if len(blocks) == first else now))
        if before != first:
            raise ValueError(
                f"the checkpoint holds another model than the run: {name} had {before} blocks at first, and has {first} in "
                f"{type(model).__name__}"
            )
        if list(then) != now:
            yield stack, list(then)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
