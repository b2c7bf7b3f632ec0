"""Fewer key/value heads: multi-head to grouped-query to multi-query attention (GQA, 2305.13245, section 2.1; MQA, 1911.02150).

With `before` KV heads turned into `after`, each new head takes the place of a group of `before / after` consecutive old ones:
query head h reads KV head h // (query heads / KV heads), so consecutive heads are the ones whose queries will share.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.adapters.beneath import MERGE, adapted, without_adapters
from billhook.kv_heads.adapters import check_adapters, with_adapters
from billhook.kv_heads.bases.bases import Start
from billhook.kv_heads.bases.ready import Grouping, ready_weights
from billhook.kv_heads.config import cut_by_config
from billhook.kv_heads.layout import find_kv
from billhook.kv_heads.pooling import Pooled, drawing, pool_heads, pooling, std_of, taking
from billhook.kv_heads.proof import Way, prove
from billhook.kv_heads.scope import (
    check_each,
    check_kv_heads,
    check_plain,
    choose,
    hands_out,
    in_scope,
    inside_encoder,
    said_heads,
)
from billhook.model.figures import kv_cache_bytes
from billhook.model.find import find_transformer
from billhook.model.meta import to_meta
from billhook.model.shape import Shape, set_shape, shape_of
from billhook.model.surgery import Change, changed, replace_parameters, undone_by_errors
from billhook.repairs.repair import Repair

__all__ = [
    "KVHeadPlan",
    "Method",
    "Pooled",
    "Pooling",
    "apply_kv_heads",
    "check_kv_heads",
    "check_request",
    "convert_kv_heads",
    "kv_heads_by_layer",
    "kv_heads_of",
    "plan_kv_heads",
    "pool_heads",
]

Pooling = Literal["mean", "first", "random"]
"""How the heads of a group are pooled."""

Method = Literal["mean", "first", "random", "aligned", "svd", "auto"]
"""How they become one: pooled as they are, or made equal before."""


@dataclass(frozen=True)
class KVHeadPlan:
    """What a conversion will do, as plain data.

    Attributes:
        before: KV heads now; of layers that differ, the most.
        after: KV heads then.
        method: How a group of heads becomes one.
        parameters: The parameters that shrink, and how.
        shape: The shape of the model then.
        way: How the model comes to have fewer: `"config"`, as its class builds it from a changed config; `"groups"`, as its code
            reads however many heads keys and values have, and attentions are told `num_key_value_groups`; `"handed"`, by linears
            that store few heads and hand out many.
        saves_cache: Whether the key/value cache of transformers, where there is one, shrinks too; with `"handed"` only parameters
            are saved, and so it is of Falcon, whose code repeats heads before it keeps them.
        layers: The names of the attentions that are converted.
    """

    before: int
    after: int
    method: Pooling
    parameters: dict[str, Pooled]
    shape: Shape
    way: Way
    saves_cache: bool
    layers: tuple[str, ...]


def kv_heads_of(model: nn.Module) -> int:
    """The number of KV heads of a Hugging Face model: as its config states it, or else as its code shows.

    Where layers differ it is the most; of an encoder-decoder whose config has no such field, those of the decoder count.

    Raises:
        ValueError: If the config has another number for each layer, or the model has no attention.
    """
    model = find_transformer(model)
    said = said_heads(model)
    if said is not None and not shape_of(model).handed:
        return said
    found = find_kv(model)
    return max(found[name].heads for name in in_scope(model, found, encoder=False))


def kv_heads_by_layer(model: nn.Module) -> dict[str, int]:
    """The number of KV heads that every attention has, by its name, in the order in which they run; as the tensors have it.

    Args:
        model: A Hugging Face model, or a module that holds one.

    Raises:
        ValueError: If it has no attention, or its heads cannot be told apart.
    """
    return {name: one.heads for name, one in find_kv(find_transformer(model)).items()}


def check_request(num_key_value_heads: int, method: str) -> None:
    """Refuses what no model could do.

    Raises:
        ValueError: If the number is not a whole one of at least 1, or there is no such method.
    """
    if type(num_key_value_heads) is not int or num_key_value_heads < 1:
        raise ValueError(f"num_key_value_heads={num_key_value_heads!r} must be a whole number, 1 at least")
    if method not in get_args(Pooling):
        raise ValueError(f"method={method!r} must be one of {', '.join(get_args(Pooling))}")


def plan_kv_heads(
    model: nn.Module,
    num_key_value_heads: int,
    method: Pooling = "mean",
    layers: Collection[int | str] | None = None,
    encoder: bool = False,
) -> KVHeadPlan:
    """Finds what a conversion changes, and proves that the model's own code then computes what it should.

    No names of architectures or projections are needed. The first of three ways is taken that holds: the model's class builds it
    from a changed config, also where queries, keys and values are one matrix; or the code reads however many heads keys and
    values have; or linears store few heads and hand out many. The last two are proved on a small copy of the model against the
    dense class with heads pooled and repeated: at several lengths and batches, padded, and with a cache. Of LoRA, B is
    pooled along with the linear.

    Args:
        model: A Hugging Face model, or a module that holds one.
        num_key_value_heads: KV heads then.
        method: See `convert_kv_heads`.
        layers: See there.
        encoder: See there.

    Raises:
        ValueError: If the number, method or layers are not legal, or the model cannot be converted; it says what is missing.
    """
    check_request(num_key_value_heads, method)
    model, heads = find_transformer(model), num_key_value_heads
    check_plain(model)
    if adapted(model):
        return _plan_under_adapters(model, heads, method, layers, encoder)
    said = said_heads(model) if layers is None and not shape_of(model).handed else None
    if said is not None:
        check_kv_heads(heads, said, getattr(model.config.get_text_config(decoder=True), "num_attention_heads", said))
    found = find_kv(model)
    chosen = choose(model, found, heads, layers, encoder)
    if said is None:
        check_each(found, chosen, heads)
    inside = encoder or any(name in inside_encoder(model, found) for name in chosen)
    handed = any(hands_out(model, found[name]) for name in chosen)
    built = None if handed else cut_by_config(model, found, chosen, heads, inside, every=layers is not None)
    if built is not None:
        chosen, (parameters, shape) = built
        way: Way = "config"
        saves = _saves_cache(model, shape)
    else:
        check_each(found, chosen, heads)
        way, (parameters, shape) = prove(model, found, chosen, heads)
        saves = way == "groups"
    before = max(found[name].heads for name in chosen)
    return KVHeadPlan(before, heads, method, parameters, shape, way, saves, tuple(chosen))


def _plan_under_adapters(
    model: PreTrainedModel, heads: int, method: Pooling, layers: Collection[int | str] | None, encoder: bool
) -> KVHeadPlan:
    check_adapters(model, method)
    plan = plan_kv_heads(without_adapters(model), heads, method, layers, encoder)
    if plan.way == "handed":
        raise ValueError(f"linears of {type(model).__name__} would hand out few heads many times, which LoRA cannot do: {MERGE}")
    parameters, shape = with_adapters(model, plan.parameters, plan.shape)
    return replace(plan, parameters=parameters, shape=shape)


def convert_kv_heads(
    model: nn.Module,
    num_key_value_heads: int,
    method: Method = "mean",
    optimizers: Optimizer | Iterable[Optimizer] = (),
    seed: int = 0,
    layers: Collection[int | str] | None = None,
    encoder: bool = False,
    batches: Iterable[Any] = (),
    grouping: Grouping = "consecutive",
    repair: Repair | None = None,
) -> KVHeadPlan:
    """Turns multi-head attention into grouped-query, or with one KV head multi-query, attention, in place.

    Args:
        model: A Hugging Face model, or a module that holds one.
        num_key_value_heads: KV heads then; divides both the KV heads now and the query heads.
        method: How a group of heads becomes one.

            - `"mean"`: their mean (the paper's choice); `"first"`: the first of them; `"random"`: drawn anew as the model
              initialises (both the paper's ablation, section 3.3).
            - `"aligned"`: each head is turned so that all of the group agree as far as turns can make them, and queries and
              outputs are turned along, which changes nothing; then their mean. Without batches, the weights alone tell how.
            - `"svd"`: the one head, and what each query head and output makes of it, with which least is lost on the batches.
            - `"auto"`: what does best on held-out batches, also of which heads share a group.

            Where code stands between projection and product (a norm of keys, a gate), what it does not let pass is averaged.
        optimizers: The optimizer, or optimizers, that train the model. Their state follows: first moments are pooled like the
            weights; second moments (of Adam, AdamW, RMSprop, Adadelta, Adagrad) are pooled and multiplied by G^2 for groups of
            G heads. The gradient of a pooled head is the sum of its heads' gradients, and
            (g_1 + ... + g_G)^2 <= G (g_1^2 + ... + g_G^2) = G^2 mean(g_i^2), so the step stays within the optimizer's bound.
            With `"random"` the state of what is drawn anew starts at zero. Of what is in another basis afterwards, or refitted,
            they start anew.
        seed: For `"random"`.
        layers: The attentions to convert, by name or by their place in the order in which they run, from 0; by default all that
            have more KV heads. While layers differ the config keeps its number, and says the new one once all have it.
        encoder: Whether the self-attention of an encoder-decoder's encoder is converted too; as in the paper (section 3.1) it is
            not. A model that is an encoder only is converted all the same.
        batches: For `"svd"`, `"auto"`, `"aligned"` and `repair`, as dictionaries of what the model's forward takes; some
            thousand tokens. `"auto"` and `repair` hold some of them out.
        grouping: Which heads share a group: `"consecutive"`, those that stand beside each other, or `"similar"`, those that one
            head renders best; query heads then change places along with them.
        repair: If given, the linears that read the heads, and those of feed-forwards, are refitted to make up for what is lost.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: As `plan_kv_heads`, or if batches are missing, or a method does not suit the model; then nothing has changed.
    """
    check_method(method, grouping, repair)
    pooling: Pooling = "mean" if method in ("aligned", "svd", "auto") else cast(Pooling, method)
    plan = plan_kv_heads(model, num_key_value_heads, pooling, layers, encoder)
    weights: dict[str, Tensor] = {}
    if method != pooling or grouping != "consecutive" or repair is not None:
        start = cast(Start | Literal["auto"], method)
        groups, pairs = dict.fromkeys(plan.layers, plan.after), [(batch, None) for batch in batches]
        weights, _ = ready_weights(find_transformer(model), groups, start, pairs, grouping, repair)
    apply_kv_heads(plan, model, optimizers, seed, weights, changed(find_transformer(model), weights))
    return plan


def check_method(method: str, grouping: str, repair: Repair | None) -> None:
    """Refuses a method or grouping that there is not, and what cannot go together.

    Raises:
        ValueError: With what is legal.
    """
    for name, value, legal in (("method", method, get_args(Method)), ("grouping", grouping, get_args(Grouping))):
        if value not in legal:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(legal)}")
    if method in ("first", "random") and (grouping == "similar" or repair is not None):
        other = "repair" if repair is not None else "grouping='similar'"
        raise ValueError(f"{other} goes with method 'mean', 'aligned', 'svd' and 'auto', not with {method!r}")


def apply_kv_heads(
    plan: KVHeadPlan,
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    seed: int = 0,
    weights: Mapping[str, Tensor] | None = None,
    anew: Collection[str] = (),
) -> None:
    """Carries out a plan, in place; the model and the optimizers are as before if that fails.

    Args:
        plan: What was made of the model as it is.
        model: The model.
        optimizers: See `convert_kv_heads`.
        seed: For `"random"`.
        weights: New values, in the old sizes, of any parameters, from which the conversion starts; also of some that do not
            shrink, as queries and outputs, whose optimizer state stays.
        anew: The parameters whose optimizer state means nothing any more, as they are in another basis: it starts anew.

    Raises:
        ValueError: If the plan is not of this model, or `weights` are not of its parameters.
    """
    model = find_transformer(model)
    _check_made_for(plan, model, weights or {})
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Change] = {name: taking(values) for name, values in (weights or {}).items()}
    for name, pooled in plan.parameters.items():
        changes[name] = _change(plan, model, name, pooled, generator, (weights or {}).get(name))
    changes |= {name: replace(changes[name], state=None) for name in changes.keys() & set(anew)}
    trained_by = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    with undone_by_errors(model, trained_by):
        replace_parameters(model, changes, trained_by)
        set_shape(model, plan.shape)


def _saves_cache(model: PreTrainedModel, shape: Shape) -> bool:
    shadow = to_meta(model)
    set_shape(shadow, shape)
    before, after = kv_cache_bytes(model), kv_cache_bytes(shadow)
    return before is None or after is None or after < before


def _change(
    plan: KVHeadPlan, model: PreTrainedModel, name: str, pooled: Pooled, generator: torch.Generator, values: Tensor | None
) -> Change:
    owner = model.get_submodule(name.rpartition(".")[0])
    if plan.method == "random" and isinstance(owner, nn.Linear | Conv1D):
        size = plan.shape.tensors[name]
        std = std_of(model.config.get_text_config(decoder=True), size, pooled.dim)
        return drawing(pooled, size, std, generator, values)
    return pooling(pooled, "first" if plan.method == "first" else "mean", values)


def _check_made_for(plan: KVHeadPlan, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, pooled in plan.parameters.items():
        if name not in sizes or sizes[name][pooled.dim] != len(pooled.index):
            raise ValueError(f"plan: it was made for another model: {name} is {list(sizes.get(name, ())) or 'not there'}")
    for name, values in weights.items():
        if sizes.get(name) != tuple(values.shape):
            raise ValueError(f"weights: {name} is {list(values.shape)}, and must be {list(sizes.get(name, ())) or 'a parameter'}")
    if plan.shape.tensors.keys() != shape_of(model).tensors.keys():
        raise ValueError(f"plan: it was made for another model than this {type(model).__name__}")
