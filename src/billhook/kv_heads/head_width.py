"""Narrower heads, for a KV cache smaller than one head of the old width."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from billhook.engine.lazy import LazyTensors
from billhook.kv_heads.layout import find_projections
from billhook.kv_heads.pooling import Pooled, Shrunk
from billhook.model.config_fields import build_on_meta, nested_configs, text_config, with_fields
from billhook.model.rotary import RopeParameters
from billhook.model.shape import Shape, built_shape
from billhook.tracing.trace import trace

FIELD = "head_dim"


def narrowed(
    model: PreTrainedModel, layers: Collection[str], shrunk: Shrunk, keys: Sequence[int], rope: RopeParameters
) -> Shrunk:
    """Extends the changes for fewer KV heads to narrower heads.

    Args:
        model: The model.
        layers: Its attention modules, all of which become narrower.
        shrunk: The changes for fewer KV heads.
        keys: Positions of the dimensions of a query or key that stay. As many first dimensions of a value stay.
        rope: Rotary parameters for the new width.

    Raises:
        ValueError: If the model's class cannot be built with narrower heads.
    """
    cuts, shape = dict(shrunk[0]), shrunk[1]
    built = built_shape(type(model), _config(model, shape, len(keys), rope))
    tensors, parameters = dict(shape.tensors), dict(model.named_parameters(remove_duplicate=False))
    for name, (dim, dropped) in _dropped(model, layers, keys).items():
        if (parameter := parameters.get(name)) is not None:  # linear layers may have no bias
            cuts[name] = _cut(parameter.shape[dim], dim, dropped, cuts.get(name))
            tensors[name] = cuts[name].size(parameter.shape)
    if different := sorted(name for name, size in tensors.items() if built.tensors.get(name) != size):
        name = different[0]
        raise ValueError(
            f"head_dim={len(keys)}: {type(model).__name__} builds {name} with size {list(built.tensors.get(name, ()))}, and "
            f"narrower heads need {list(tensors[name])}"
        )
    attributes = {name: built.attributes.get(name, value) for name, value in shape.attributes.items()}
    config = shape.config | {_field(model): len(keys)}
    return cuts, Shape(tensors, attributes, config, rope=dict(rope)).over(shape)


def _field(model: PreTrainedModel) -> str:
    """Returns the config field with the width of a head."""
    text = text_config(model.config)
    for prefix, config in nested_configs(model.config):
        if config is text and type(vars(config).get(FIELD)) is int:
            return f"{prefix}{FIELD}"
    raise ValueError(f"head_dim: {type(text).__name__} has no field head_dim, which would state the width of a head")


def _config(model: PreTrainedModel, shape: Shape, width: int, rope: RopeParameters) -> PretrainedConfig:
    config = with_fields(model.config, shape.config | {_field(model): width})
    text: Any = text_config(config)
    text.rope_parameters = copy.deepcopy(dict(rope))
    return config


def _dropped(model: PreTrainedModel, layers: Collection[str], keys: Sequence[int]) -> dict[str, tuple[int, set[int]]]:
    """Returns the positions that go, by parameter, and their dimension."""
    dropped: dict[str, tuple[int, set[int]]] = {}
    kept = {"q": list(keys), "k": list(keys), "v": list(range(len(keys))), "o": list(range(len(keys)))}
    for attention in find_projections(model, trace(model), layers).values():
        for kind, rows in attention.kinds.items():
            positions = np.delete(rows.index, kept[kind], axis=1).flatten().tolist()
            for part in ("weight",) if rows.are_read else ("weight", "bias"):
                dropped.setdefault(f"{rows.linear}.{part}", (int(rows.are_read), set()))[1].update(positions)
    return dropped


def _cut(size: int, dim: int, dropped: set[int], pooled: Pooled | None) -> Pooled:
    """Returns the pooling of a parameter that drops some positions."""
    labels = np.arange(size) if pooled is None else np.asarray(pooled.index)
    kept = np.array([position not in dropped for position in range(size)])
    index = np.full(size, -1)
    index[kept] = np.unique(labels[kept], return_inverse=True)[1]
    return Pooled(dim, tuple(index.tolist()))


def scaled_queries(model: PreTrainedModel, layers: Collection[str], shape: Shape, values: Mapping[str, Tensor]) -> LazyTensors:
    """Returns values with queries that keep their scores in narrower heads.

    Args:
        model: The model.
        layers: Its attention modules.
        shape: Its shape with narrower heads.
        values: Values of parameters in the old sizes, with those that make queries.

    Raises:
        ValueError: If the attention modules do not state their scale.
    """
    after = build_on_meta(model, _config(model, shape, shape.config[_field(model)], shape.rope))
    name = next(iter(layers))
    old, new = (getattr(each.get_submodule(name), "scaling", None) for each in (model, after))
    if not isinstance(old, float) or not isinstance(new, float):
        raise ValueError(f"head_dim: {name} has no attribute scaling, which would state the scale of its scores")
    rows = dict[str, Tensor]()
    for attention in find_projections(model, trace(model), layers).values():
        index = torch.from_numpy(attention.q.index.flatten())
        rows |= {f"{attention.q.linear}.{part}": index for part in ("weight", "bias")}

    def scaled(name: str, read: Callable[[], Tensor]) -> Tensor:
        value = read()
        if name in rows:
            value = value.clone()
            value[rows[name]] *= old / new
        return value

    return LazyTensors.of(values).map(scaled)
