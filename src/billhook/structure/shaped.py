"""Models of a shape that their class does not build from their config: config.json says the difference, the files prove it."""

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from math import prod
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from billhook.structure.shape import KEY, Shape, build_class_on_meta, set_shape, shape_of

VERSION = 1
DIMENSIONS = 8  # more than any layer's weight has
Sizes = Mapping[str, tuple[int, ...]]


def to_entry(shape: Shape) -> dict[str, Any]:
    """What config.json says of a shape under `"billhook"`."""
    plain = shape.to_dict()
    return {"version": VERSION, "shape": {part: plain[part] for part in ("tensors", "attributes")}}


def load_as(kind: type[PreTrainedModel], name: str, dtype: str | torch.dtype) -> PreTrainedModel:
    """Loads a checkpoint in a class, of the shape that its config says under `"billhook"`, if it says one.

    Args:
        kind: The class.
        name: A folder or a hub name.
        dtype: The dtype of the weights, `"auto"` for the checkpoint's own.

    Raises:
        ValueError: Before memory is taken, if that entry is not what billhook writes, or not what the files hold.
    """
    entry = PretrainedConfig.get_config_dict(name)[0].get(KEY)
    if entry is None:
        plain: PreTrainedModel = kind.from_pretrained(name, dtype=dtype)
        return plain
    try:
        shape = _from_entry(entry)
        config = cast(type[PretrainedConfig], kind.config_class).from_pretrained(name)
        vars(config).pop(KEY, None)
        _check(_built(kind, config), shape, _file_sizes(name))
    except ValueError as error:
        raise ValueError(f"'{name}': config.json says under \"{KEY}\" what cannot be loaded: {error}") from error
    model: PreTrainedModel = _with_tensors(kind, shape).from_pretrained(name, config=config, dtype=dtype, use_safetensors=True)
    return _finish(model, kind, shape)


def build_shaped(
    kind: type[PreTrainedModel], config: PretrainedConfig, shape: Shape, state: dict[str, Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """A model of a shape that its class does not build from the config, with weights; its tensors take no more than those do."""
    model: PreTrainedModel = _with_tensors(kind, shape).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return _finish(model, kind, shape)


def _with_tensors(kind: type[PreTrainedModel], shape: Shape) -> type[PreTrainedModel]:
    """A class for one use, with the name that transformers looks things up by, whose models are built with other tensors."""

    def build(self: PreTrainedModel, config: PretrainedConfig, *args: object, **options: object) -> None:
        kind.__init__(self, config, *args, **options)
        set_shape(self, Shape(shape_of(self).tensors | shape.tensors, {}, {}))

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__, "__doc__": kind.__doc__})


def _finish(model: PreTrainedModel, kind: type[PreTrainedModel], shape: Shape) -> PreTrainedModel:
    """Sets the attributes, now that nothing is initialized by them any more, and gives the model back its class."""
    model.__class__ = kind
    set_shape(model, Shape(shape_of(model).tensors, shape.attributes, {}))
    return model


def _from_entry(entry: object) -> Shape:
    """The shape in an entry of config.json.

    Raises:
        ValueError: If it is not as `to_entry` makes it.
    """
    if not isinstance(entry, dict) or entry.get("version") != VERSION:
        came = entry.get("version") if isinstance(entry, dict) else entry
        raise ValueError(f"the version is {str(came)[:80]!r}, and {VERSION} is the one that this billhook knows")
    shape = entry.get("shape")
    parts = [shape.get(part) if isinstance(shape, dict) else None for part in ("tensors", "attributes")]
    for part, said in zip(("tensors", "attributes"), parts, strict=True):
        if not isinstance(said, dict):
            raise ValueError(f"shape.{part} is {str(said)[:80]!r}, and must be a mapping")
    tensors, attributes = cast(list[dict[str, Any]], parts)
    for name, size in tensors.items():
        if not isinstance(size, list) or len(size) > DIMENSIONS or not all(type(n) is int and n > 0 for n in size):
            raise ValueError(f"the size of {name[:200]} is {str(size)[:80]}, and must be a short list of whole numbers above 0")
    for name, value in attributes.items():
        if type(value) is not int or abs(value) >= 2**63:
            raise ValueError(f"{name[:200]} is {str(value)[:80]!r}, and must be a whole number of 64 bits")
    return Shape({name: tuple(size) for name, size in tensors.items()}, attributes, {})


def _built(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    try:
        return build_class_on_meta(kind, config)
    except (TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{kind.__name__} does not accept its config: {type(error).__name__}: {error}") from error


def _check(shadow: PreTrainedModel, said: Shape, held: Sizes) -> None:
    """Compares what is said with what the class builds, on meta tensors, and with what the files hold.

    A tensor may be in the files under the name of one that it is tied to, or, where transformers changes the format as it loads,
    under no name of the model's; all such together may be no larger than what is there under no name of the model's.

    Raises:
        ValueError: If they do not agree.
    """
    state, built = shadow.state_dict(keep_vars=True), shape_of(shadow)
    if unknown := next(iter([*(said.tensors.keys() - built.tensors), *(said.attributes.keys() - built.attributes)]), None):
        raise ValueError(f"{unknown[:200]} is named, and {type(shadow).__name__} has nothing of that name")
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    unnamed = dict[int, int]()
    for name, size in said.tensors.items():
        if len(size) != len(usual := built.tensors[name]):
            raise ValueError(f"{name} is said to be {size}, and {type(shadow).__name__} has it with {len(usual)} dimensions")
        tied = names[id(state[name])]
        known = {held[other] for other in tied if other in held}
        known |= {said.tensors.get(other, built.tensors[other]) for other in tied}
        if others := known - {size}:
            raise ValueError(f"{name} is said to be {size}, and is {others.pop()} in the files or where it is tied")
        if not any(other in held for other in tied):
            unnamed[id(state[name])] = prod(size)
    if sum(unnamed.values()) > _numbers(size for name, size in held.items() if name not in state):
        raise ValueError(f"{names[next(iter(unnamed))][0]} is not in the files, nor anything that holds as many numbers")
    set_shape(shadow, Shape(built.tensors | said.tensors, {}, {}))
    asked = sum(tensor.numel() for tensor in chain(shadow.parameters(), shadow.buffers()))
    if asked > 10**8 + 10 * _numbers(held.values()):
        raise ValueError(f"the config asks for {asked} numbers, far more than the files hold")


def _numbers(sizes: Iterable[tuple[int, ...]]) -> int:
    return sum(prod(size) for size in sizes)


def _file_sizes(name: str) -> Sizes:
    """The sizes in the headers of a checkpoint's safetensors files; the tensors are not read.

    Raises:
        ValueError: If it has no such files, or they cannot be read.
    """
    try:
        sizes = dict[str, tuple[int, ...]]()
        for file in _files(name):
            with safe_open(file, "pt") as opened:
                sizes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - no dict
        return sizes
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"the safetensors files cannot be read: {error}") from error


def _files(name: str) -> list[str]:
    """The files that from_pretrained reads."""
    try:
        return [cast(str, cached_file(name, SAFE_WEIGHTS_NAME))]
    except OSError:
        files = get_checkpoint_shard_files(name, cached_file(name, SAFE_WEIGHTS_INDEX_NAME))[0]  # type: ignore[no-untyped-call]
        return list(files)
