"""`billhook inspect` and `summary`: coupled units, possible checkpoints, and sizes."""

import json as json_format
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from billhook.arguments import check_one_of
from billhook.checkpoints.save import Way, load, way_of
from billhook.cli.machine import file_progress
from billhook.display import render
from billhook.engine.memory import StreamedSize, streamed_size
from billhook.engine.state import evaluating_without_grad
from billhook.engine.store import store_of
from billhook.engine.trees import tree_leaves
from billhook.kv_heads.config import kv_heads_of
from billhook.kv_heads.plan import plan_kv_heads
from billhook.model.config_fields import Fields, fields_of, set_fields
from billhook.model.inputs import small_inputs
from billhook.model.meta import from_name
from billhook.model.shape import shape_beyond_config, to_entry
from billhook.model.streamed import outline
from billhook.pruning.amount import kernel_multiple
from billhook.pruning.cut import find_cut
from billhook.pruning.removal import try_removal
from billhook.report.summary import summary as summarise
from billhook.serving.engines import GPUS, Verdict, can_split, engines, grouped, verdicts
from billhook.tracing.groups import Group, Kind
from billhook.tracing.show import fold_groups, group_to_json, kind_name, labeled_notes
from billhook.tracing.trace import trace
from billhook.units.fields import SHOWN, FieldFinder
from billhook.units.find import units_of, why_not
from billhook.units.units import UnitKind, Units

Operands = list[tuple[str, tuple[float, ...]]]
"""Operations in call order, each with the scalars among its arguments."""


class _ScalarRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the scalar arguments of operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operands: Operands = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - any result of an operation
        leaves = tree_leaves([args, dict(kwargs or {})])
        values = [leaf.item() if _is_known_scalar(leaf) else leaf for leaf in leaves]
        self.operands.append((str(func), tuple(value for value in values if isinstance(value, int | float))))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:  # `item()` of a meta tensor
            return args[0].dtype == torch.bool or 1
        return func(*args, **(kwargs or {}))


def _is_known_scalar(leaf: object) -> bool:
    """Returns True for a tensor with one element that has a value."""
    return isinstance(leaf, torch.Tensor) and not leaf.is_meta and leaf.numel() == 1


def operands_of(model: PreTrainedModel) -> Operands | None:
    """Returns the scalars in a forward pass, also on meta tensors; None if it does not run."""
    recorder = _ScalarRecorder()
    try:
        with evaluating_without_grad(model), recorder:
            model(**small_inputs(model))
    except Exception:  # a model may raise anything
        return None
    return recorder.operands


CHOICES: dict[str, tuple[Kind, ...]] = {
    "heads": ("kv_head", "query_head", "head"),
    "channels": ("channel",),
    "residual": ("residual",),
    "experts": ("expert",),
    "ranks": ("rank",),
    "dimensions": ("query_key", "value", "rotary", "state"),
    "tables": ("vocab", "position", "label"),
    "fixed": ("fixed",),
}

UNITS: dict[Kind, UnitKind] = {
    "kv_head": "head", "query_head": "head", "head": "head", "channel": "channel", "residual": "residual", "expert": "expert",
}  # fmt: skip
"""Kinds of groups whose units `plan` can remove."""


def inspect(model: str, group: str | None = None, json: bool = False, stream: bool = False) -> None:
    """Prints the coupled units of a model, and its options for pruning, saving, and serving.

    Only the config is read; no weights are downloaded.

    Args:
        model: A folder, a config.json, a Hub name, or "tiny".
        group: Kind of unit to print: heads, channels, residual, experts, ranks, dimensions, tables, or fixed. Defaults to all.
        json: If true, prints everything as JSON.
        stream: If true, also prints the size of blocks for streaming, from the headers of the safetensors files.

    Raises:
        ValueError: If the kind is unknown, transformers has no such model, or the model cannot be traced.
    """
    if group is not None:
        check_one_of("group", group, CHOICES)
    streamed = _streamed(model) if stream else None
    meta_model = from_name(model)
    structure = trace(meta_model)
    groups = [units for units in structure.groups if group is None or units.kind in CHOICES[group]]
    savings = find_savings(meta_model, groups)
    converted = conversion(meta_model)
    served = serving(meta_model)
    if json:
        plain = structure.to_json()
        plain["groups"] = _groups_json(groups, savings)
        plain |= {"conversion": converted, "serving": list(map(asdict, served))}
        plain |= {} if streamed is None else {"streamed": asdict(streamed)}
        print(json_format.dumps(plain, indent=1))
        return
    print(structure.show(groups))
    notes = _saving_notes(savings, FieldFinder(meta_model))
    if group in (None, "heads"):
        notes.append(("conversion", converted["says"]))
    parts = [labeled_notes(notes)] if notes else []
    if group is None:
        parts.append(labeled_notes([("" if number else "engines", *verdict) for number, verdict in enumerate(grouped(served))]))
    if streamed is not None:
        parts.append(labeled_notes([("streaming", streamed.text())]))
    for part in parts:
        print(f"\n{render(part)}")


def _groups_json(groups: Sequence[Group], savings: Sequence["Saving"]) -> list[dict[str, Any]]:
    """Returns groups as plain data, with the config fields of their units."""
    fields = dict[int, list[str]]()
    for saving in savings:
        fields |= dict.fromkeys((group.number for group in saving.groups), list(saving.fields))
    return [group_to_json(group) | {"config_fields": fields.get(group.number, [])} for group in groups]


def summary(model: str, stream: bool = False) -> None:
    """Prints the size of a model: parameters, zeros, heads, KV-cache bytes per token, FLOPs.

    Args:
        model: A folder, a Hub name, or "tiny".
        stream: If true, does not load the model: zeros are counted in the files, a few rows at a time, but not on the Hub.
    """
    with file_progress(f"{'opening' if stream else 'loading'} {model}"):
        size = summarise(outline(model) if stream else load(model))
    print(size)


def _streamed(model: str) -> StreamedSize:
    """Returns the sizes of a model's blocks, from the headers of its files."""
    with file_progress(f"opening {model}"):
        store = store_of(outline(model))
    if store.holds_all:
        raise ValueError(f"stream=True: '{model}' has no blocks to stream. Remove --stream.")
    return streamed_size(store)


@dataclass(frozen=True)
class Saving:
    """How a model with fewer units of some groups would be saved.

    Attributes:
        groups: Groups of the same kind and size.
        fields: Config fields that count the units; empty if none does.
        reason: Why the units cannot be removed; empty if they can.
        refusing: Engines that run other models of the class, but not the smaller model.
    """

    groups: list[Group]
    fields: tuple[str, ...]
    reason: str = ""
    refusing: tuple[str, ...] = ()


def find_savings(model: PreTrainedModel, groups: Sequence[Group]) -> list[Saving]:
    """Finds the config fields for the units of each kind of group, if layers are uniform.

    Without such a field, a model with fewer units has no standard checkpoint. Units that `plan` supports are removed on meta
    tensors to see how `save` would write the smaller model.
    """
    finder = FieldFinder(model)
    by_size: dict[tuple[Kind, int], list[Group]] = {}
    for folded in fold_groups([group for group in groups if not group.reason]):
        by_size.setdefault((folded[0].kind, folded[0].size), []).extend(folded)
    savings: list[Saving] = []
    for kind in by_size.values():
        savings += _savings_of_kind(model, kind, finder)
    return savings


def _savings_of_kind(model: PreTrainedModel, kind: list[Group], finder: FieldFinder) -> list[Saving]:
    """Removes units of each set of layers, or of all layers if the code requires it."""
    fields = finder.find(kind)
    parts = [kind] if fields else fold_groups(kind)
    savings = []
    for part in parts:
        saving = _try_removing(model, part, fields or finder.find(part), finder)
        if saving is not None:
            savings.append(saving)
    if len(savings) == len(parts) > 1 and not any(saving.fields for saving in savings):
        uniform = _try_removing(model, kind, (), finder)
        if uniform is not None and (uniform.fields or (not uniform.reason and all(saving.reason for saving in savings))):
            return [uniform]
    return savings


def _try_removing(model: PreTrainedModel, part: list[Group], fields: tuple[str, ...], finder: FieldFinder) -> Saving | None:
    """Removes a few units on meta tensors; None if `plan` supports only other units."""
    kind, size = UNITS.get(part[0].kind), part[0].size
    if kind is None:
        return Saving(part, fields)
    structure = trace(model)
    leaves = {structure.groups[group.number].leaf for group in part}
    try:
        every = units_of(model, structure, [kind])
    except ValueError as error:
        return Saving(part, (), str(error))
    units = {name: layer for name, layer in every.items() if leaves & set(layer.leaves)}
    if not units:
        first = structure.groups[part[0].number]
        why = why_not(model, structure, first) if kind == "channel" and not every else ""
        return Saving(part, (), f"they {why}") if why else None
    step = max(map(partial(kernel_multiple, model), units.values()))
    reason, saving = "", None
    for count in _counts_to_try(size, step, finder.counts(size, fields) if fields else []):
        try:  # code may run, and a config express the shape, with some numbers of units only
            shrunk = try_removal(model, find_cut(model, structure, every, _last(units, part[0], count)))
        except ValueError as error:
            reason = reason or str(error)
            continue
        way, config = way_of(shrunk)
        new_fields = _fields_of_shrunk(model, shrunk, fields, way, config)
        saving = Saving(part, new_fields, refusing=_refusing_engines(shrunk, config) if new_fields else ())
        if new_fields:
            break
    return saving or Saving(part, (), reason)


def _counts_to_try(size: int, step: int, legal: Sequence[int]) -> list[int]:
    """Returns numbers of units to keep: the largest legal multiple, or typical numbers."""
    multiples = [count for count in legal if not count % step]
    return multiples[:1] or list(dict.fromkeys(count // step * step or size for count in (size - 1, size // 2, size * 2 // 3)))


def _fields_of_shrunk(
    model: PreTrainedModel, shrunk: PreTrainedModel, fields: tuple[str, ...], way: Way, config: PretrainedConfig
) -> tuple[str, ...]:
    """Returns the config fields for the smaller number of units; empty without fields."""
    old, new = fields_of(model.config), dict[str, int]()
    for name, value in fields_of(config).items():
        if (name in old or name == "head_dim") and type(value) is int and old.get(name) != value:
            new[name] = value
    if way == "plain" and new and _reads_fields(shrunk, {name: old[name] for name in new if name in old}):
        return ()
    return () if way == "shaped" else fields or tuple(new)


def _refusing_engines(shrunk: PreTrainedModel, config: PretrainedConfig) -> tuple[str, ...]:
    """Returns the engines that do not run a saved model."""
    same_family = isinstance(shrunk.config, type(config))
    kind = type(shrunk).__name__ if same_family else (config.architectures or [""])[0]
    return tuple(verdict.engine for verdict in verdicts(kind, config) if verdict.supported is False)


def serving(model: PreTrainedModel) -> list[Verdict]:
    """Returns which engines run a model."""
    shape = shape_beyond_config(model)
    return verdicts(type(model).__name__, model.config, to_entry(shape) if shape.tensors else None)


def _reads_fields(shrunk: PreTrainedModel, before: Fields) -> bool:
    """Returns True if a forward pass computes with scalars from these config fields."""
    operands_of(shrunk)  # a first run may change a model, such as BigBird with few tokens
    with_new = operands_of(shrunk)
    set_fields(shrunk.config, before)
    with_old = operands_of(shrunk)
    return with_old is not None and with_old != with_new


def _last(units: Mapping[str, Units], group: Group, kept: int) -> dict[str, list[int]]:
    """Returns the units after the first few by module; for query heads, of each query group."""
    last = {}
    for name, layer in units.items():
        count = layer.count("kv_head")
        if group.kind == "query_head":
            last[name] = [unit for head in range(count) for unit in layer.query_heads([head])[kept:]]
        else:
            last[name] = layer.query_heads(range(count * kept // group.size, count))
    return last


def _saving_notes(savings: Sequence[Saving], finder: FieldFinder) -> list[tuple[str, str]]:
    notes: dict[tuple[str, str], None] = {}
    for saving in savings:
        group, fields = saving.groups[0], saving.fields
        note = "fewer give a billhook checkpoint (no config field counts them)"
        if saving.reason:
            note = f"cannot be removed: {saving.reason}"
        elif fields:
            numbers = _legal_numbers(group.size, finder.counts(group.size, fields))
            note = f"{numbers} give a standard checkpoint ({', '.join(fields)})"
            note += f"; {' and '.join(saving.refusing)} will not run it" if saving.refusing else ""
        notes["saving", f"{kind_name(group)} ({group.size:,}): {note}"] = None
    return list(notes)


def _legal_numbers(size: int, legal: Sequence[int]) -> str:
    """Returns the legal numbers below a size as text, given the largest few."""
    if list(legal) == list(range(size - 1, max(size - 1 - SHOWN, 0), -1)):
        return "smaller numbers"
    *others, last = [f"{number:,}" for number in legal] or ["none"]
    if len(legal) == SHOWN and legal[-1] > 1:
        return f"{', '.join([*others, last])} ..."
    return f"{', '.join(others)} or {last}" if others else last


def conversion(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the possible numbers of KV heads of a model, and a sentence (`says`) on them."""
    legal, reason = list[int](), "it has one KV head"
    try:
        before = kv_heads_of(model)
    except ValueError as error:
        return {"num_key_value_heads": None, "legal": [], "says": f"no: {error}"}
    for number in [n for n in range(1, before) if before % n == 0]:
        try:
            plan_kv_heads(model, number)
            legal.append(number)
        except ValueError as error:
            reason = str(error)
    says = f"{before} KV heads to {' or '.join(map(str, legal))}{_unsplittable(model, legal)}" if legal else f"no: {reason}"
    return {"num_key_value_heads": before if legal or before == 1 else None, "legal": legal, "says": says}


def _unsplittable(model: PreTrainedModel, legal: Sequence[int]) -> str:
    """Returns the numbers of KV heads that tensor parallelism cannot split."""
    cases = []
    for number in legal:
        if gpus := [str(count) for count in GPUS if not can_split(number, count)]:
            cases.append(f"{number} over {' or '.join(gpus)} GPUs")
    known = type(model).__name__ in engines()["files"]
    return f"; vLLM and SGLang cannot split {', '.join(cases)}" if cases and known else ""
