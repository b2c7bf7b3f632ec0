"""`billhook inspect` and `summary`: the coupled units of a model, what can be done with them, and what a checkpoint weighs."""

import json as json_format
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from billhook.arguments import check_one_of
from billhook.checkpoints.save import Way, load, way_of
from billhook.cli.machine import files
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
from billhook.tracing.show import fold_groups, kind_name, labeled_notes
from billhook.tracing.trace import trace
from billhook.units.fields import SHOWN, FieldFinder
from billhook.units.find import units_of, why_not
from billhook.units.units import UnitKind, Units

Operands = list[tuple[str, tuple[float, ...]]]
"""The name of each op, in the order of calls, and the single numbers among its arguments."""


class _Numbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the single numbers that ops are given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Operands = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - what an op returns
        leaves = tree_leaves([args, dict(kwargs or {})])
        values = [leaf.item() if _is_single(leaf) else leaf for leaf in leaves]
        numbers = tuple(value for value in values if isinstance(value, int | float))
        self.seen.append((str(func), numbers))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:  # code that asks for a value
            return args[0].dtype == torch.bool or 1
        return func(*args, **(kwargs or {}))


def _is_single(leaf: object) -> bool:
    """Says whether a tensor is a single number whose value is known."""
    return isinstance(leaf, torch.Tensor) and not leaf.is_meta and leaf.numel() == 1


def operands_of(model: PreTrainedModel) -> Operands | None:
    """Returns the numbers that a model, also one on meta tensors, computes with; None if it does not run."""
    numbers = _Numbers()
    try:
        with evaluating_without_grad(model), numbers:
            model(**small_inputs(model))
    except Exception:  # whatever a model raises
        return None
    return numbers.seen


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
"""The kinds of groups whose units `plan` removes."""


def inspect(model: str, group: str | None = None, json: bool = False, stream: bool = False) -> None:
    """Prints the coupled units of a model, where they are, and what can be pruned, converted and saved.

    Only the config is read: no weights are downloaded.

    Args:
        model: A folder, a config.json, a hub name, or "tiny".
        group: Only units of this kind: heads, channels, residual, experts, ranks, dimensions, tables or fixed.
        json: Print everything as JSON.
        stream: Whether it is also said how the model streams, as the headers of its safetensors files tell it.

    Raises:
        ValueError: If there is no such kind, transformers has no such model, or the model cannot be traced.
    """
    if group is not None:
        check_one_of("group", group, CHOICES)
    streamed = _streamed(model) if stream else None
    meta_model = from_name(model)
    structure = trace(meta_model)
    groups = [units for units in structure.groups if group is None or units.kind in CHOICES[group]]
    saved = saving(meta_model, groups)
    converted = conversion(meta_model)
    served = serving(meta_model)
    if json:
        config_fields = {units.number: list(saving.fields) for saving in saved for units in saving.groups}
        plain, wanted = structure.to_json(), {units.number for units in groups}
        shown = [units for units in plain["groups"] if units["number"] in wanted]
        plain["groups"] = [units | {"config_fields": config_fields.get(units["number"], [])} for units in shown]
        plain |= {"conversion": converted, "serving": [asdict(verdict) for verdict in served]}
        plain |= {} if streamed is None else {"streamed": asdict(streamed)}
        print(json_format.dumps(plain, indent=1))
        return
    print(structure.show(groups))
    notes = _saved_notes(saved, FieldFinder(meta_model))
    if group in (None, "heads"):
        notes.append(("converted", converted["says"]))
    parts = [labeled_notes(notes)] if notes else []
    if group is None:
        parts.append(labeled_notes([("" if number else "served", *verdict) for number, verdict in enumerate(grouped(served))]))
    if streamed is not None:
        parts.append(labeled_notes([("streamed", streamed.text())]))
    for part in parts:
        print(f"\n{render(part)}")


def summary(model: str, stream: bool = False) -> None:
    """Prints what a checkpoint weighs: parameters, zeros, heads, KV-cache bytes per token, FLOPs.

    Args:
        model: A folder, a hub name, or "tiny".
        stream: Whether the model stays in its files: only zeros are counted in them, a few rows at a time; not in those that are
            still on a hub.
    """
    with files(f"{'opening' if stream else 'loading'} {model}"):
        size = summarise(outline(model) if stream else load(model))
    print(size)


def _streamed(model: str) -> StreamedSize:
    """Finds how a model streams; of its files only headers are read."""
    with files(f"opening {model}"):
        store = store_of(outline(model))
    if store.holds_all:
        raise ValueError(f"stream=True: '{model}' has no blocks that could come and go")
    return streamed_size(store)


@dataclass(frozen=True)
class Saving:
    """How a model with fewer units is saved: alike units, the config fields that count them, and why they cannot be removed.

    The last are the engines that do not serve what is saved then, and would serve others of its class.
    """

    groups: list[Group]
    fields: tuple[str, ...]
    reason: str = ""
    refusing: tuple[str, ...] = ()


def saving(model: PreTrainedModel, groups: Sequence[Group]) -> list[Saving]:
    """Finds the config fields that count the units of each kind of group that may be pruned, alike in all layers.

    Without such a field, a model with fewer units is not a plain checkpoint of its family. Units that `plan` removes are removed
    for it, on meta tensors, and `save` asked.
    """
    finder = FieldFinder(model)
    alike: dict[tuple[Kind, int], list[Group]] = {}
    for folded in fold_groups([group for group in groups if not group.reason]):
        alike.setdefault((folded[0].kind, folded[0].size), []).extend(folded)
    savings: list[Saving] = []
    for kind in alike.values():
        fields = finder.find(kind)
        parts = [kind] if fields else fold_groups(kind)
        tries = [_tried(model, part, fields or finder.find(part), finder) for part in parts]
        done = [saving for saving in tries if saving is not None]
        if len(parts) > 1 and len(done) == len(tries) and not any(saving.fields for saving in done):
            together = _tried(model, kind, (), finder)  # some code and configs follow only where all layers lose as many
            none_alone = all(saving.reason for saving in done)
            if together is not None and (together.fields or (none_alone and not together.reason)):
                done = [together]
        savings += done
    return savings


def _tried(model: PreTrainedModel, part: list[Group], fields: tuple[str, ...], finder: FieldFinder) -> Saving | None:
    """Removes a few units, and finds how the rest would be saved; None if `plan` knows none of these, and others."""
    kind, size = UNITS.get(part[0].kind), part[0].size
    if kind is None:
        return Saving(part, fields)
    structure, numbers = trace(model), {group.number for group in part}
    leaves = {group.leaf for group in structure.groups if group.number in numbers}
    try:
        every = units_of(model, structure, [kind])
    except ValueError as error:
        return Saving(part, (), str(error))
    units = {name: layer for name, layer in every.items() if leaves & set(layer.leaves)}
    if not units:
        first = next(group for group in structure.groups if group.number in numbers)
        why = why_not(model, structure, first) if kind == "channel" and not every else ""
        return Saving(part, (), f"they {why}") if why else None
    step = max(kernel_multiple(model, layer) for layer in units.values())
    legal = [count for count in finder.counts(size, fields) if not count % step] if fields else []
    refusal, saving = "", None
    for left in legal[:1] or dict.fromkeys(count // step * step or size for count in (size - 1, size // 2, size * 2 // 3)):
        try:  # with some numbers of units, code may run, or a config say them, and with others not
            last = {name: _last(layer, part[0], left) for name, layer in units.items()}
            shrunk = try_removal(model, find_cut(model, structure, every, last))
        except ValueError as error:
            refusal = refusal or str(error)
            continue
        way, config = way_of(shrunk)
        then = _fields_then(model, shrunk, fields, way, config)
        saving = Saving(part, then, refusing=_refusing(shrunk, config) if then else ())
        if then:
            break
    return saving or Saving(part, (), refusal)


def _fields_then(
    model: PreTrainedModel, shrunk: PreTrainedModel, fields: tuple[str, ...], way: Way, config: PretrainedConfig
) -> tuple[str, ...]:
    """Returns the fields of the config that say so many units, those that are given or others; none if it is saved as shaped."""
    now = fields_of(model.config)
    known = {name: value for name, value in fields_of(config).items() if name in now or name == "head_dim"}
    then = {name: value for name, value in known.items() if type(value) is int and now.get(name) != value}
    if way == "plain" and then and _computes_otherwise(shrunk, {name: now[name] for name in then if name in now}):
        return ()
    return () if way == "shaped" else fields or tuple(then)


def _refusing(shrunk: PreTrainedModel, config: PretrainedConfig) -> tuple[str, ...]:
    """Returns the engines that do not serve a model as it is saved, by a config of its own family or of another."""
    same_family = isinstance(shrunk.config, type(config))
    kind = type(shrunk).__name__ if same_family else (config.architectures or [""])[0]
    return tuple(verdict.engine for verdict in verdicts(kind, config) if verdict.supported is False)


def serving(model: PreTrainedModel) -> list[Verdict]:
    """Finds the engines that serve a model as it is, and those that do not."""
    shape = shape_beyond_config(model)
    return verdicts(type(model).__name__, model.config, to_entry(shape) if shape.tensors else None)


def _computes_otherwise(shrunk: PreTrainedModel, before: Fields) -> bool:
    """Says whether a forward takes other numbers from a changed config than from the one before, which is then not changed."""
    operands_of(shrunk)  # a first run may change what a model does, as BigBird's with few tokens
    then = operands_of(shrunk)
    set_fields(shrunk.config, before)
    now = operands_of(shrunk)
    return now is not None and now != then


def _last(units: Units, group: Group, left: int) -> list[int]:
    """Returns the units after the first few; of query heads, those of each KV head."""
    count = units.count("kv_head")
    if group.kind == "query_head":
        return [unit for head in range(count) for unit in units.query_heads([head])[left:]]
    return units.query_heads(range(count * left // group.size, count))


def _saved_notes(saved: Sequence[Saving], finder: FieldFinder) -> list[tuple[str, str]]:
    notes: dict[tuple[str, str], None] = {}
    for saving in saved:
        group, fields = saving.groups[0], saving.fields
        how = "fewer make no plain checkpoint: no field of the config counts them"
        if saving.reason:
            how = f"none can be removed: {saving.reason}"
        elif fields:
            how = f"{_numbers(group.size, finder.counts(group.size, fields))} make a plain checkpoint, by {', '.join(fields)}"
            how += f", which {' and '.join(saving.refusing)} will not run" if saving.refusing else ""
        notes["saved", f"{kind_name(group)} ({group.size:,}): {how}"] = None
    return list(notes)


def _numbers(size: int, legal: Sequence[int]) -> str:
    """Names the legal numbers below a size, given the highest few."""
    if list(legal) == list(range(size - 1, max(size - 1 - SHOWN, 0), -1)):
        return "any fewer"
    *most, last = [f"{number:,}" for number in legal] or ["none"]
    if len(legal) == SHOWN and legal[-1] > 1:
        return f"{', '.join([*most, last])} ..."
    return f"{', '.join(most)} or {last}" if most else last


def conversion(model: PreTrainedModel) -> dict[str, Any]:
    """Finds the numbers of KV heads that a model can be converted to, or why it cannot; `says` is a sentence about that."""
    legal, refused = list[int](), "there is one KV head already"
    try:
        before = kv_heads_of(model)
    except ValueError as error:
        return {"num_key_value_heads": None, "legal": [], "says": f"no: {error}"}
    for number in [n for n in range(1, before) if before % n == 0]:
        try:
            plan_kv_heads(model, number)
            legal.append(number)
        except ValueError as error:
            refused = str(error)
    if before > 1 and not legal:
        return {"num_key_value_heads": None, "legal": [], "says": f"no: {refused}"}
    says = f"{before} KV heads to {' or '.join(map(str, legal))}{_unshared(model, legal)}" if legal else f"no: {refused}"
    return {"num_key_value_heads": before, "legal": legal, "says": says}


def _unshared(model: PreTrainedModel, legal: Sequence[int]) -> str:
    """Names the numbers of KV heads that tensor parallelism cannot share out, if engines serve the class."""
    odd = {number: [str(gpus) for gpus in GPUS if not can_split(number, gpus)] for number in legal}
    named = [f"{number} over {' or '.join(gpus)} GPUs" for number, gpus in odd.items() if gpus]
    known = type(model).__name__ in engines()["files"]
    return f"; vLLM and SGLang cannot share out {', '.join(named)}" if named and known else ""
