"""Loads models whose shape the config cannot express, from an entry in config.json."""

import json
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from math import prod
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from billhook.engine import LOADED
from billhook.model.complete import check_complete, check_shards, load_and_compare, load_complete, mismatch, refuse_gaps
from billhook.model.config_fields import build_or_refuse
from billhook.model.shape import GROUPS, KEY, VERSION, Shape, set_shape, shape_of, to_entry

LARGEST = 2**48  # largest number of values in a tensor: beyond any memory, but its bytes fit in 64 bits
Sizes = Mapping[str, tuple[int, ...]]
T = TypeVar("T")


def load_as(kind: type[PreTrainedModel], name: str, dtype: str | torch.dtype) -> PreTrainedModel:
    """Loads a checkpoint in a class, with the shape in its `"billhook"` entry, if any."""
    check_shards(name)
    if has_shape_entry(name):
        return load_shaped(kind, name, dtype)
    model, gaps = load_and_compare(kind, name, dtype=dtype)
    if gaps.mismatched and not gaps.missing:
        raise ValueError(
            f"'{name}': tensor sizes differ from its config, which has no \"{KEY}\" entry ({mismatch(model, gaps)}). "
            "Save the model again with bh.save."
        )
    check_complete(model, gaps, name)
    return model


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Converts loading errors to a ValueError that names the checkpoint."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises all kinds
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"'{name}' cannot be loaded: {type(error).__name__}: {first}") from error


def has_shape_entry(name: str) -> bool:
    """Returns whether the config of a checkpoint has a shape entry."""
    try:
        return PretrainedConfig.get_config_dict(name)[0].get(KEY) is not None
    except OSError:
        return False


def load_shaped(
    kind: type[PreTrainedModel], name: str, dtype: str | torch.dtype, attention: str | None = None, labels: int | None = None
) -> PreTrainedModel:
    """Loads a checkpoint with a shape entry in a class, also with another task head.

    Invalid entries, and entries that contradict the files or the class, raise before memory is used.
    """
    fields: dict[str, Any] = {} if labels is None else {"num_labels": labels}
    with _entry_errors(name):
        config = cast(type[PretrainedConfig], kind.config_class).from_pretrained(name, **fields)
        shape = _checked(kind, config, _from_entry(vars(config).pop(KEY, None)), _file_sizes(name))
    built = _with_tensors(kind, shape)
    options = {"use_safetensors": True, "attn_implementation": attention}
    model = load_complete(built, name, config=config, dtype=dtype, **options)
    setattr(model.config, KEY, to_entry(shape))
    return _finish(model, kind, shape)


def load_on_meta(
    kind: type[PreTrainedModel], name: str, sizes: Mapping[str, Tensor], dtype: str | torch.dtype
) -> PreTrainedModel:
    """Loads a checkpoint in a class on meta, with the tensor sizes of its files."""
    config = cast(type[PretrainedConfig], kind.config_class).from_pretrained(name)
    entry = vars(config).pop(KEY, None)
    shape = None
    quantization = vars(config).pop("quantization_config", None)  # with which transformers would build quantized layers
    if entry is not None:
        with _entry_errors(name):
            shape = _checked(kind, config, _from_entry(entry), {key: tuple(size.shape) for key, size in sizes.items()})
    options = {"state_dict": dict(sizes), "device_map": {"": "meta"}}
    model, gaps = load_and_compare(_with_tensors(kind, shape) if shape else kind, None, config=config, dtype=dtype, **options)
    refuse_gaps(model, gaps, name)
    if quantization is not None:
        model.config.quantization_config = quantization
    if shape is not None:
        setattr(model.config, KEY, to_entry(shape))
        _finish(model, kind, shape)
    return model


def _checked(kind: type[PreTrainedModel], config: PretrainedConfig, stated: Shape, files: Sizes) -> Shape:
    """Returns a shape named as in a class. Raises if files or class contradict it."""
    meta_model = build_or_refuse(kind, config)
    prefix = f"{meta_model.base_model_prefix}."

    def renamed(entries: Mapping[str, T], known: Container[str]) -> dict[str, T]:
        in_model = {}
        for key, entry in entries.items():
            names = key, prefix + key, key.removeprefix(prefix)  # with or without the prefix of the base model
            in_model[next((name for name in names if name in known), key)] = entry
        return in_model

    state = meta_model.state_dict()
    attributes = renamed(stated.attributes, _attributes(meta_model, shape_of(meta_model)))
    shape = Shape(renamed(stated.tensors, state), attributes, {})
    _check(meta_model, shape, renamed(files, state))
    return shape


def apply_entry(meta_model: PreTrainedModel, entry: object, name: str) -> None:
    """Gives a meta model the shape of a config entry, without reading files."""
    with _entry_errors(name):
        shape = _from_entry(entry)
        _check(meta_model, shape, None)
    _finish(meta_model, type(meta_model), shape)


@contextmanager
def _entry_errors(name: str) -> Iterator[None]:
    """Adds the checkpoint's name to errors of its config entry."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"'{name}': config.json says under \"{KEY}\" what cannot be loaded: {error}") from error


def build_shaped(
    kind: type[PreTrainedModel], config: PretrainedConfig, shape: Shape, state: dict[str, Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """Builds a model with weights in a shape that its config cannot express."""
    built = _with_tensors(kind, shape).from_pretrained(None, config=config, state_dict=state, dtype=dtype, use_kernels=False)
    return _finish(built, kind, shape)


def _with_tensors(kind: type[PreTrainedModel], shape: Shape) -> type[PreTrainedModel]:
    """Creates a single-use class whose models are built with other tensor sizes."""

    def build(self: PreTrainedModel, config: PretrainedConfig, *args: object, **options: object) -> None:
        kind.__init__(self, config, *args, **options)
        set_shape(self, Shape(shape.tensors, {}, {}).over(shape_of(self)))

    def initialize(self: PreTrainedModel) -> None:
        for module in self.modules():  # some classes count on their own sizes
            tensors = (*module.parameters(), *module.buffers())
            setattr(module, LOADED, getattr(module, LOADED, False) or all(getattr(tensor, LOADED, False) for tensor in tensors))
        kind.initialize_weights(self)  # type: ignore[no-untyped-call]

    methods = {"__init__": build, "initialize_weights": initialize}
    return type(kind.__name__, (kind,), methods | {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _finish(model: PreTrainedModel, kind: type[PreTrainedModel], shape: Shape) -> PreTrainedModel:
    """Sets attributes after initialization, and restores the class of a model."""
    model.__class__ = kind  # from_pretrained builds of a class: only a class can build otherwise for one call
    set_shape(model, Shape({}, shape.attributes, {}).over(shape_of(model)))
    return model


def _from_entry(entry: object) -> Shape:
    """Reads the shape in a config entry. Raises for invalid entries."""
    if not isinstance(entry, dict) or type(entry.get("version")) is not int or entry["version"] != VERSION:
        came = entry.get("version") if isinstance(entry, dict) else entry
        raise ValueError(f"the version is {str(came)[:80]!r}, and this billhook knows only {VERSION}")
    plain = entry.get("shape")
    shape = Shape.from_dict({**plain, "config": {}} if isinstance(plain, dict) else {})
    if empty := next((name for name, size in shape.tensors.items() if 0 in size), None):
        raise ValueError(f"shape.tensors: {empty[:200]} is {shape.tensors[empty]}, and must be a short list of numbers above 0")
    return Shape(shape.tensors, shape.attributes, {})


def _attributes(meta_model: PreTrainedModel, built: Shape) -> set[str]:
    """Returns the attributes that a shape may contain."""
    return built.attributes.keys() | {f"{name}.{GROUPS}" for name, _ in meta_model.named_modules()}


def _check(meta_model: PreTrainedModel, stated: Shape, files: Sizes | None) -> None:
    """Raises if a shape contradicts the class on meta tensors, or the files.

    A tensor may be in the files under a tied name, or unnamed if transformers converts it on loading. Unnamed tensors may be no
    larger than the remaining tensors in the files.
    """
    kind = type(meta_model).__name__
    state = meta_model.state_dict(keep_vars=True)
    built = shape_of(meta_model)
    for names, known in (stated.tensors, built.tensors), (stated.attributes, _attributes(meta_model, built)):
        for name in names:
            if name not in known:
                raise ValueError(f"{name[:200]} is named, and {kind} has nothing of that name")
    complete = built.tensors | stated.tensors
    in_files = files or {}
    tied = defaultdict(list)
    unnamed = {}
    sizes = defaultdict[int, set[tuple[int, ...]]](set)  # of a tensor, under all of its names
    for name, tensor in state.items():
        tied[id(tensor)].append(name)
        sizes[id(tensor)] |= {complete[name], in_files.get(name, complete[name])}
    for name, size in stated.tensors.items():
        identity = id(state[name])
        dims = len(built.tensors[name])
        if len(size) != dims:
            raise ValueError(f"{name} is said to be {size}, and {kind} has it with {dims} dimensions")
        if others := sizes[identity] - {size}:
            raise ValueError(f"{name} is said to be {size}, and is {others.pop()} in the files or where it is tied")
        if files is None and prod(size) > LARGEST:
            raise ValueError(f"{name} is said to be {size}, which no memory holds")
        if in_files.keys().isdisjoint(tied[identity]):
            unnamed[identity] = prod(size)
    if files is not None and sum(unnamed.values()) > sum(prod(size) for name, size in files.items() if name not in state):
        raise ValueError(f"{tied[next(iter(unnamed))][0]} is not in the files, nor anything that holds as many numbers")
    _check_attributes(stated, built)
    set_shape(meta_model, Shape(stated.tensors, {}, {}).over(built))
    if files is None:
        return
    requested = sum(map(Tensor.numel, chain(meta_model.parameters(), meta_model.buffers())))
    if requested > 10**8 + 10 * sum(map(prod, files.values())):
        raise ValueError(f"the config asks for {requested} numbers, far more than the files hold")


def _check_attributes(stated: Shape, built: Shape) -> None:
    """Raises for attributes larger than any related size."""
    largest: dict[str, int] = {}
    for name, size in (built.tensors | stated.tensors).items():
        owner = name
        while owner:
            owner = owner.rpartition(".")[0]
            largest[owner] = max(largest.get(owner, 1), *size, *built.tensors[name], 1)
    for name, value in stated.attributes.items():
        owner, _, attr = name.rpartition(".")
        usual = built.attributes.get(name)
        if isinstance(usual, bool) or isinstance(value, bool):
            if type(usual) is not type(value):
                legal = "true or false" if isinstance(usual, bool) else "a whole number"
                raise ValueError(f"shape.attributes: {name[:200]} is {value}, and must be {legal}")
            continue
        most = max(largest.get(owner, 1), usual or 1)
        if attr == GROUPS:  # there are no more of them than query heads
            width = stated.attributes.get(f"{owner}.head_dim", built.attributes.get(f"{owner}.head_dim", 1))
            most = max(most // max(width, 1), usual or 1)
        first = 0 if attr.endswith(("idx", "index")) else 1  # what is positive must stay positive, except indices
        least = first if usual is None or usual > 0 else usual
        if not least <= value <= most:
            raise ValueError(f"shape.attributes: {name[:200]} is {value}, and must be a whole number from {least:,} to {most:,}")


def _file_sizes(name: str) -> Sizes:
    """Reads tensor sizes from the headers of the files that from_pretrained reads."""
    try:
        try:
            files = [cast(str, cached_file(name, SAFE_WEIGHTS_NAME))]
        except OSError:
            files = get_checkpoint_shard_files(name, cached_file(name, SAFE_WEIGHTS_INDEX_NAME))[0]  # type: ignore[no-untyped-call]
        sizes = dict[str, tuple[int, ...]]()
        for file in files:
            with safe_open(file, "pt") as opened:
                sizes |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - no dict
        return sizes
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"the safetensors files cannot be read: {error}") from error
