"""Fewer KV heads where no config states it: keys and values shrink and the attention counts on it, or linears hand out heads."""

from collections.abc import Collection, Mapping

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.kv_heads.layout import KV, QUERY, KVAttention, Rows
from billhook.kv_heads.pooling import Pooled, Shrunk
from billhook.model.linears import is_linear
from billhook.model.shapes.handed import Handing, handing_of, regular
from billhook.model.shapes.shape import GROUPS, Shape, shape_of


def cut_into_groups(
    model: PreTrainedModel, found: Mapping[str, KVAttention], chosen: Collection[str], heads: int
) -> Shrunk | None:
    """Shrinks keys and values and sets the number of query heads that share each, whether the code follows or not.

    None if keys and values are not made by linears of their own.
    """
    cuts, attributes = dict[str, Pooled](), dict[str, int]()
    for name in chosen:
        attention = found[name]
        for parameter, rows in attention.rows.items():
            module = model.get_submodule(parameter.rpartition(".")[0])
            if rows.fused or handing_of(module) is not None or not is_linear(module):
                return None
            keys = rows.keys(attention.heads // heads)
            order = {key: place for place, key in enumerate(dict.fromkeys(keys))}
            cuts[parameter] = Pooled(rows.dim, tuple(order[key] for key in keys))
        attributes[f"{attention.place}.{GROUPS}"] = attention.queries // heads
    tensors = _tensors(model, cuts)
    return cuts, Shape(tensors, attributes | _sizes(model, tensors), {}).over(shape_of(model))


def cut_into_handed(model: PreTrainedModel, found: Mapping[str, KVAttention], chosen: Collection[str], heads: int) -> Shrunk:
    """Lets the linears of keys and values store fewer heads and hand out as many as before.

    Refuses keys or values that are not made by a linear, or whose heads do not lie regularly.
    """
    cuts, shape = dict[str, Pooled](), shape_of(model)
    handed = dict(shape.handed or {})
    for name in chosen:
        for parameter, rows in found[name].rows.items():
            owner, _, attr = parameter.rpartition(".")
            module = model.get_submodule(owner)
            if not is_linear(module) or attr not in ("weight", "bias"):
                raise ValueError(f"{parameter} makes keys or values of {name}, and is not of a linear")
            before = handing_of(module)
            then = before.pooled(heads) if before is not None else _handing(parameter, rows, heads, found[name].heads)
            cuts[parameter] = Pooled(rows.dim, _index(before, then))
            handed[owner] = then
    tensors = _tensors(model, cuts)
    return cuts, Shape(tensors, _sizes(model, tensors), {}, handed=handed).over(shape)


def _handing(parameter: str, rows: Rows, heads: int, before: int) -> Handing:
    repeated = [bool(role & KV) for role in rows.role.tolist()]
    mixed = any(role & KV and role & QUERY or role == 0 for role in rows.role.tolist())
    uneven = (rows.head < 0).any() or any(
        len(set(np.bincount(rows.head[rows.role == role]).tolist())) > 1 for role in set(rows.role.tolist())
    )
    handing = None if mixed or uneven else regular(rows.keys(), repeated, heads)
    if handing is None:
        raise ValueError(f"{parameter} does not hold its heads one after the other, so that {before} cannot become {heads} in it")
    return handing


def _index(before: Handing | None, then: Handing) -> tuple[int, ...]:
    """Returns the new place of each stored output; both hand out as many."""
    given = then.index()
    stored = np.arange(then.given) if before is None else before.index()
    index = np.zeros(int(stored.max()) + 1, np.int64)
    index[stored] = given
    return tuple(index.tolist())


def _tensors(model: PreTrainedModel, cuts: Mapping[str, Pooled]) -> dict[str, tuple[int, ...]]:
    """Returns the new sizes of parameters that shrink, under all of their names."""
    own = {model.get_parameter(name): pooled for name, pooled in cuts.items()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: own[parameter].size(parameter.shape) for name, parameter in named if parameter in own}


def _sizes(model: PreTrainedModel, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Returns the attributes in which linears state how many outputs they store."""
    said = dict[str, int]()
    for name, size in tensors.items():
        owner, _, attr = name.rpartition(".")
        module = model.get_submodule(owner)
        if attr == "weight" and isinstance(module, Conv1D):
            said[f"{owner}.nf"] = size[1]
        elif attr == "weight" and isinstance(module, nn.Linear):
            said[f"{owner}.out_features"] = size[0]
    return said
