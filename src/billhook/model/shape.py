"""The shape of a model: tensor sizes, blocks, and related numbers.

A checkpoint contains it, so a model can adopt the shape before the weights are loaded.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import Self

from billhook.display import some
from billhook.model.cache import cached
from billhook.model.config_fields import Fields, build_class_on_meta, fields_of, read_back, set_fields
from billhook.model.constants import OF_INPUTS, Numbers, derived_constants, set_constants
from billhook.model.rotary import are_rope_parameters, rope_parameters, set_rope_parameters
from billhook.model.surgery import restored_on_error

_REMOVED = "_billhook_removed"  # on a module list: removed blocks without weights, by original number


def block_numbers(stack: nn.ModuleList) -> list[int]:
    """Returns the original numbers of the blocks in a stack."""
    return [number for number in range(original_count(stack)) if number not in _removed_from(stack)]


def original_count(stack: nn.ModuleList) -> int:
    """Returns the original number of blocks in a stack."""
    return len(stack) + len(_removed_from(stack))


def removed_blocks(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns stacks that have lost blocks, with the original count and remaining numbers."""
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {name: (original_count(stack), tuple(block_numbers(stack))) for name, stack in stacks.items() if _removed_from(stack)}


def keep_blocks(stack: nn.ModuleList, numbers: Sequence[int]) -> None:
    """Keeps the blocks with these original numbers. Removed blocks return without weights."""
    blocks = dict(zip(block_numbers(stack), stack, strict=True))
    removed = dict(_removed_from(stack))
    tensor = next(stack.parameters(), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    back = {}
    for number in numbers:
        if number not in blocks:
            if (block := removed.pop(number)) is None:
                raise ValueError(f"block {number} was removed and cannot be restored. Load the checkpoint into a new model.")
            back[number] = _copied(block, device)
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


def _copied(block: nn.Module, device: torch.device) -> nn.Module:
    """Copies a block, but not its configs, with uninitialized parameters on a device."""
    memo: dict[int, Any] = {}
    for module in block.modules():
        memo |= {id(config): config for config in vars(module).values() if isinstance(config, PretrainedConfig)}
    for parameter in block.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
    return copy.deepcopy(block, memo)


T = TypeVar("T")
KEY = "billhook"  # key of the shape in Lightning checkpoints, and of the shape beyond the config in config.json
VERSION = 1  # version of a shape entry
GROUPS = "num_key_value_groups"  # attribute of attention modules for the number of query heads per KV head
FLAG = "multi_query"  # config field and attribute of some families for multi-query attention, the only flag in a shape
DIMENSIONS = 8  # more than any weight has


@dataclass(frozen=True)
class Shape:
    """Sizes of tensors by name, and integers by `module.attribute` and config field.

    Attributes:
        tensors: Sizes of the tensors in `state_dict`.
        attributes: Integer attributes of modules with parameters.
        config: Integer fields of the config, with dots for nested configs.
        lists: Config fields that are lists of plain values, such as one value per block.
        blocks: Original count and remaining numbers of blocks, by module list that has lost blocks.
        rope: Rotary parameters of the text config, for all layers. Empty if unknown.
    """

    tensors: dict[str, tuple[int, ...]]
    attributes: dict[str, int]
    config: dict[str, int]
    lists: dict[str, list[Any]] = field(default_factory=dict)
    blocks: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    rope: dict[str, Any] = field(default_factory=dict)

    def over(self, other: "Shape") -> "Shape":
        """Returns a complete shape with the values of this shape over another."""
        parts = {part: vars(other)[part] | stated for part, stated in vars(self).items() if part != "rope"}
        return Shape(**parts, rope=self.rope or other.rope)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data, for any checkpoint format."""
        return {
            "tensors": {name: list(size) for name, size in self.tensors.items()},
            "attributes": dict(self.attributes),
            "config": dict(self.config),
            "lists": {name: list(values) for name, values in self.lists.items()},
            "blocks": {name: [first, list(numbers)] for name, (first, numbers) in self.blocks.items()},
            "rope": copy.deepcopy(self.rope),
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        """Creates a shape from `to_dict`, or from the entry in config.json."""
        check_plain_shape(plain)
        return cls(
            {name: tuple(size) for name, size in plain["tensors"].items()},
            dict(plain["attributes"]),
            dict(plain["config"]),
            dict(plain.get("lists", {})),
            {name: (first, tuple(numbers)) for name, (first, numbers) in plain.get("blocks", {}).items()},
            copy.deepcopy(plain.get("rope", {})),
        )


def check_plain_shape(plain: object) -> None:
    """Raises for data that `Shape.to_dict` does not create."""
    parts = {
        "tensors": (_is_size, "a short list of integers"),
        "attributes": (_is_whole, "a 64-bit integer"),
        "config": (_is_whole, "a 64-bit integer"),
        "lists": (_is_plain_list, "a list of plain values"),
        "blocks": (_are_blocks, "a number of blocks and the remaining numbers, ascending"),
    }
    for part, (holds, legal) in parts.items():
        stated = plain.get(part, {} if part in ("lists", "blocks") else None) if isinstance(plain, Mapping) else None
        if not isinstance(stated, Mapping):
            raise ValueError(f"shape.{part} is {str(stated)[:80]!r}, but must be a mapping.")
        for name, value in stated.items():
            if not isinstance(name, str) or not holds(name, value):
                raise ValueError(f"shape.{part}: {str(name)[:200]} is {str(value)[:80]!r}, but must be {legal}.")
    rope = plain.get("rope", {}) if isinstance(plain, Mapping) else {}
    if not isinstance(rope, dict) or (rope and not are_rope_parameters(rope)):
        raise ValueError(f"shape.rope is {str(rope)[:80]!r}, but must be the rope_parameters of a config.")


def _is_size(_: str, size: object) -> bool:
    return isinstance(size, list | tuple) and len(size) <= DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in size)


def _is_whole(name: str, stated: object) -> bool:
    """Returns whether a value is an integer or flag that a shape can contain."""
    return (type(stated) is int and abs(stated) < 2**63) or (type(stated) is bool and name.rpartition(".")[2] == FLAG)


def _is_plain_list(_: str, stated: object) -> bool:
    return isinstance(stated, list) and all(value is None or isinstance(value, bool | int | float | str) for value in stated)


def _are_blocks(_: str, stated: object) -> bool:
    if not isinstance(stated, list) or len(stated) != 2 or type(stated[0]) is not int or not isinstance(stated[1], list | tuple):
        return False
    first, numbers = stated
    return all(type(n) is int and 0 <= n < first for n in numbers) and list(numbers) == sorted(set(numbers))


def shape_of(model: nn.Module) -> Shape:
    """Returns the current shape of a model."""
    state = model.state_dict(keep_vars=True)
    if packed := next((name for name, value in state.items() if not isinstance(value, Tensor)), None):
        raise ValueError(
            f"model: {packed} is a {type(state[packed]).__name__}, not a tensor, as in layers quantized by torch.ao. Change the "
            "model before it is quantized."
        )
    sizes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shape = Shape(sizes, {}, {}, blocks=removed_blocks(model), rope=rope_parameters(model))
    for name, module, attr in _numbers(model):
        shape.attributes[name] = getattr(module, attr)
    for name, value in _fields(model).items():
        if isinstance(value, list):
            shape.lists[name] = list(value)
        else:
            shape.config[name] = value
    return shape


def built_shape(kind: type[PreTrainedModel], config: PretrainedConfig) -> Shape:
    """Returns the shape that a class builds from a config as loaded from a checkpoint."""

    def built() -> Shape:
        try:
            read = read_back(config)
        except Exception:  # whatever a class of configs raises
            read = copy.deepcopy(config)
        return shape_of(build_class_on_meta(kind, read))

    return cached(built, (kind, config), "shape")


def shape_beyond_config(model: PreTrainedModel, now: Shape | None = None) -> Shape:
    """Returns the part of a model's shape that its config cannot express.

    Attributes alone may differ, such as after a config field was changed. Adapters are ignored. `now` is the current shape, if
    known.
    """
    now = now or shape_of(model)
    built = built_shape(type(model), model.config)
    sizes = _bare(now.tensors)
    numbers = _bare(now.attributes)
    tensors = {name: size for name, size in sizes.items() if built.tensors.get(name, size) != size}
    attributes = {
        name: value
        for name, value in numbers.items()
        if built.attributes.get(name, None if name.endswith(f".{GROUPS}") else value) != value
    }
    return Shape(tensors, attributes, {})


def _bare(stated: Mapping[str, T]) -> dict[str, T]:
    """Removes adapters from names."""
    return {name.replace(".base_layer.", ".").removesuffix(".base_layer"): value for name, value in stated.items()}


def to_entry(shape: Shape) -> dict[str, Any]:
    """Returns the config entry (`KEY`) of a shape."""
    plain = shape.to_dict()
    return {"version": VERSION, "shape": {part: plain[part] for part in ("tensors", "attributes")}}


def record_shape(model: nn.Module) -> None:
    """Records the shape beyond the config in a model's config, for saving."""
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
    """Gives a model another shape. Resized tensors are uninitialized until weights are loaded.

    Related module attributes are updated, such as `normalized_shape` of `LayerNorm`. Blocks are removed or restored to match, and
    so are attributes of fewer KV heads.

    Raises:
        ValueError: If the shape belongs to a model with other tensors.
    """
    with restored_on_error(model):
        for name, stack in list(model.named_modules()):
            if not isinstance(stack, nn.ModuleList):
                continue
            current = block_numbers(stack)
            first = original_count(stack)
            prefix = f"{name}."
            blocks = {tensor.removeprefix(prefix).partition(".")[0] for tensor in shape.tensors if tensor.startswith(prefix)}
            stated, required = shape.blocks.get(name, (first, range(first) if len(blocks) == first else current))
            if stated != first:
                raise ValueError(
                    f"the checkpoint contains a different model: {name} had {stated} blocks originally, but {first} in "
                    f"{type(model).__name__}"
                )
            if list(required) != current:
                keep_blocks(stack, list(required))
        names = model.state_dict().keys()
        if names != shape.tensors.keys():
            missing = sorted(names - shape.tensors.keys())
            extra = sorted(shape.tensors.keys() - names)
            raise ValueError(
                f"the checkpoint contains a different model: it lacks {some(missing, 3) or 'nothing'} of {type(model).__name__}, "
                f"and has {some(extra, 3) or 'nothing'}, which {type(model).__name__} lacks"
            )
    renewed = {}  # tied parameters stay tied
    for name, old in model.state_dict(keep_vars=True).items():
        if tuple(old.shape) != shape.tensors[name]:
            if id(old) not in renewed:
                new = torch.empty(shape.tensors[name], dtype=old.dtype, device=old.device)
                renewed[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            owner, _, attr = name.rpartition(".")
            _put(model.get_submodule(owner), attr, renewed[id(old)])
    for name, module in model.named_modules():  # sets the number of query heads per KV head where the class does not
        groups = shape.attributes.get(f"{name}.{GROUPS}")
        if groups is not None:
            setattr(module, GROUPS, groups)
        elif type(vars(module).get(GROUPS)) is int and next(module.parameters(), None) is not None:
            delattr(module, GROUPS)
    for name, module, attr in list(_numbers(model)):
        setattr(module, attr, shape.attributes.get(name, getattr(module, attr)))
    new_fields = shape.config | shape.lists
    rope = shape.rope and shape.rope != rope_parameters(model)
    changed = {name: new_fields[name] for name, value in _fields(model).items() if new_fields.get(name, value) != value}
    if changed or rope:
        before = copy.deepcopy(model.config)
        set_fields(cast(PretrainedConfig, model.config), changed)
        if rope:  # after the width of a head, which says how many frequencies there are
            set_rope_parameters(model, shape.rope)
        if isinstance(model, PreTrainedModel):
            set_constants(model, changed_constants(model, cast(PretrainedConfig, before)))


def changed_constants(model: PreTrainedModel, before: PretrainedConfig) -> Numbers:
    """Returns numbers that a model derives differently from its config than before."""
    return {} if shape_beyond_config(model).tensors else derived_constants(model, before)


def _put(module: nn.Module, attr: str, new: Tensor) -> None:
    """Assigns a tensor, and updates size attributes for a weight."""
    size = tuple(getattr(module, attr).shape)
    for name, value in vars(module).items():
        if attr == "weight" and isinstance(value, tuple | list) and tuple(value) == size:
            setattr(module, name, type(value)(new.shape))
    setattr(module, attr, new)


def _numbers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for name, module in model.named_modules():
        if next(module.parameters(), None) is not None:
            for attr, value in vars(module).items():
                if _is_whole(attr, value) and not attr.startswith("_") and not any(part in attr for part in OF_INPUTS):
                    yield f"{name}.{attr}", module, attr


def _fields(model: nn.Module) -> Fields:
    """Returns integer and list fields of a config, except class names."""
    config = getattr(model, "config", None)
    fields = fields_of(config).items() if isinstance(config, PretrainedConfig) else ()
    plain = {name: value for name, value in fields if _is_whole(name, value) or _is_plain_list(name, value)}
    return {name: value for name, value in plain.items() if name.rpartition(".")[2] != "architectures"}
