"""Which parameters of a model train: all, those of its attention, or those of some names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from billhook.engine.store import store_of
from billhook.model.find import find_transformer
from billhook.tracing.axes import leaves
from billhook.tracing.coupling import Structure
from billhook.tracing.groups import innermost
from billhook.tracing.roles import Attention
from billhook.tracing.trace import trace

Trainable = Literal["all", "attention"] | list[str]
"""All parameters, those of attention, or those whose names match one of some glob patterns."""


def check_trainable(trainable: Trainable, model: object) -> None:
    """Refuses a value that is legal for no model, and a model that is streamed, of which nothing trains."""
    if isinstance(model, nn.Module) and not store_of(model).trains:
        raise ValueError("model: it is streamed, and training needs all weights in memory: load it with bh.load")
    patterns = isinstance(trainable, Sequence) and not isinstance(trainable, str) and all(isinstance(p, str) for p in trainable)
    if trainable not in ("all", "attention") and not (patterns and trainable):
        raise ValueError(f"trainable={trainable!r} must be 'all', 'attention' or patterns of names, as in ['*.k_proj.*']")


def freeze_others(model: PreTrainedModel, trainable: Trainable, classifies: bool = False) -> None:
    """Freezes all other parameters, in place; parameters that were frozen before stay so, and with `"all"` nothing changes.

    A tied parameter trains if one of its names matches. What `classifies` has outside of the base model is a head that may be
    new, and so trains with attention. A refusal leaves the model as it was.
    """
    if trainable == "all":
        return
    parameters = list(model.named_parameters(remove_duplicate=False))
    if trainable == "attention":
        names = set(attention_parameters(model))
        base = {id(parameter) for parameter in model.base_model.parameters()} if classifies else {id(p) for _, p in parameters}
        chosen = {id(parameter) for name, parameter in parameters if name in names or id(parameter) not in base}
    else:
        for pattern in trainable:
            if not any(fnmatchcase(name, pattern) for name, _ in parameters):
                shown = [name for name, _ in parameters[:3]]
                raise ValueError(f"trainable={pattern!r} matches none of the {len(parameters)} parameters, such as {shown}")
        chosen = {id(parameter) for name, parameter in parameters if any(fnmatchcase(name, p) for p in trainable)}
    for _, parameter in parameters:
        if id(parameter) not in chosen:
            parameter.requires_grad_(False)


def attention_parameters(model: nn.Module, structure: Structure | None = None) -> list[str]:
    """Finds the parameters of all attentions of a model: projections, their biases, norms and position biases within.

    An attention is the innermost module that holds the projections of queries, keys, values and output, as `trace` finds them by
    the model's operations, not by names; modules that compute the same as attention count too (state-space layers of Mamba-2).
    If that module holds a feed-forward too, only projections and parameters with heads, or dimensions of heads, count.
    """
    subject = find_transformer(model)
    structure = structure or trace(subject)
    found = {name for attention in structure.attention for name in _of(attention, structure)}
    if not found:
        raise ValueError(f"model: {type(subject).__name__} has no attention that can be told apart")
    return [name for name, _ in subject.named_parameters() if name in found]


def _of(attention: Attention, structure: Structure) -> set[str]:
    """Finds the parameters of one attention."""
    parts = {part.name for part in (*attention.q, *attention.k, *attention.v, *attention.o)}
    where = innermost(list(parts))
    others = {part.name for one in structure.feed_forward for part in (*one.gate, *one.up, *one.down)} - parts
    if where and not any(name.startswith(f"{where}.") for name in others):
        return {name for name in structure.shapes if name.startswith(f"{where}.")}
    own = {*attention.heads, *attention.query_key, *attention.value}
    modules = {name.rpartition(".")[0] for name in parts}
    return {
        name
        for name in structure.shapes
        if name.rpartition(".")[0] in modules or any(own & set(leaves(axis)) for axis in structure.axes.get(name, ()))
    }
