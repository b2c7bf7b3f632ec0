"""Removes units from tensors, optimizer state, and config, and checks the model's output."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.engine import store_of
from billhook.linalg import Indices, TensorsByName, in_float64, over_dims
from billhook.model import (
    LOST_TOKENS,
    Change,
    Fields,
    Shape,
    Swap,
    build_on_meta,
    change_blockwise,
    change_values,
    changed_constants,
    named_token_ids,
    outputs_match,
    record_shape,
    renumber_generation_config,
    restored_on_error,
    run_outputs,
    set_constants,
    set_fields,
    set_shape,
    shape_beyond_config,
    shape_of,
    small_inputs,
    snapshot_with_store,
    to_meta,
    tolerance,
    vocabulary_fingerprint,
    with_kept_tokens,
)
from billhook.pruning.cut import Cut, find_cut
from billhook.pruning.reshape import candidate_shapes
from billhook.tracing.trace import trace
from billhook.units import PLURAL, Gate, UnitNumbers, consumer_columns

Scale = Callable[[Tensor], Tensor]
"""Maps old weight values to new ones."""


class _Different(Exception):
    """The model's output differs from the masked model's, or its forward pass fails."""


def remove(model: PreTrainedModel, cut: Cut, key: Callable[[], str] = str) -> list[Swap]:
    """Removes units in place and returns the swaps that optimizers follow; undone on errors.

    If heads or MLP channels are removed, the output is compared with the model in which they are masked (without the hidden
    dimensions to remove). Otherwise, the model must run, have the planned units, and compute the same before and after its config
    changes. If tokens are removed, the logits of all others are compared. A mask on the units raises. A streamed model writes its
    blocks as they change; `key` returns the fingerprint of their initial values.
    """
    if not cut.units:
        return []
    _check_tokens(model, cut)
    readers = set()  # consumer layers that do not lose output rows, too
    for layer in cut.all_units.values():
        for reader in layer.own_readers:
            module = model.get_submodule(reader)
            if any(isinstance(hook, Gate) for hook in module._forward_pre_hooks.values()):
                raise ValueError(f"units: {reader} has a mask or gates. Remove them first with mask.remove().")
            dim = 1 if isinstance(module, Conv1D) else 0
            rows = {(f"{reader}.weight", dim), (f"{reader}.base_layer.weight", dim)}
            if layer.kind in ("head", "channel") and cut.cuts.keys().isdisjoint(rows):
                readers.add(reader)
    computes = model.device.type != "meta"
    ids_before, ids_after = _drawn_ids(model, cut) if computes else ({}, {})
    masked = _masked_answer(model, cut, readers, ids_before) if computes else None
    token_fields = with_kept_tokens(model.config, *cut.tokens) if cut.tokens else {}
    why = ""
    for shape, fields in candidate_shapes(model, cut):
        try:
            with store_of(model).restored_on_error(), restored_on_error(model):
                swaps = _cut_tensors(model, cut, shape, key)
                expected = masked
                if masked is None and computes and fields:
                    with suppress(_Different):  # of a model whose code asks the config for sizes
                        expected = _answer_or_differ(model, readers, ids_after)
                swaps += _change_config(model, fields)
                if cut.tokens:
                    set_fields(model.config, token_fields)  # also if the shape exceeds the config
                    renumber_generation_config(model, cut.tokens[0])
                    setattr(model, LOST_TOKENS, vocabulary_fingerprint(cut.tokens[0], getattr(model, LOST_TOKENS, 0)))
                record_shape(model)
                if computes:
                    answer = _answer_or_differ(model, readers, ids_after)
                    if expected is not None and not outputs_match(expected, answer, tolerance(model)):
                        raise _Different
            return swaps
        except _Different as different:
            why = str(different)
    what = _unit_names(cut)
    raise ValueError(
        f"{what} cannot be removed from {type(model).__name__}: its forward pass does not work with the smaller tensors"
        + (f" ({why})" if why else "")
        + (". Use bh.mask to mask them instead." if what == "heads" else "")
    )


def try_removal(model: PreTrainedModel, cut: Cut) -> PreTrainedModel:
    """Returns the model without some units, on the meta device.

    Raises if its code does not work with the smaller tensors, also once the model is rebuilt from its config.
    """
    meta_model = to_meta(model)
    remove(meta_model, cut)
    unbuilt, rebuilt = shape_beyond_config(meta_model), build_on_meta(meta_model, copy.deepcopy(meta_model.config))
    classes = {name: type(module) for name, module in meta_model.named_modules()}
    # a forward pass may have replaced modules that the class builds
    if unbuilt.tensors and any(classes.get(name) is not type(module) for name, module in rebuilt.named_modules()):
        try:
            trace(rebuilt)
        except ValueError:  # the rebuilt model does not run in its old shape, either
            return meta_model
        set_shape(rebuilt, unbuilt.over(shape_of(rebuilt)))
        try:
            trace(rebuilt)
        except ValueError as error:
            what = _unit_names(cut)
            raise ValueError(
                f"{what}: {type(model).__name__} runs without them, but not after it is saved and loaded, because its code "
                f"replaced modules that its class builds: {error}"
            ) from error
    return meta_model


def _unit_names(cut: Cut) -> str:
    """Returns the kinds of units to remove, in words."""
    return " or ".join(dict.fromkeys(PLURAL[cut.kinds[name]] for name in cut.units))


def _cut_tensors(model: PreTrainedModel, cut: Cut, shape: Shape, key: Callable[[], str]) -> list[Swap]:
    """Cuts tensors and returns the swapped parameters."""
    kept_of: dict[str, dict[int, Indices]] = {}
    for (name, dim), positions in cut.cuts.items():
        kept_of.setdefault(name, {})[dim] = positions
    parameters = dict(model.named_parameters())
    buffers = {name: selected(model.get_buffer(name), kept_of[name]) for name in kept_of if name not in parameters}

    def change_to(kept: Mapping[int, Indices]) -> Change:
        select = partial(selected, kept=kept)
        return Change(select, lambda _, state: select(state), select)

    changes = {name: change_to(kept) for name, kept in kept_of.items() if name in parameters}
    sizes = [
        (module, attribute)  # attributes with the size of the weight, as norms have
        for module in model.modules()
        if (weight := module._parameters.get("weight")) is not None
        for attribute, value in vars(module).items()
        if isinstance(value, tuple | list) and tuple(value) == tuple(weight.shape)
    ]
    if (stored := store_of(model).select(kept_of, shape.tensors)) is None:
        chosen = cut.units | {name: hashlib.sha256(lost.tobytes()).hexdigest() for name, lost in cut.by_expert.items()}
        swaps = change_blockwise(model, changes, f"units {chosen}", shape.tensors, key)
    else:
        swaps = change_values(model, {name: change for name, change in changes.items() if name not in stored})
    for module, attribute in sizes:
        setattr(module, attribute, type(getattr(module, attribute))(module.get_parameter("weight").shape))
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer
    set_shape(model, shape)
    return swaps


def selected(tensor: Tensor, kept: Mapping[int, Indices]) -> Tensor:
    """Returns the kept positions of a tensor, by dimension; see `Cuts`."""
    for dim, positions in sorted(kept.items(), key=lambda cut: -cut[1].ndim):  # positions in experts before experts
        index = torch.from_numpy(positions).to(tensor.device)
        tensor = tensor.index_select(dim, index) if index.dim() == 1 else tensor.gather(dim, over_dims(index, tensor, dim))
    return tensor


def _drawn_ids(model: PreTrainedModel, cut: Cut) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws ids of unnamed tokens that stay, by input name, before and after the removal."""
    if cut.tokens is None:
        return {}, {}
    kept, size = cut.tokens
    unnamed = np.flatnonzero(~np.isin(kept, list(named_token_ids(model, size))))
    generator = np.random.default_rng(0)
    before, after = {}, {}
    for name, value in small_inputs(model).items():
        if "input_ids" in name:
            numbers = generator.choice(unnamed if len(unnamed) else np.arange(len(kept)), value.shape)
            after[name] = torch.from_numpy(numbers).to(value)
            before[name] = torch.from_numpy(kept[numbers]).to(value)
    return before, after


def _check_tokens(model: PreTrainedModel, cut: Cut) -> None:
    """Raises for tokens of the configs, tables that PEFT copied, or positions that move."""
    if cut.tokens is None:
        return
    kept, size = cut.tokens
    named = named_token_ids(model, size)
    if lost := sorted(named.keys() - set(kept.tolist())):
        raise ValueError(f"tokens: {lost[0]} cannot be removed, because it is {named[lost[0]]}.")
    tables = [name for (name, _), positions in cut.cuts.items() if np.array_equal(positions, kept)]
    for name in tables:
        for part, option in {"modules_to_save": "modules_to_save", "token_adapter": "trainable_token_indices"}.items():
            if part in name.split("."):
                raise ValueError(
                    f"tokens: {option} of PEFT keeps tokens beside {name}, which do not follow. Merge adapters first."
                )
    weights = [parameter for name, parameter in model.named_parameters() if name in tables]
    for name, module in model.named_modules():
        first = module.padding_idx if isinstance(module, nn.Embedding) else None
        if first in named and not any(module.weight is weight for weight in weights):  # a table of positions, as RoBERTa's
            new = int(np.searchsorted(kept, first))
            if new != first:
                raise ValueError(
                    f"tokens: {name} counts from {named[first]}={first}, which would be {new}. Keep all tokens below it."
                )


def _masked_answer(model: PreTrainedModel, cut: Cut, readers: Iterable[str], ids: TensorsByName) -> list[Tensor] | None:
    """Returns the output with removed units masked; None if nothing can be masked.

    Heads and channels are masked, and logits of removed tokens are left out. The hidden dimensions to remove are removed for this
    run and restored afterwards.
    """
    masked = {name: numbers for name, numbers in cut.units.items() if cut.kinds[name] in ("head", "channel")}
    residual = {name: numbers for name, numbers in cut.units.items() if cut.kinds[name] == "residual"}
    others = [name for name in cut.units if cut.kinds[name] == "expert"]
    if others or not (masked or (cut.tokens and not residual)):
        return None
    back = snapshot_with_store(model) if residual else None
    try:
        if residual:
            remove(model, find_cut(model, cut.structure, cut.all_units, residual))
        answer = _zeroed_answer(model, cut, masked, readers, ids)
    finally:
        if back is not None:
            back()
    if cut.tokens is not None:  # of the logits, those of the tokens that remain
        kept, size = cut.tokens
        answer = [o[..., torch.from_numpy(kept)] if o.dim() and o.shape[-1] == size else o for o in answer]
    return answer


@torch.no_grad()
def _zeroed_answer(
    model: PreTrainedModel,
    cut: Cut,
    removed: UnitNumbers,
    readers: Iterable[str],
    ids: TensorsByName,
) -> list[Tensor]:
    """Returns the output while the consumer columns of some units are zero."""
    store, layers, by_expert = store_of(model), cut.all_units, cut.by_expert
    in_blocks = _parameter_ids(store.blocks.values())
    columns = [read for read in consumer_columns(model, layers, removed, by_expert) if id(read[0]) not in in_blocks]
    values = [weight.gather(dim, index) for weight, dim, index in columns]

    @torch.no_grad()  # no_grad is per thread, and blocks may load in another
    def zero(block: nn.Module) -> list[nn.Parameter]:
        """Zeroes the consumer columns in a loaded block and returns their parameters."""
        parameters = _parameter_ids([block])
        reads = [read for read in consumer_columns(model, layers, removed, by_expert) if id(read[0]) in parameters]
        for weight, dim, index in reads:
            weight.scatter_(dim, index, 0)
        return [weight for weight, _, _ in reads]

    try:
        with store.altered(zero):
            for weight, dim, index in columns:
                weight.scatter_(dim, index, 0)
            return run_outputs(model, ids, readers)
    finally:
        # reversed, because two units may share columns
        for (weight, dim, index), old in reversed(list(zip(columns, values, strict=True))):
            weight.scatter_(dim, index, old)


def _parameter_ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _answer_or_differ(model: PreTrainedModel, readers: Iterable[str], ids: TensorsByName) -> list[Tensor]:
    try:
        return run_outputs(model, ids, readers)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # such as a kernel with an alignment
        raise _Different(str(error).partition("\n")[0]) from error


def _change_config(model: PreTrainedModel, fields: Fields) -> list[Swap]:
    """Changes the config and its derived numbers, and rescales embeddings to compensate.

    If an embedding is tied to the output, the norm before the output is scaled back. Their optimizer state restarts.
    """
    before = copy.deepcopy(model.config)
    set_fields(model.config, fields)
    numbers = changed_constants(model, before) if fields else {}
    of_modules: dict[str, dict[str, tuple[float, float]]] = {}
    for name, old_and_new in numbers.items():
        owner, _, attribute = name.rpartition(".")
        of_modules.setdefault(owner, {})[attribute] = old_and_new
    changes: dict[str, Change] = {}
    for owner, of_module in of_modules.items():
        scales = _scales(model, owner, of_module)
        if scales is None:
            attribute, (old, new) = next(iter(of_module.items()))
            name = f"{owner}.{attribute}".lstrip(".")
            raise _Different(
                f"{name} follows from the config, {old:.4g} before and {new:.4g} after, and no weights compensate for it"
            )
        changes |= {name: Change(scale, None) for name, scale in scales.items()}
    set_constants(model, numbers)
    return change_values(model, changes)


def _scales(model: PreTrainedModel, owner: str, numbers: Mapping[str, tuple[float, float]]) -> dict[str, Scale] | None:
    """Finds weight scales that compensate for changed numbers, on a small copy, or None."""
    module = model.get_submodule(owner)
    if not isinstance(module, nn.Embedding):
        return None
    old, new = ({name: pair[index] for name, pair in numbers.items()} for index in (0, 1))
    used = next((name for name in numbers if name in module._buffers), next(iter(numbers)))
    before, after = torch.tensor(numbers[used]).to(module.weight.dtype).tolist()  # rounded as in the forward pass
    ratio, tokens = before / after, torch.arange(3)
    up = partial(torch.mul, other=ratio)
    if not _alike(_small_output(module, tokens, old), _small_output(module, tokens, new, up)):
        return None
    scales = {f"{owner}.weight": up}
    tied = any(other is not module and other._parameters.get("weight") is module.weight for other in model.modules())
    norm = _divided_norm(model, module.embedding_dim, ratio) if tied else {}
    return None if norm is None else scales | norm


def _divided_norm(model: PreTrainedModel, width: int, ratio: float) -> dict[str, Scale] | None:
    """Finds how to divide the output of the last norm by scaling its weight, or None."""

    def divide_with_one(weight: Tensor) -> Tensor:
        """Divides 1 + weight, by which Gemma's norms multiply."""
        return (1 + in_float64(weight)).div(ratio).sub(1).to(weight)

    norms = []
    for name, module in model.named_modules():
        if [(part, tuple(parameter.shape)) for part, parameter in module.named_parameters()] == [("weight", (width,))]:
            norms.append((name, module))
    if norms:
        name, norm = norms[-1]
        inputs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(norm.get_parameter("weight").dtype)
        for down in (partial(torch.div, other=ratio), divide_with_one):
            if _alike(_small_output(norm, inputs, {}) / ratio, _small_output(norm, inputs, {}, down)):
                return {f"{name}.weight": down}
    return None


@torch.no_grad()
def _small_output(module: nn.Module, inputs: Tensor, numbers: Mapping[str, float], scale: Scale | None = None) -> Tensor:
    """Computes the output of a narrow copy of a module with given numbers and weight scale."""
    small, like = copy.copy(module), module.get_parameter("weight")
    weight = torch.randn((3, 4)[-like.dim() :], generator=torch.Generator().manual_seed(1)).to(like.dtype)
    small._parameters = {"weight": nn.Parameter(weight if scale is None else scale(weight), requires_grad=False)}
    small._buffers = {name: torch.tensor(number) for name, number in numbers.items() if name in module._buffers}
    vars(small).update({name: number for name, number in numbers.items() if name not in module._buffers})
    output: Tensor = type(module).forward(small, inputs)
    return output


def _alike(a: Tensor, b: Tensor) -> bool:
    rounding = max(torch.finfo(dtype).eps for dtype in (a.dtype, torch.float32))  # norms compute in float32 at best
    return torch.allclose(a, b, rtol=8 * rounding, atol=16 * rounding)
