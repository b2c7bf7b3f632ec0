"""Costs of a model: parameters, bytes, KV cache, and FLOPs, measured on meta tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from billhook.engine import tree_map_only
from billhook.model.cache import CachedShapes, cached
from billhook.model.inputs import make_inputs
from billhook.model.meta import to_meta
from billhook.model.transformers_internals import compute_every_expert

CONTEXT = 512
CANNOT_RUN = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, KeyError, IndexError, AssertionError)
"""Errors of code that depends on values, or on inputs other than token ids."""


@dataclass(frozen=True)
class Costs:
    """The costs of a model.

    Attributes:
        params: Number of parameters. Tied weights count once.
        bytes: Bytes of all parameters.
        kv_cache_bytes: Bytes that the KV cache grows by with each token, until sliding windows are full, in the weights'
            dtype. None without a KV cache.
        flops: FLOPs of the forward pass per token at `context` tokens, or per image. None if it does not run on meta.
        context: Number of tokens for `flops`. 0 for image models.
        dtype: The dtype of the weights and of the KV cache.
    """

    params: int
    bytes: int
    kv_cache_bytes: int | None
    flops: int | None
    context: int
    dtype: str = ""


def costs_of(model: PreTrainedModel) -> Costs:
    """Measures the costs of a model, which may be on meta."""
    context = min(CONTEXT, getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or CONTEXT)
    context = 0 if model.main_input_name == "pixel_values" else context
    flops = cached(partial(_flops_on_meta, model, context), model, "flops", context)
    return Costs(_params(model), _bytes(model), kv_cache_bytes(model), flops, context, str(model.dtype).removeprefix("torch."))


def cost_of(model: PreTrainedModel, name: str) -> int | None:
    """Measures a single cost, by its name in `Costs`."""
    if name == "kv_cache_bytes":
        return kv_cache_bytes(model)
    if name in ("params", "bytes"):
        return _params(model) if name == "params" else _bytes(model)
    cost: int | None = getattr(costs_of(model), name)
    return cost


def _params(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def kv_cache_bytes(model: PreTrainedModel) -> int | None:
    """Counts the bytes that the KV cache grows by per token. None without a KV cache.

    It is the growth by a second token: fixed-size states are excluded, and sliding windows included.
    """
    if model.main_input_name != "input_ids":
        return None
    grown = partial(_on_meta, model, lambda meta_model: _forward(meta_model, 2) - _forward(meta_model, 1) or None)
    return cached(grown, model, "kv_cache_bytes")


def _flops_on_meta(model: PreTrainedModel, context: int) -> int | None:
    """Counts FLOPs per token or per image. None if the model does not run on meta."""
    if context and model.main_input_name != "input_ids":
        return None

    def counted(meta_model: PreTrainedModel) -> int:
        with FlopCounterMode(display=False) as counter:
            if context:
                _forward(meta_model, context)
            else:
                inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), make_inputs(meta_model, batch=1))
                with torch.no_grad():
                    meta_model(**inputs)
        total: int = counter.get_total_flops()
        return total // max(context, 1)

    return _on_meta(model, counted)


def _on_meta(model: PreTrainedModel, measure: Callable[[PreTrainedModel], int | None]) -> int | None:
    """Measures a copy on meta. None if it does not run there."""
    try:
        meta_model = meta_copy(model)
        with CachedShapes():
            return measure(meta_model)
    except CANNOT_RUN:
        return None


def meta_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copies a model to meta for full runs, without padding and with all experts."""
    meta_model = to_meta(model)
    vars(meta_model.config)["pad_token_id"] = None  # code would search for padding; some classes cannot be set to None
    compute_every_expert(meta_model)
    for module in meta_model.modules():
        if vars(module).get("rope_type") == "longrope":  # transformers 5.16 compares the values of positions, which are not there
            module.rope_type = "default"  # type: ignore[assignment]
    return meta_model


@torch.no_grad()
def _forward(meta_model: PreTrainedModel, length: int) -> int:
    """Counts the bytes of the KV cache after some tokens. 0 without a KV cache."""
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    inputs: dict[str, Any] = {"input_ids": ids}
    if meta_model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
        # otherwise BART creates a mask and reads its values
        if "decoder_attention_mask" in signature(meta_model.forward).parameters:
            inputs["decoder_attention_mask"] = torch.zeros(1, 1, length, length, dtype=meta_model.dtype, device="meta")
    if hasattr(meta_model.config.get_text_config(decoder=True), "use_cache"):
        inputs["use_cache"] = True
    fields = dict(meta_model(**inputs).items())  # attribute access on an old name would log a deprecation
    cache = fields.get("cache", fields.get("past_key_values"))
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", [])  # without encoder states
    return sum({id(t): t.nbytes for layer in layers for t in vars(layer).values() if isinstance(t, Tensor)}.values())
