"""Proof by running: a small copy with fewer KV heads computes what the dense class does with heads pooled and repeated.

Code that views keys as `(batch, -1, heads, width)` runs at some lengths although it folds time into heads, so several are tried.
"""

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.engine.state import precisely
from billhook.engine.trees import tree_leaves
from billhook.kv_heads.config import check_kv_heads, choose, inside_encoder, is_as_built
from billhook.kv_heads.layout import KV, QUERY, KVAttention, Rows, find_kv
from billhook.kv_heads.pooling import Pooled, Shrunk
from billhook.model.config_fields import fields_of, with_fields
from billhook.model.handed import Handing, handing_of, regular
from billhook.model.inputs import alike, make_inputs
from billhook.model.linears import is_linear
from billhook.model.shape import GROUPS, Shape, built_shape, set_shape, shape_of, unbuilt_shape
from billhook.model.surgery import Change, change_values
from billhook.model.transformers_internals import attention_of, build_class, has_sdpa
from billhook.units.fields import LAYERS

TOLERANCE = 1e-3
KVWay = Literal["config", "groups", "handed"]
Inputs = dict[str, Any]


def prove(model: PreTrainedModel, found: Mapping[str, KVAttention], chosen: Collection[str], heads: int) -> tuple[KVWay, Shrunk]:
    """Finds the way that a small copy of the model shows to be right."""
    rows = {name for one in found.values() for name in one.rows}
    usual = built_shape(type(model), model.config)
    alike = len({(found[name].queries, found[name].heads) for name in chosen}) == 1
    as_built = is_as_built(model, usual, _every_name(model, rows))
    small = small_copy(model, None if as_built else unbuilt_shape(model), few=alike)
    attentions = find_kv(small)
    own = choose(small, attentions, heads, None, encoder=bool(inside_encoder(model, found) & set(chosen)))
    before, queries = attentions[own[0]].heads, attentions[own[0]].queries
    check_kv_heads(heads, before, queries)
    stated = attention_of(model.config)
    implementation = stated if stated in ("eager", "sdpa") else "sdpa"  # which run on any machine
    apart = cut_into_groups(model, found, chosen, heads)
    if apart is not None and (trial := cut_into_groups(small, attentions, own, heads)) is not None:
        if find_difference(small, trial, queries // heads, implementation) is None:
            return "groups", apart
        if (
            implementation == "eager"
            and has_sdpa(type(small))
            and find_difference(small, trial, queries // heads, "sdpa") is None
        ):
            raise ValueError(
                f'{type(model).__name__} with attn_implementation="eager" cannot read {heads} KV heads, as that code repeats '
                'none. Set another one first: model.set_attn_implementation("sdpa")'
            )
    handed = cut_into_handed(model, found, chosen, heads)
    why = find_difference(small, cut_into_handed(small, attentions, own, heads), queries // heads, implementation)
    if why is not None:
        raise ValueError(f"{type(model).__name__} cannot be converted: its code does not follow with {heads} KV heads ({why})")
    return "handed", handed


def _every_name(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Returns parameters under all of their names."""
    own = {id(model.get_parameter(name)) for name in names}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own}


def small_copy(model: PreTrainedModel, shape: Shape | None = None, few: bool = True) -> PreTrainedModel:
    """Builds a model of the class from the config, on the CPU, with random weights that make every part count.

    Args:
        model: The model, which may stand on meta tensors.
        shape: What of its shape its class does not build, if anything.
        few: Whether few layers are enough.
    """
    fields = fields_of(model.config)
    two = {name: 2 for name, value in fields.items() if few and LAYERS.search(name) and type(value) is int and value > 2}
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for config in (with_fields(model.config, two), with_fields(model.config, {})):
            try:
                small = build_class(type(model), config, torch.float32)
                break
            except Exception as error:  # whatever a class of models raises
                why = error
        else:
            raise ValueError(f"{type(model).__name__} cannot be built from its config, so nothing can be proved of it: {why}")
        if shape is not None:
            _take_shape(small, model, shape)
        with torch.no_grad():
            for parameter in small.parameters():
                if parameter.ndim > 1 and parameter.numel():
                    parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
                else:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    small.train(False)
    return small


def _take_shape(small: PreTrainedModel, model: PreTrainedModel, shape: Shape) -> None:
    """Gives a copy with fewer layers what a model's shape says of those; refuses buffers that no checkpoint of a shape brings."""
    own, buffers = shape_of(small), dict(model.named_buffers())
    tensors = {name: shape.tensors.get(name, size) for name, size in own.tensors.items()}
    handed = {name: one for name, one in (shape.handed or {}).items() if f"{name}.weight" in tensors}
    set_shape(small, Shape(tensors, shape.attributes, {}, handed=handed).over(own))
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if tensors.get(name, own.tensors.get(name)) != own.tensors.get(name):
                parameter.fill_(float(name.endswith("weight")))  # a new one holds whatever was in memory
    for name, buffer in small.named_buffers():
        if buffers.get(name, buffer).shape != buffer.shape:
            raise ValueError(
                f"{name} of {type(model).__name__} is of another size than its class makes it of the config, which lost heads: "
                "convert the model after it is saved and loaded (bh.save, bh.load)"
            )


@precisely()
def find_difference(dense: PreTrainedModel, shrunk: Shrunk, groups: int, implementation: str) -> str | None:
    """Finds the first case in which a small model with 1 of `groups` KV heads fails or differs from one with heads pooled."""
    reference, converted = (copy.deepcopy(dense, {id(one): one for one in dense.parameters()}) for _ in range(2))
    pooled, shape = shrunk
    change_values(reference, {n: Change(lambda old, p=p: p.spread(p.pool(old)), None) for n, p in pooled.items()})  # type: ignore[misc]
    change_values(converted, {n: Change(p.pool, None) for n, p in pooled.items()})
    set_shape(converted, shape)
    for model in (reference, converted):
        if attention_of(model.config) != implementation:
            model.set_attn_implementation(implementation)
    proved = 0
    for case, run in _cases(dense, groups):
        try:
            expected = run(reference)
        except Exception:  # noqa: S112 - what the dense model cannot do is no case
            continue
        if not all(one.isfinite().any() for one in expected):
            continue
        try:
            found = run(converted)
        except Exception as error:  # whatever its code raises
            return f"{case}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if not alike(expected, found, TOLERANCE):
            return f"{case}: another outcome"
        proved += 1
    return None if proved else "there are no inputs with which the dense model runs"


def _cases(model: PreTrainedModel, groups: int) -> Iterator[tuple[str, Callable[[PreTrainedModel], list[Tensor]]]]:
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2 * groups + 2
    takes_mask = model.main_input_name == "input_ids" and "attention_mask" in inspect.signature(model.forward).parameters
    lengths = [n for n in dict.fromkeys([2 * groups + 1, groups, 1, 2, 3]) if n <= longest]
    for place, length in enumerate(lengths):
        batch, other = 1 + place % 3, lengths[-1 - place]
        inputs = _inputs(model, batch, length, other)
        yield f"{batch} x {length} tokens", lambda own, given=inputs: _outcome(own, given)  # type: ignore[misc]
        if length == max(lengths) and takes_mask:
            masked = _inputs(model, 3, length, other)
            for side in ("left", "right"):
                given = masked | {"attention_mask": _mask(masked["input_ids"], side)}
                yield f"3 x {length} tokens, padded {side}", lambda own, given=given: _outcome(own, given)  # type: ignore[misc]
        if place < 2 and (cache := _cache(model)):
            yield f"{batch} x {length} tokens, cached", lambda own, given=inputs, name=cache: _continued(own, given, name)  # type: ignore[misc]


def _inputs(model: PreTrainedModel, batch: int, length: int, other: int) -> Inputs:
    """Makes inputs of a length; of an encoder-decoder the encoder's have another one."""
    inputs = make_inputs(model, batch, length)
    if "decoder_input_ids" in inputs and "input_ids" in inputs:
        inputs |= {"decoder_input_ids": inputs["input_ids"], "input_ids": make_inputs(model, batch, other)["input_ids"]}
    elif "decoder_input_ids" in inputs:
        ids = inputs["decoder_input_ids"]
        inputs["decoder_input_ids"] = ids.repeat(1, -(-length // ids.shape[1]))[:, :length]
    return inputs


def _mask(ids: Tensor, side: str) -> Tensor:
    mask = torch.ones_like(ids)
    if ids.shape[1] > 1:
        mask[0, 0 if side == "left" else -1] = 0
    return mask


@torch.no_grad()
def _outcome(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """Returns what a model gives, where it is not padded."""
    fields = dict(model(**inputs, return_dict=True).items())
    given = [one for name, one in fields.items() if name not in ("past_key_values", "cache", "loss") for one in tree_leaves(one)]
    mask = inputs.get("attention_mask")
    tensors = [one.double() for one in given if isinstance(one, Tensor) and one.is_floating_point()]
    return [one[mask.bool()] if mask is not None and one.shape[:2] == mask.shape else one for one in tensors]


def _cache(model: PreTrainedModel) -> str | None:
    """Returns the name of the forward's argument for the key/value cache."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken and "use_cache" in taken), None)


@torch.no_grad()
def _continued(model: PreTrainedModel, inputs: Inputs, cache: str) -> list[Tensor]:
    """Returns what a model gives for a token, and for two, that follow what it has in its cache."""
    told = model(**inputs | {"use_cache": True}, return_dict=True)
    ids, given = ("decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"), list[Tensor]()
    memory = {"encoder_outputs": (told.encoder_last_hidden_state,)} if "decoder_input_ids" in inputs else {}
    for count in (1, 2):
        new = inputs[ids].repeat(1, 2)[:, -count:]
        told = model(**{ids: new, cache: told[cache], "use_cache": True}, **memory, return_dict=True)
        given.append(told[0].double())
    return given


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
