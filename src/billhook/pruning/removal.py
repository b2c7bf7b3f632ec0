"""Removes units: tensors, optimizer state, attributes and config follow, and the outcome is compared with the mask."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.engine.state import precisely, resting
from billhook.engine.store import store_of
from billhook.engine.trees import tree_leaves
from billhook.linalg import in_float64
from billhook.model.config_fields import Fields, build_on_meta, set_fields
from billhook.model.constants import Numbers, take_derived
from billhook.model.handed import Indices
from billhook.model.inputs import alike, small_inputs, tolerance
from billhook.model.meta import to_meta
from billhook.model.shape import Shape, derived_then, note_shape, set_shape, shape_of, unbuilt_shape
from billhook.model.surgery import Change, Swap, change_in_turn, change_values, undone_by_errors, whole_way_back
from billhook.pruning.cuts import Cut, find_cut
from billhook.pruning.shape_then import shapes_then
from billhook.tracing.trace import trace
from billhook.units.gates import Gate, reading
from billhook.units.units import PLURAL, Units

Scale = Callable[[Tensor], Tensor]
"""From the old values of a weight to the new."""


def fold(model: PreTrainedModel, numbers: Numbers) -> list[Swap] | str:
    """Gives modules the numbers that their class derives, and scales embeddings so that their outputs stay as they were.

    Where an embedding is tied to the output, the norm before that is scaled back. Their optimizer state restarts. If other
    modules have such numbers, nothing changes, and the reason is returned.
    """
    changes: dict[str, Change] = {}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in numbers):
        own = {name: both for name, both in numbers.items() if name.rpartition(".")[0] == owner}
        scales = _scales(model, owner, own)
        if scales is None:
            name, (before, after) = next(iter(own.items()))
            return f"{name} follows from the config, {before:.4g} now and {after:.4g} then, and no weights make up for that"
        changes |= {name: Change(scale, None) for name, scale in scales.items()}
    take_derived(model, numbers)
    return change_values(model, changes)


def _scales(model: PreTrainedModel, owner: str, numbers: Numbers) -> dict[str, Scale] | None:
    """Finds how weights make up for the numbers of a module, tried on a small copy; None if they do not."""
    module = model.get_submodule(owner)
    if not isinstance(module, nn.Embedding):
        return None
    kind = module.weight.dtype
    named = {name.rpartition(".")[2]: both for name, both in numbers.items()}
    used = [both for name, both in named.items() if name in module._buffers] or list(named.values())
    before, after = (float(torch.tensor(number).to(kind)) for number in used[0])
    ratio, given = before / after, torch.arange(3)
    up = partial(torch.mul, other=ratio)
    if not _alike(_small(module, given, 0, named), _small(module, given, 1, named, up)):
        return None
    scales: dict[str, Scale] = {f"{owner}.weight": up}
    if not any(one is not module and one._parameters.get("weight") is module.weight for one in model.modules()):
        return scales
    name = _last_norm(model, module.embedding_dim)
    back = _divided(model.get_submodule(name), ratio) if name else None
    return None if back is None else scales | {f"{name}.weight": back}


def _divided(norm: nn.Module, ratio: float) -> Scale | None:
    """Finds how the weight of a norm, its only parameter, divides what it gives, tried on a small copy; None if it does not."""
    given = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(norm.get_parameter("weight").dtype)
    for back in (partial(torch.div, other=ratio), partial(_one_off, by=ratio)):
        if _alike(_small(norm, given, 0, {}) / ratio, _small(norm, given, 1, {}, back)):
            return back
    return None


def _one_off(weight: Tensor, by: float) -> Tensor:
    """Divides what a weight and one are together, as Gemma's norms multiply by that."""
    return (1 + in_float64(weight)).div(by).sub(1).to(weight)


def _last_norm(model: nn.Module, width: int) -> str:
    """Finds the last module whose only parameter is a weight as wide as the stream; empty if there is none."""
    found = [
        name
        for name, m in model.named_modules()
        if [(n, tuple(p.shape)) for n, p in m.named_parameters()] == [("weight", (width,))]
    ]
    return found[-1] if found else ""


@torch.no_grad()
def _small(
    module: nn.Module, given: Tensor, place: int, numbers: Mapping[str, tuple[float, float]], scale: Scale | None = None
) -> Tensor:
    """Computes what a narrow copy of a module does, with its numbers before or after, and its weight scaled."""
    small, like = copy.copy(module), module.get_parameter("weight")
    weight = torch.randn((3, 4)[-like.dim() :], generator=torch.Generator().manual_seed(1)).to(like.dtype)
    small._parameters = {"weight": nn.Parameter(weight if scale is None else scale(weight), requires_grad=False)}
    small._buffers = {name: torch.tensor(both[place]) for name, both in numbers.items() if name in module._buffers}
    vars(small).update({name: both[place] for name, both in numbers.items() if name not in module._buffers})
    output: Tensor = type(module).forward(small, given)
    return output


def _alike(a: Tensor, b: Tensor) -> bool:
    rounding = max(torch.finfo(dtype).eps for dtype in (a.dtype, torch.float32))  # norms compute in float32 at best
    return torch.allclose(a, b, rtol=8 * rounding, atol=16 * rounding)


def remove(model: PreTrainedModel, cut: Cut, key: Callable[[], str] = str) -> list[Swap]:
    """Removes units from a model, in place, and returns what optimizers have to follow; the model is as before if that fails.

    Where heads and feed-forward channels are removed, the outcome is compared with the model in which they are masked, without
    the residual channels that go with them. Where these or experts alone are removed, it must run, have the planned units, and
    compute the same whether the config says so or not. A mask before the units is refused. The blocks of a model that is
    streamed are written as they change; `key` returns what tells the values that they start from.
    """
    if not cut.units:
        return []
    found = cut.places
    _check_free(model, found)
    real = model.device.type != "meta"
    readers = {reader for one in found.values() for reader in one.readers if one.kind in ("head", "channel")}
    readers = {reader for reader in readers if not _makes_units(model, reader, cut)}
    expected = _expected(model, cut, readers) if real else None
    why = ""
    for shape, fields in shapes_then(model, cut):
        try:
            with store_of(model).following(), undone_by_errors(model):
                swaps = _carry_out(model, cut, shape, key)
                kept = _answer_if_any(model, readers) if expected is None and real and fields else expected
                swaps += _say(model, fields)
                note_shape(model)
                if real:
                    _check_answer(model, readers, kept)
            return swaps
        except _Different as different:
            why = str(different)
    what = " or ".join(dict.fromkeys(PLURAL[cut.kinds[name]] for name in cut.units))
    raise ValueError(
        f"{what}: the code of {type(model).__name__} does not follow when {what} are removed from its tensors"
        + (f" ({why})" if why else "")
        + ("; they can be masked (bh.mask)" if what == "heads" else "")
    )


def tried(model: PreTrainedModel, cut: Cut) -> PreTrainedModel:
    """Returns a model without units, on meta tensors; refuses what its code does not follow."""
    shadow = to_meta(model)
    remove(shadow, cut)
    _check_rebuilt(shadow, dict.fromkeys(PLURAL[cut.kinds[name]] for name in cut.units))
    return shadow


def _check_rebuilt(model: PreTrainedModel, what: Iterable[str]) -> None:
    """Refuses a shape with which the class, rebuilt, does not run: a forward may have put other modules in place."""
    lacks, rebuilt = unbuilt_shape(model), build_on_meta(model, copy.deepcopy(model.config))
    kinds = {name: type(module) for name, module in model.named_modules()}
    if not lacks.tensors or all(kinds.get(name) is type(module) for name, module in rebuilt.named_modules()):
        return
    try:
        trace(rebuilt)
    except ValueError:  # nor does it as it is
        return
    set_shape(rebuilt, lacks.over(shape_of(rebuilt)))
    try:
        trace(rebuilt)
    except ValueError as error:
        raise ValueError(
            f"{' or '.join(what)}: {type(model).__name__} runs without some, and no longer once it is saved and loaded, as its "
            f"code has put other modules in place of those that its class builds: {error}"
        ) from error


class _Different(Exception):
    """The model computes something else than with the units masked, or does not run."""


def _check_answer(model: PreTrainedModel, readers: Iterable[str], expected: list[Tensor] | None) -> None:
    try:
        found = _answer(model, readers)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # such as a kernel that takes multiples of something
        raise _Different(str(error).partition("\n")[0]) from error
    if expected is not None and not alike(expected, found, tolerance(model)):
        raise _Different


def _answer_if_any(model: PreTrainedModel, readers: Iterable[str]) -> list[Tensor] | None:
    """Returns the answer before the config says what is removed; none of a model whose code asks the config for sizes."""
    try:
        return _answer(model, readers)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None


def _say(model: PreTrainedModel, fields: Fields) -> list[Swap]:
    """Changes the config, with what the class derives from it; weights make up for that."""
    before = copy.deepcopy(model.config)
    set_fields(model.config, fields)
    folded = fold(model, derived_then(model, before)) if fields else []
    if isinstance(folded, str):
        raise _Different(folded)
    return folded


def _carry_out(model: PreTrainedModel, cut: Cut, shape: Shape, key: Callable[[], str]) -> list[Swap]:
    """Cuts tensors, and returns the parameters that have changed."""
    parameters = dict(model.named_parameters())
    smaller = {name: partial(_smaller, {d: s for (own, d), s in cut.cuts.items() if own == name}) for name, _ in cut.cuts}
    buffers = {name: take(model.get_buffer(name)) for name, take in smaller.items() if name not in parameters}
    changes = {n: Change(take, partial(_smaller_state, take), take) for n, take in smaller.items() if n in parameters}
    sizes = list(_whole_sizes(model))
    swaps = change_in_turn(model, changes, f"units {cut.units}", shape.tensors, key)
    for module, attr in sizes:
        setattr(module, attr, type(getattr(module, attr))(module.get_parameter("weight").shape))
    for name, buffer in buffers.items():
        owner, _, attr = name.rpartition(".")
        model.get_submodule(owner)._buffers[attr] = buffer
    set_shape(model, shape)
    return swaps


def _makes_units(model: nn.Module, reader: str, cut: Cut) -> bool:
    """Tells whether a reader loses outputs itself, which others read."""
    module = model.get_submodule(reader)
    names = {f"{reader}.weight", f"{reader}.base_layer.weight"}
    return any((name, 1 if isinstance(module, Conv1D) else 0) in cut.cuts for name in names)


def _whole_sizes(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yields attributes in which a module keeps the whole size of its weight, as a norm does."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        for attr, value in vars(module).items():
            if weight is not None and isinstance(value, tuple | list) and tuple(value) == tuple(weight.shape):
                yield module, attr


def _smaller(stays: Mapping[int, Indices], tensor: Tensor) -> Tensor:
    for dim, positions in stays.items():
        tensor = tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))
    return tensor


def _smaller_state(take: Callable[[Tensor], Tensor], _: str, state: Tensor) -> Tensor:
    return take(state)


def _expected(model: PreTrainedModel, cut: Cut, readers: Iterable[str]) -> list[Tensor] | None:
    """Returns the answer with heads and channels masked, without the residual channels that go; None where nothing is masked."""
    found = cut.places
    masked = {name: own for name, own in cut.units.items() if found[name].kind in ("head", "channel")}
    others = {name: own for name, own in cut.units.items() if name not in masked}
    if not masked or any(found[name].kind != "residual" for name in others):
        return None
    if not others:
        return _zeroed_answer(model, found, masked, readers)
    back = whole_way_back(model)
    try:
        remove(model, find_cut(model, cut.structure, found, others))
        return _zeroed_answer(model, found, masked, readers)
    finally:
        back()


@torch.no_grad()
def _zeroed_answer(
    model: PreTrainedModel, found: Mapping[str, Units], gone: Mapping[str, list[int]], readers: Iterable[str]
) -> list[Tensor]:
    """Returns the answer of the model without some units, whose reading weights are zero for that long."""
    store = store_of(model)
    inside = {id(parameter) for block in store.blocks.values() for parameter in block.parameters()}
    outside = [one for one in reading(model, found, gone) if id(one[0]) not in inside]
    kept = [(weight, dim, at, weight.index_select(dim, at)) for weight, dim, at in outside]
    try:
        with store.altered(partial(_zero, model, found, gone)):
            for weight, dim, at, _ in kept:
                weight.index_fill_(dim, at, 0)
            return _answer(model, readers)
    finally:
        for weight, dim, at, values in reversed(kept):
            weight.index_copy_(dim, at, values)


@torch.no_grad()
def _zero(model: nn.Module, found: Mapping[str, Units], gone: Mapping[str, list[int]], block: nn.Module) -> list[nn.Parameter]:
    """Has what reads some units in a block be zero, and returns these parameters."""
    inside = {id(parameter) for parameter in block.parameters()}
    own = [(weight, dim, positions) for weight, dim, positions in reading(model, found, gone) if id(weight) in inside]
    for weight, dim, positions in own:
        weight.index_fill_(dim, positions, 0)
    return [weight for weight, _, _ in own]


@torch.no_grad()
def _answer(model: PreTrainedModel, readers: Iterable[str]) -> list[Tensor]:
    """Returns the outputs of the readers and of the model for small random inputs."""
    given: list[Any] = []
    modules = [model.get_submodule(reader) for reader in sorted(readers)]
    hooks = [module.register_forward_hook(lambda *call: given.append(call[-1])) for module in modules]
    try:
        with precisely(), resting(model):
            given.append(model(**small_inputs(model)))
    finally:
        for hook in hooks:
            hook.remove()
    values = [value for value in tree_leaves(given) if isinstance(value, Tensor) and value.is_floating_point()]
    return [value.detach().cpu().double() for value in values]


def _check_free(model: PreTrainedModel, units: Mapping[str, Units]) -> None:
    for name in {reader for one in units.values() for reader in one.readers}:
        if any(isinstance(hook, Gate) for hook in model.get_submodule(name)._forward_pre_hooks.values()):
            raise ValueError(f"units: a mask or gates stand before {name}: remove them first (mask.remove())")
