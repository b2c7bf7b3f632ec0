"""Heads are removed: tensors, optimizer state, module attributes and config follow, and the outcome is compared with the mask."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.structure.axes import Indices
from billhook.structure.fields import FieldFinder
from billhook.structure.gates import place_mask
from billhook.structure.head_plan import HeadPlan, plan_heads
from billhook.structure.heads import Heads, Layer, Per, find_heads
from billhook.structure.inputs import make_inputs
from billhook.structure.meta import to_meta
from billhook.structure.ranking import resting
from billhook.structure.shape import Shape, build_on_meta, find_transformer, set_shape, shape_of
from billhook.structure.show import pattern
from billhook.structure.surgery import Change, replace_parameters
from billhook.structure.trace import trace

TRIALS = 256
"""How many assignments of whole-number attributes are tried, at most."""


def prune_heads(
    model: nn.Module,
    heads: Mapping[Layer, Iterable[int]],
    optimizers: Optimizer | Iterable[Optimizer] = (),
    per: Per = "head",
) -> HeadPlan:
    """Removes heads from a model in place: it computes what it did with these heads masked, and is smaller.

    Where the config of the model's class can say the new number of heads, it does, and plain `from_pretrained` loads what is
    saved; otherwise `bh.save` says the shape beside it, and `bh.load` loads it.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        heads: The heads that go, by layer: its number (in the order in which the attentions run) or the attention's name.
        optimizers: The optimizer, or optimizers, that train the model; their state follows.
        per: Whether heads are query heads, or KV heads with the query heads that they serve.

    Returns:
        The plan that was carried out.

    Raises:
        ValueError: As `plan_heads`, or if the model's code does not follow; then nothing has changed.
    """
    plan = plan_heads(model, heads, per)
    apply_heads(plan, model, optimizers)
    return plan


def apply_heads(plan: HeadPlan, model: nn.Module, optimizers: Optimizer | Iterable[Optimizer] = ()) -> None:
    """Carries out a plan, in place; the model and the optimizers are as before if that fails.

    Args:
        plan: What `plan_heads` made of the model as it is.
        model: The model.
        optimizers: As in `prune_heads`.

    Raises:
        ValueError: If the plan is not of this model, or the model's code does not follow.
    """
    subject = find_transformer(model)
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    if not plan.heads:
        return
    now, structure = shape_of(subject), trace(subject)
    _check_same(plan, subject, find_heads(subject, structure))
    expected = _masked_answer(subject, find_heads(subject, structure), plan)
    tensors = _sizes(subject, plan)
    for shape, fields in _shapes(subject, plan, now, tensors):
        with _undone_unless_done(subject, now, optimizers):
            _cut(subject, plan, shape, optimizers)
            _set_fields(subject, fields)
            if _alike(expected, _answer(subject), min(1000 * torch.finfo(subject.dtype).eps, 0.05)):
                return
            raise _Different
    raise ValueError(
        f"heads: the code of {type(subject).__name__} does not follow when heads are removed from its tensors; they can be "
        "masked (mask_heads)"
    )


class _Different(Exception):
    """The model computes something else than with the heads masked."""


Fields = dict[str, int | None]
"""Fields of a config, those of nested configs with dots, and their values."""


def _shapes(
    model: PreTrainedModel, plan: HeadPlan, now: Shape, tensors: dict[str, tuple[int, ...]]
) -> Iterator[tuple[Shape, Fields]]:
    """Shapes that the model might have then, the likeliest first: as its class builds it, or with attributes that are tried."""
    fields = _fields(model, plan) if build_shape(model, {}).tensors == now.tensors else {}
    if fields and (built := _built(model, fields, now, tensors)) is not None:
        yield built, fields
        return
    for attributes in itertools.islice(_assignments(model, plan, now, tensors), TRIALS):
        shape = Shape(tensors, now.attributes | attributes, now.config)
        if _runs(model, plan, shape):
            yield shape, {}


def _fields(model: PreTrainedModel, plan: HeadPlan) -> Fields:
    """What the config's fields would be, if they can say it: the same number of heads everywhere."""
    before, after = set(plan.before.values()), set(plan.after.values())
    if len(before) != 1 or len(after) != 1:
        return {}
    (query, kv), (query_then, kv_then) = before.pop(), after.pop()
    groups, finder = trace(model).groups, FieldFinder(model)
    changes: dict[str, int | None] = {}
    steps = ((("kv_head", "head"), kv, kv_then), (("query_head",), query // kv, query_then // kv_then))
    for kinds, size, count in steps:
        if count == size:
            continue
        own = [group for group in groups if group.kind in kinds and group.size == size]
        found = finder.values(size, finder.find(own), count) if own else {}
        if not found:
            return {}
        for name, value in found.items():
            already = changes.get(name) if _field(model, name) is not None else None
            changes[name] = value if already is None else already // size * count
    return changes


def _built(model: PreTrainedModel, fields: Fields, now: Shape, tensors: dict[str, tuple[int, ...]]) -> Shape | None:
    """What the model's class builds from a changed config, if it has these tensors."""
    try:
        usual, built = build_shape(model, {}), build_shape(model, fields)
    except Exception:  # whatever a class of configs or models raises
        return None
    if built.tensors != tensors:
        return None
    attributes = {k: v for k, v in built.attributes.items() if usual.attributes.get(k, v) != v}
    return Shape(tensors, now.attributes | attributes, now.config)


def build_shape(model: PreTrainedModel, fields: Fields) -> Shape:
    """The shape of what the model's class builds from its config with some fields changed."""
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        owner, field = _owner(config, name)
        setattr(owner, field, value)
    type(config).from_dict(config.to_dict())  # which refuses what its class does not allow
    return shape_of(build_on_meta(model, config))


def _owner(config: PretrainedConfig, name: str) -> tuple[Any, str]:
    """The config that holds a field, and its name there."""
    *owners, field = name.split(".")
    owner: Any = config
    for one in owners:
        owner = getattr(owner, one)
    return owner, field


def _field(model: PreTrainedModel, name: str) -> int | None:
    owner, field = _owner(model.config, name)
    value: int | None = getattr(owner, field, None)
    return value


def _set_fields(model: PreTrainedModel, fields: Fields) -> None:
    for name, value in fields.items():
        owner, field = _owner(model.config, name)
        setattr(owner, field, value)


def _assignments(
    model: PreTrainedModel, plan: HeadPlan, now: Shape, tensors: dict[str, tuple[int, ...]]
) -> Iterator[dict[str, int]]:
    """Values of whole-number attributes in the attentions, the ones in which most of them follow first."""
    certain, open_ = _candidates(model, plan, now, tensors)
    kinds = sorted({pattern(name) for name in open_})
    choices = sorted(itertools.product((True, False), repeat=len(kinds)), key=lambda one: -sum(one)) if len(kinds) < 12 else []
    for chosen in choices:
        follows = dict(zip(kinds, chosen, strict=True))
        for which in range(max([len(values) for values in open_.values()], default=1)):
            yield certain | {n: v[min(which, len(v) - 1)] for n, v in open_.items() if follows[pattern(n)]}


def _candidates(
    model: PreTrainedModel, plan: HeadPlan, now: Shape, tensors: dict[str, tuple[int, ...]]
) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Attributes that say the size of a tensor, and others in the attentions that may: with what they may become."""
    certain: dict[str, int] = {}
    places = {}
    for name, module in model.named_modules():
        layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for attr, dim in _says(layer).items():
            weight = next((n for n, p in model.named_parameters(remove_duplicate=False) if p is layer.weight), "")
            if weight in tensors and hasattr(module, attr):
                certain[f"{name}.{attr}"] = tensors[weight][dim]
        places[name] = module
    open_: dict[str, list[int]] = {}
    for attention in plan.heads:
        becomes = _becomes(plan, attention, now, tensors)
        for key, value in now.attributes.items():
            if key.startswith(f"{attention}.") and key not in certain and value in becomes:
                open_[key] = becomes[value]
    changed = {key: value for key, value in certain.items() if now.attributes.get(key) not in (None, value)}
    return changed, open_


def _says(module: nn.Module) -> dict[str, int]:
    """Which attributes of a layer say the size of which dimension of its weight."""
    if isinstance(module, nn.Linear):
        return {"out_features": 0, "in_features": 1}
    if isinstance(module, Conv1D):
        return {"nx": 0, "nf": 1}
    return {"num_embeddings": 0, "embedding_dim": 1} if isinstance(module, nn.Embedding) else {}


def _becomes(plan: HeadPlan, attention: str, now: Shape, tensors: dict[str, tuple[int, ...]]) -> dict[int, list[int]]:
    """What numbers of heads and widths become."""
    (query, kv), (query_then, kv_then) = plan.before[attention], plan.after[attention]
    pairs = [(query, query_then), (kv, kv_then), (query // kv, query_then // kv_then)]
    for name, size in now.tensors.items():
        if name.startswith(f"{attention}."):
            pairs += zip(size, tensors[name], strict=True)
            pairs += [(a // 3, b // 3) for a, b in zip(size, tensors[name], strict=True) if a % 3 == b % 3 == 0]
    found: dict[int, list[int]] = {}
    for old, new in pairs:
        if old != new and new not in found.setdefault(old, []):
            found[old].append(new)
    return found


def _runs(model: PreTrainedModel, plan: HeadPlan, shape: Shape) -> bool:
    """Whether the model's code runs with a shape, on meta tensors, and has the heads that are planned."""
    shadow = to_meta(model)
    set_shape(shadow, shape)
    try:
        heads = find_heads(shadow)
    except ValueError:
        return False
    return {name: (one.count(), one.count("kv_head")) for name, one in heads.items()} == plan.after


def _sizes(model: PreTrainedModel, plan: HeadPlan) -> dict[str, tuple[int, ...]]:
    """The sizes of all tensors then, also of those that are the same under another name."""
    first = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    sizes = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        own = first.get(id(tensor), name)
        sizes[name] = tuple(len(plan.cuts.get((own, d), range(n))) for d, n in enumerate(tensor.shape))
    return sizes


def _cut(model: PreTrainedModel, plan: HeadPlan, shape: Shape, optimizers: list[Optimizer]) -> None:
    names = dict.fromkeys(name for name, _ in plan.cuts)
    parameters = dict(model.named_parameters())
    cuts = {name: partial(_smaller, {d: stays for (own, d), stays in plan.cuts.items() if own == name}) for name in names}
    buffers = {name: cut(model.get_buffer(name)) for name, cut in cuts.items() if name not in parameters}
    changes = {name: Change(cut, partial(_smaller_state, cut)) for name, cut in cuts.items() if name in parameters}
    replace_parameters(model, changes, optimizers)
    for name, buffer in buffers.items():
        owner, _, attr = name.rpartition(".")
        model.get_submodule(owner)._buffers[attr] = buffer
    set_shape(model, shape)


def _smaller(stays: Mapping[int, Indices], tensor: Tensor) -> Tensor:
    for dim, positions in stays.items():
        tensor = tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))
    return tensor


def _smaller_state(cut: Callable[[Tensor], Tensor], _: str, state: Tensor) -> Tensor:
    return cut(state)


@contextmanager
def _undone_unless_done(model: PreTrainedModel, now: Shape, optimizers: list[Optimizer]) -> Iterator[None]:
    """Puts back model and optimizers, unless what happens within returns."""
    tensors = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    groups = [(group, list(group["params"])) for optimizer in optimizers for group in optimizer.param_groups]
    states = [(optimizer, dict(optimizer.state)) for optimizer in optimizers]
    configs = [(config, dict(vars(config))) for config in {id(c): c for c in _configs(model)}.values()]
    try:
        yield
    except BaseException as error:
        for module, parameters, buffers in tensors:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for group, params in groups:
            group["params"][:] = params
        for optimizer, state in states:
            optimizer.state.clear()
            optimizer.state.update(state)
        set_shape(model, now)
        for config, fields in configs:
            vars(config).update(fields)
        if not isinstance(error, _Different):
            raise


def _configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    return [model.config, *(c for c in vars(model.config).values() if isinstance(c, PretrainedConfig))]


def _masked_answer(model: PreTrainedModel, heads: Mapping[str, Heads], plan: HeadPlan) -> list[Tensor]:
    with place_mask(model, heads, plan.heads):
        return _answer(model)


@torch.no_grad()
def _answer(model: PreTrainedModel) -> list[Tensor]:
    """What the model gives for small random inputs."""
    device = next(model.parameters()).device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in make_inputs(model).items()}
    inputs = {k: v.to(model.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    with resting(model):
        output = model(**inputs)
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [value.detach().double().cpu() for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _alike(expected: list[Tensor], found: list[Tensor], eps: float) -> bool:
    """Whether outputs are the same but for rounding."""
    if [value.shape for value in expected] != [value.shape for value in found]:
        return False
    near = [torch.allclose(a, b, rtol=0, atol=eps * max(1.0, float(a.abs().max())), equal_nan=True)
            for a, b in zip(expected, found, strict=True)]  # fmt: skip
    return all(near)


def _check_same(plan: HeadPlan, model: PreTrainedModel, heads: Mapping[str, Heads]) -> None:
    counts = {name: (one.count(), one.count("kv_head")) for name, one in heads.items()}
    if plan.model != type(model).__name__ or plan.before != counts:
        raise ValueError(f"plan: it was made for a {plan.model} with other heads than this {type(model).__name__} has")
