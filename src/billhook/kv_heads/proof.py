"""Proof by execution that a small copy with fewer KV heads computes the same.

Code that views keys as `(batch, -1, heads, width)` runs at some lengths although it folds time into heads, so several are tried.
"""

import copy
import inspect
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine import full_precision
from billhook.kv_heads.config import check_kv_heads, choose, inside_encoder, is_as_built
from billhook.kv_heads.layout import KVAttentions, find_kv
from billhook.kv_heads.pooling import Pooled, Shrunk
from billhook.model import (
    FLAG,
    GROUPS,
    Change,
    Shape,
    attention_of,
    build_class,
    built_shape,
    change_values,
    fields_of,
    has_sdpa,
    make_inputs,
    outputs_match,
    run_outputs,
    set_shape,
    shape_beyond_config,
    shape_of,
    with_fields,
)

LAYERS = re.compile(r"(^|[_.])layers?$")
TOLERANCE = 1e-3
Inputs = dict[str, Any]


def cut_by_groups(model: PreTrainedModel, attentions: KVAttentions, chosen: Collection[str], heads: int) -> Shrunk:
    """Returns the new shapes of a model whose code reads any number of KV heads.

    Raises:
        ValueError: If a small copy does not compute the same.
    """
    refusal = f"the code of {type(model).__name__} cannot have fewer KV heads than query heads"
    refusal += ", except one" if hasattr(model.config, FLAG) else ""
    shrunk = _cut(model, attentions, chosen, heads)
    if shrunk is None:
        raise ValueError(refusal)
    kv_parameters = {model.get_parameter(name) for attention in attentions.values() for name in attention.rows}
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter in kv_parameters}
    as_built = is_as_built(model, built_shape(type(model), model.config), names)
    equal = len({(attentions[name].queries, attentions[name].heads) for name in chosen}) == 1
    small = small_copy(model, None if as_built else shape_beyond_config(model), few=equal)
    of_small = find_kv(small)
    some = choose(small, of_small, heads, None, encoder=bool(inside_encoder(model, chosen)))
    queries = of_small[some[0]].queries
    check_kv_heads(heads, of_small[some[0]].heads, queries)
    stated = attention_of(model.config)
    implementation = stated if stated in ("eager", "sdpa") else "sdpa"  # which run on any machine
    cut = _cut(small, of_small, some, heads)
    if cut is None or (why := find_difference(small, cut, queries // heads, implementation)) is None:
        return shrunk
    if implementation == "eager" and has_sdpa(type(small)) and find_difference(small, cut, queries // heads, "sdpa") is None:
        raise ValueError(
            f'{type(model).__name__} with attn_implementation="eager" cannot read {heads} KV heads, as that code repeats none. '
            'Set another one first: model.set_attn_implementation("sdpa")'
        )
    raise ValueError(f"{refusal} ({why})")


def small_copy(model: PreTrainedModel, shape: Shape | None, few: bool) -> PreTrainedModel:
    """Builds a small model of the class on the CPU, with random weights.

    Args:
        model: The model, which may be on the meta device.
        shape: Parts of its shape that its class does not build, if any.
        few: If True, two layers are enough.
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
            raise ValueError(
                f"{type(model).__name__} cannot be built from its config, so its conversion cannot be verified: {why}"
            )
        if shape is not None:
            now = shape_of(small)
            buffers = dict(model.named_buffers())
            tensors = {name: shape.tensors.get(name, size) for name, size in now.tensors.items()}
            set_shape(small, Shape(tensors, shape.attributes, {}).over(now))
            with torch.no_grad():
                for name, parameter in small.named_parameters():
                    if tensors.get(name) != now.tensors.get(name):
                        parameter.fill_(float(name.endswith("weight")))  # a new one holds whatever was in memory
            for name, buffer in small.named_buffers():
                if buffers.get(name, buffer).shape != buffer.shape:
                    raise ValueError(
                        f"{name} of {type(model).__name__} is of another size than its class makes it of the config, which lost "
                        "heads: convert the model after it is saved and loaded (bh.save, bh.load)"
                    )
        with torch.no_grad():
            for parameter in small.parameters():
                if parameter.ndim > 1 and parameter.numel():
                    parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
                else:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    small.train(False)
    return small


@full_precision()
def find_difference(dense: PreTrainedModel, shrunk: Shrunk, groups: int, implementation: str) -> str | None:
    """Returns the first case in which a converted model fails or differs."""
    parameters = {id(parameter): parameter for parameter in dense.parameters()}  # which both copies share
    reference = copy.deepcopy(dense, dict(parameters))
    converted = copy.deepcopy(dense, parameters)
    cuts, shape = shrunk
    pooled = {}
    spread = {}
    for name, cut in cuts.items():
        pooled[name] = Change(cut.pool, None)
        spread[name] = Change(lambda old, cut=cut: cut.spread(cut.pool(old)), None)  # type: ignore[misc]
    change_values(reference, spread)
    change_values(converted, pooled)
    set_shape(converted, shape)
    for model in (reference, converted):
        if attention_of(model.config) != implementation:
            model.set_attn_implementation(implementation)
    proved = False
    for case, run in _cases(dense, groups):
        try:
            expected = run(reference)
        except Exception:  # noqa: S112 - what the dense model cannot do is no case
            continue
        if not all(tensor.isfinite().any() for tensor in expected):
            continue
        try:
            outcome = run(converted)
        except Exception as error:  # whatever its code raises
            return f"{case}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if not outputs_match(expected, outcome, TOLERANCE):
            return f"{case}: another outcome"
        proved = True
    return None if proved else "there are no inputs with which the dense model runs"


def _cases(model: PreTrainedModel, groups: int) -> Iterator[tuple[str, Callable[[PreTrainedModel], list[Tensor]]]]:
    """Yields inputs of several lengths, with and without padding and KV cache."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2 * groups + 2
    parameters = inspect.signature(model.forward).parameters
    takes_mask = model.main_input_name == "input_ids" and "attention_mask" in parameters
    cache = next((name for name in ("cache", "past_key_values") if name in parameters and "use_cache" in parameters), None)
    lengths = [n for n in dict.fromkeys([2 * groups + 1, groups, 1, 2, 3]) if n <= longest]
    for number, length in enumerate(lengths):
        batch = 1 + number % 3
        other = lengths[-1 - number]
        inputs = _inputs(model, batch, length, other)
        case = f"{batch} x {length} tokens"
        yield case, partial(_outcome, inputs=inputs)
        if length == max(lengths) and takes_mask:
            several = _inputs(model, 3, length, other)
            for side, padded in (("left", 0), ("right", -1)):
                mask = torch.ones_like(several["input_ids"])
                if mask.shape[1] > 1:
                    mask[0, padded] = 0
                yield f"3 x {length} tokens, padded {side}", partial(_outcome, inputs=several | {"attention_mask": mask})
        if number < 2 and cache:
            yield f"{case}, cached", partial(_continued, inputs=inputs, cache=cache)


def _inputs(model: PreTrainedModel, batch: int, length: int, other: int) -> Inputs:
    """Returns inputs of a length; the encoder of an encoder-decoder gets another length."""
    inputs = make_inputs(model, batch, length)
    if "decoder_input_ids" in inputs and "input_ids" in inputs:
        inputs |= {"decoder_input_ids": inputs["input_ids"], "input_ids": make_inputs(model, batch, other)["input_ids"]}
    elif "decoder_input_ids" in inputs:
        ids = inputs["decoder_input_ids"]
        inputs["decoder_input_ids"] = ids.repeat(1, -(-length // ids.shape[1]))[:, :length]
    return inputs


def _outcome(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """Returns the outputs of a model at non-padding tokens."""
    mask = inputs.get("attention_mask")
    outputs = run_outputs(model, inputs)
    return [output if mask is None or output.shape[:2] != mask.shape else output[mask.bool()] for output in outputs]


@torch.no_grad()
def _continued(model: PreTrainedModel, inputs: Inputs, cache: str) -> list[Tensor]:
    """Returns the outputs for new tokens after a cached prefix."""
    output = model(**inputs | {"use_cache": True}, return_dict=True)
    ids = "input_ids"
    states = []
    encoder = {}
    if "decoder_input_ids" in inputs:
        ids = "decoder_input_ids"
        encoder = {"encoder_outputs": (output.encoder_last_hidden_state,)}
    for count in (1, 2):
        new = inputs[ids].repeat(1, 2)[:, -count:]
        output = model(**{ids: new, cache: output[cache], "use_cache": True}, **encoder, return_dict=True)
        states.append(output[0].double())
    return states


def _cut(model: PreTrainedModel, attentions: KVAttentions, chosen: Collection[str], heads: int) -> Shrunk | None:
    """Shrinks keys and values, and sets GROUPS; None without linear layers of their own."""
    cuts = {}
    attributes = {}
    for name in chosen:
        attention = attentions[name]
        for weight, rows in attention.rows.items():
            if rows.fused or not isinstance(model.get_submodule(weight.rpartition(".")[0]), nn.Linear):
                return None
            keys = rows.keys(attention.heads // heads)
            positions = {key: position for position, key in enumerate(dict.fromkeys(keys))}
            cuts[weight] = Pooled(rows.dim, tuple(positions[key] for key in keys))
        attributes[f"{attention.module}.{GROUPS}"] = attention.queries // heads
    shrinking = {model.get_parameter(name): cut for name, cut in cuts.items()}
    tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (cut := shrinking.get(parameter)) is None:
            continue
        size = tensors[name] = cut.size(parameter.shape)
        owner, _, attr = name.rpartition(".")
        if attr == "weight":
            attributes[f"{owner}.out_features"] = size[0]
    return cuts, Shape(tensors, attributes, {}).over(shape_of(model))
