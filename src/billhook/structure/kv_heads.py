"""Fewer key/value heads: multi-head to grouped-query to multi-query attention (GQA, 2305.13245, section 2.1; MQA, 1911.02150).

With `before` KV heads turned into `after`, each new head takes the place of a group of `before / after` consecutive old ones:
query head h reads KV head h // (query heads / KV heads), so consecutive heads are the ones whose queries will share.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from billhook.structure.shape import Shape, build_on_meta, find_transformer, set_shape, shape_of
from billhook.structure.surgery import Change, replace_parameters

Method = Literal["mean", "first", "random"]
FIELD = "num_key_value_heads"
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""What Adam and AdamW, RMSprop and Adadelta, and Adagrad call the mean or sum of squared gradients."""


@dataclass(frozen=True)
class KVHeadPlan:
    """What a conversion will do, as plain data.

    Attributes:
        before: KV heads now.
        after: KV heads then.
        method: How a group of heads becomes one.
        parameters: The parameters that shrink, each with the dimension that holds its heads.
        shape: The shape of the model then: what the model's own class builds from the changed config.
    """

    before: int
    after: int
    method: Method
    parameters: dict[str, int]
    shape: Shape


def pool_heads(tensor: Tensor, before: int, after: int, method: Literal["mean", "first"] = "mean", dim: int = 0) -> Tensor:
    """One head for each group of `before / after` consecutive heads along a dimension.

    Args:
        tensor: The heads one after the other along `dim`, `[..., before * width, ...]`.
        before: Heads in `tensor`.
        after: Heads in the result; divides `before`.
        method: `"mean"`: W_group = 1/G * sum over the group of W_head (GQA, section 2.1), summed in float32 at least;
            `"first"`: the first head of the group.
        dim: The dimension that holds the heads.

    Returns:
        `[..., after * width, ...]`, in the dtype of `tensor`.

    >>> pool_heads(torch.tensor([0.0, 1.0, 2.0, 5.0]), before=4, after=2)
    tensor([0.5000, 3.5000])
    """
    groups: Tensor = tensor.unflatten(dim, (after, before // after, -1))  # type: ignore[no-untyped-call]
    if method == "first":
        return groups.select(dim + 1, 0).flatten(dim, dim + 1)
    accumulate = torch.promote_types(tensor.dtype, torch.float32)
    return groups.to(accumulate).mean(dim + 1).to(tensor.dtype).flatten(dim, dim + 1)


def kv_heads_of(model: nn.Module) -> int:
    """The number of KV heads that the config of a Hugging Face model states.

    Raises:
        ValueError: If the config has no such field, or another number for each layer.
    """
    return _heads(find_transformer(model))[0]


def check_request(num_key_value_heads: int, method: str) -> None:
    """Refuses what no model could do.

    Raises:
        ValueError: If the number is not a whole one of at least 1, or there is no such method.
    """
    if type(num_key_value_heads) is not int or num_key_value_heads < 1:
        raise ValueError(f"num_key_value_heads={num_key_value_heads!r} must be a whole number, 1 at least")
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} must be one of {', '.join(get_args(Method))}")


def check_kv_heads(num_key_value_heads: int, before: int, query_heads: int) -> None:
    """Refuses a number of KV heads that a model with so many heads cannot have.

    Raises:
        ValueError: With what is legal.
    """
    legal = [n for n in range(1, before) if before % n == 0 and query_heads % n == 0]
    if num_key_value_heads not in legal:
        reason = "which must be fewer than there are, and divide both them and the query heads"
        raise ValueError(
            f"num_key_value_heads={num_key_value_heads}, {reason}: with {before} KV heads and {query_heads} query heads, "
            f"legal is {', '.join(map(str, legal)) or 'nothing: one KV head is all there is'}"
        )


def plan_kv_heads(model: nn.Module, num_key_value_heads: int, method: Method = "mean") -> KVHeadPlan:
    """Finds what a conversion changes, and checks it against what the model's own class builds from the changed config.

    No names of architectures or projections are needed: the parameters whose size follows the config field are those that
    hold KV heads (projections, their biases, and norms over all heads).

    Args:
        model: A Hugging Face model, or a module that holds one.
        num_key_value_heads: KV heads then.
        method: See `convert_kv_heads`.

    Raises:
        ValueError: If the number or method is not legal, or the model cannot be converted; the message says what it lacks.
    """
    check_request(num_key_value_heads, method)
    model = find_transformer(model)
    before, query_heads = _heads(model)
    check_kv_heads(num_key_value_heads, before, query_heads)
    _check_plain(model)
    now, shapes = shape_of(model), []
    for heads in (before, num_key_value_heads):
        config = copy.deepcopy(model.config)
        setattr(config.get_text_config(decoder=True), FIELD, heads)
        shapes.append(shape_of(build_on_meta(model, config)))
    _check_as_built(model, now, shapes[0])
    then = _apply_difference(now, *shapes)
    resized = {name for name, size in now.tensors.items() if size != then.tensors[name]}
    names = [name for name, _ in model.named_parameters() if name in resized]
    if kept := sorted(resized - {name for name, _ in model.named_parameters(remove_duplicate=False)}):
        raise ValueError(f"{kept[0]} follows {FIELD} but is no parameter: it cannot be pooled")
    dims = {name: _head_dim(name, now.tensors[name], then.tensors[name], before, num_key_value_heads) for name in names}
    if not dims:
        raise ValueError(f"{type(model).__name__}: no parameter follows the config field {FIELD}")
    return KVHeadPlan(before, num_key_value_heads, method, dims, then)


def convert_kv_heads(
    model: nn.Module,
    num_key_value_heads: int,
    method: Method = "mean",
    optimizers: Optimizer | Iterable[Optimizer] = (),
    seed: int = 0,
) -> KVHeadPlan:
    """Turns multi-head attention into grouped-query, or with one KV head multi-query, attention, in place.

    Args:
        model: A Hugging Face model, or a module that holds one, whose config has `num_key_value_heads`.
        num_key_value_heads: KV heads then; divides both the KV heads now and the query heads.
        method: `"mean"`: the mean of the group's heads (the paper's choice); `"first"`: the group's first head; `"random"`:
            drawn anew as the model initialises (both the paper's ablation, section 3.3).
        optimizers: The optimizer, or optimizers, that train the model. Their state follows: first moments are pooled like the
            weights; second moments (of Adam, AdamW, RMSprop, Adadelta, Adagrad) are pooled and multiplied by G^2 for groups of
            G heads. The gradient of a pooled head is the sum of its heads' gradients, and
            (g_1 + ... + g_G)^2 <= G (g_1^2 + ... + g_G^2) = G^2 mean(g_i^2), so the step stays within the optimizer's bound.
            With `"random"` the state of what is drawn anew starts at zero.
        seed: For `"random"`.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: As `plan_kv_heads`; then nothing has changed.
    """
    plan = plan_kv_heads(model, num_key_value_heads, method)
    model = find_transformer(model)
    generator = torch.Generator().manual_seed(seed)
    std = float(getattr(model.config.get_text_config(decoder=True), "initializer_range", 0.02))
    changes = {}
    for name, dim in plan.parameters.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        drawn = method == "random" and isinstance(owner, nn.Linear)
        changes[name] = _draw(plan, name, std, generator) if drawn else _pool(plan, dim)
    replace_parameters(model, changes, optimizers)
    set_shape(model, plan.shape)
    return plan


def _pool(plan: KVHeadPlan, dim: int) -> Change:
    how: Literal["mean", "first"] = "first" if plan.method == "first" else "mean"
    size = plan.before // plan.after
    squares = dict.fromkeys(SECOND_MOMENTS, size**2) | {"exp_inf": size}

    def state(key: str, value: Tensor) -> Tensor:
        return pool_heads(value, plan.before, plan.after, how, dim) * squares.get(key, 1)

    return Change(lambda weight: pool_heads(weight, plan.before, plan.after, how, dim), state)


def _draw(plan: KVHeadPlan, name: str, std: float, generator: torch.Generator) -> Change:
    size = plan.shape.tensors[name]
    drawn = torch.randn(size, generator=generator) * std if len(size) > 1 else torch.zeros(size)
    return Change(lambda weight: drawn.to(weight), lambda _, value: value.new_zeros(size))


def _heads(model: PreTrainedModel) -> tuple[int, int]:
    config = model.config.get_text_config(decoder=True)
    before, query_heads = getattr(config, FIELD, None), getattr(config, "num_attention_heads", None)
    if not isinstance(before, int) or not isinstance(query_heads, int):
        lacks = "says another number for each layer" if isinstance(before, list | tuple) else "has no such field"
        raise ValueError(
            f"{type(model).__name__} cannot be told to use fewer KV heads: {type(config).__name__}.{FIELD} is what would tell "
            f"it, and its config {lacks}"
        )
    return before, query_heads


def _check_plain(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is quantised ({parameter.dtype}): convert the model before it is quantised")
        if isinstance(parameter, DTensor):
            raise ValueError(f"{name} is sharded over devices: convert the model before it is sharded")


def _check_as_built(model: PreTrainedModel, now: Shape, built: Shape) -> None:
    """Refuses a model that is no longer what its class builds from its config."""
    different = sorted(
        name for name in now.tensors.keys() | built.tensors.keys() if now.tensors.get(name) != built.tensors.get(name)
    )
    if different:
        adapters = any("lora_" in name or ".base_layer." in name for name in different)
        hint = "merge the adapters first" if adapters else "such a model cannot be converted"
        raise ValueError(
            f"{different[0]} (and {len(different) - 1} more) is not as {type(model).__name__} builds it "
            f"from the model's config: {hint}"
        )


def _apply_difference(now: Shape, built: Shape, then: Shape) -> Shape:
    """The shape now with what differs between the two that the class builds; what a user set by hand stays."""
    attributes = {k: then.attributes[k] for k, v in built.attributes.items() if then.attributes.get(k, v) != v}
    config = {k: then.config[k] for k, v in built.config.items() if then.config.get(k, v) != v}
    return Shape(then.tensors, now.attributes | attributes, now.config | config)


def _head_dim(name: str, old: tuple[int, ...], new: tuple[int, ...], before: int, after: int) -> int:
    """The dimension along which whole KV heads, and nothing else, lie."""
    differing = [d for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    if len(differing) == 1 and math.prod(old) * after == math.prod(new) * before:
        return differing[0]
    raise ValueError(
        f"{name} goes from {list(old)} to {list(new)} with {before} to {after} KV heads, so it holds more than KV heads "
        "(queries, keys and values in one matrix): separate key and value projections are needed"
    )
