"""Which blocks are removed from a model, and how its numbers and its config follow, as a plan that is checked and applied."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, ClassVar

from rich.console import RenderableType
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import Self

from billhook.display import columns
from billhook.engine.state import uninterrupted
from billhook.engine.store import store_of
from billhook.model.config_fields import Fields, build_on_meta, set_fields, with_fields
from billhook.model.find import find_transformer
from billhook.model.inputs import alike, answer, cached_answer, tolerance
from billhook.model.meta import to_meta
from billhook.model.plan import ShapePlan, Weights, starting_from
from billhook.model.shape import keep, note_shape, numbers_of, shape_of
from billhook.model.surgery import Follow, undone_by_errors
from billhook.pruning.block_fields import Numbers, find_then
from billhook.units.blocks import block_of, find_blocks, skipping
from billhook.units.units import UnitKind


@dataclass(frozen=True, repr=False)
class BlockPlan(ShapePlan):
    """Which blocks are removed, by stack; `print` shows a table.

    Attributes:
        made_for: A digest of the names and sizes of the model's tensors, and of the blocks that it has lost before.
        fields: Fields of the config, those of nested configs with dots, with their new values.
        attributes: The attributes that number blocks, by their new names: their values before and after.
        scores: By stack, the score of each block; only shown.
    """

    kind: ClassVar[str] = "blocks"

    model: str
    made_for: str
    units: dict[str, list[int]]
    before: dict[str, tuple[int, ...]]
    fields: Fields
    attributes: Numbers
    parameters: tuple[int, int]
    scores: dict[str, list[float]] = field(default_factory=dict, compare=False)

    @property
    def kinds(self) -> dict[str, UnitKind]:
        """The kind of the units of each stack: blocks."""
        return dict.fromkeys(self.before, "block")

    @property
    def after(self) -> dict[str, tuple[int, ...]]:
        """By stack, the number of blocks that remain."""
        return {name: (count - len(self.units.get(name, ())),) for name, (count,) in self.before.items()}

    @property
    def words(self) -> str:
        """How many blocks are removed, in words."""
        return f"{sum(map(len, self.units.values())):,} of {sum(count for (count,) in self.before.values()):,} blocks"

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data; see `ModelPlan.to_json`."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def _read(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        try:
            own = {name: value for name, value in plain.items() if name != "kind"}
            own["attributes"] = {name: (before, after) for name, (before, after) in plain["attributes"].items()}
            own["before"] = {name: (int(count),) for name, (count,) in plain["before"].items()}
            before, after = plain["parameters"]
            plan = cls(**own | {"parameters": (before, after)})
            whole = all(type(number) is int for own in plan.units.values() for number in own)
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"plan: it is not as to_json returns it ({type(error).__name__}: {error})") from error
        if not whole:
            raise ValueError(f"plan: units is {str(plan.units)[:80]!r}, and must be lists of numbers by stack")
        plan.check_made_for(model)
        return plan

    def check_made_for(self, model: nn.Module) -> None:
        """Refuses a model that the plan was not made for; see `ModelPlan.check_made_for`."""
        subject = find_transformer(model)
        if (self.model, self.made_for) != (type(subject).__name__, _digest(subject)):
            counts = self.before, _counts(find_blocks(subject))
            then, now = (", ".join(f"{count} blocks in {name}" for name, (count,) in own.items()) for own in counts)
            own = type(subject).__name__
            raise ValueError(f"plan: it was made for a {self.model} with {then}; this {own} has {now}, or other tensors")
        if find_block_plan(subject, self.units) != self:
            raise ValueError(f"plan: it is not what removes these blocks from this {self.model}")

    def change(self, model: nn.Module, weights: Weights | None = None) -> Follow:
        """Removes the blocks; see `ShapePlan.change`."""
        subject = find_transformer(model)
        with starting_from(subject, weights):
            return partial(_forget, _remove(subject, self.units, self.fields, self.attributes))

    def _shown(self) -> list[RenderableType]:
        before, after = self.parameters
        rows = [
            (stack, f"{count} -> {self.after[stack][0]} blocks; without {self._gone(stack)}")
            for stack, (count,) in self.before.items()
        ]
        title = f"{self.model}: {before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer)"
        return [title, columns(rows, aligns="<", indent=2)]

    def _gone(self, stack: str) -> str:
        """Returns the numbers of the blocks that are removed, with their scores if there are any."""
        gone, scores = self.units.get(stack, []), self.scores.get(stack)
        return ", ".join(f"{number} ({scores[number]:.4g})" if scores else str(number) for number in gone) or "none"


def find_block_plan(
    model: PreTrainedModel,
    chosen: Mapping[str, Iterable[int]],
    scores: Mapping[str, Tensor] | None = None,
    names: Iterable[str] | None = None,
) -> BlockPlan:
    """Finds how a model, its numbers and its config follow when blocks are removed; refuses what none can say.

    Args:
        model: The model.
        chosen: The blocks, by stack.
        scores: By stack, the score of each block, which the plan shows.
        names: The stacks, of a model on meta tensors, whose run does not show them.
    """
    stacks = find_blocks(model) if names is None else {name: _stack(model, name) for name in names}
    units = {name: sorted(set(own)) for name, own in chosen.items()}
    units = {name: own for name, own in units.items() if own}
    for name, own in units.items():
        if name not in stacks or not set(own) <= set(range(len(stacks[name]))):
            raise ValueError(f"plan: there are no blocks {str(own)[:80]} in {str(name)[:80]!r}")
        if len(own) == len(stacks[name]):
            raise ValueError(f"blocks: {name} would be left without blocks; at least one of its {len(own)} must stay")
    _check_own(model, stacks, units)
    sizes = {name: len(stack) for name, stack in stacks.items()}
    fields, attributes = find_then(model, sizes, units) if units else ({}, {})
    _check_built(model, fields)
    gone = {p: p.numel() for name, own in units.items() for number in own for p in stacks[name][number].parameters()}
    total = sum(parameter.numel() for parameter in model.parameters())
    shown = {name: own.tolist() for name, own in (scores or {}).items()}
    parameters = (total, total - sum(gone.values()))
    return BlockPlan(type(model).__name__, _digest(model), units, _counts(stacks), fields, attributes, parameters, shown)


def without(model: PreTrainedModel, plan: BlockPlan) -> PreTrainedModel:
    """Returns a model without the blocks of a plan, on meta tensors, where what it computes is not compared."""
    shadow = to_meta(model)
    take_out(shadow, plan)
    return shadow


def take_out(model: PreTrainedModel, plan: BlockPlan) -> None:
    """Takes the blocks of a plan out of a model, where what it computes is not compared."""
    _take_out(model, plan.units, plan.fields, plan.attributes)


def tried(model: PreTrainedModel, plan: BlockPlan) -> BlockPlan:
    """Returns a plan that can be carried out, as has been tried; the model is as before."""
    with suppress(_Tried):
        _remove(model, plan.units, plan.fields, plan.attributes, trial=True)
    return plan


class _Tried(Exception):
    """The end of a trial, by which everything is put back."""


def _check_own(model: nn.Module, stacks: Mapping[str, nn.ModuleList], gone: Mapping[str, list[int]]) -> None:
    """Refuses blocks that share parameters with other modules, which stay."""
    places = [(name, id(p), block_of(name, stacks)) for name, p in model.named_parameters(remove_duplicate=False)]
    going = {(name, number) for name, numbers in gone.items() for number in numbers}
    stay = {own: name for name, own, block in places if block not in going}
    if shared := next(((block, stay[own]) for _, own, block in places if block in going and own in stay), None):
        block, name = shared
        raise ValueError(f"blocks: block {block[1]} of {block[0]} shares weights with {name}, which stays")


def _check_built(model: PreTrainedModel, fields: Fields) -> None:
    """Refuses what the class builds no model of, such as too few blocks, if it builds one from its config as it is."""
    if (error := _failing(model, fields)) is not None and _failing(model, {}) is None:
        left = f"{type(model).__name__} is not built of what is left: {type(error).__name__}: {error}"
        raise ValueError(f"blocks: {left}") from error


def _failing(model: PreTrainedModel, fields: Fields) -> Exception | None:
    """Returns the error with which building on meta from changed fields of the config ends, or the first weights there."""
    try:
        build_on_meta(model, with_fields(model.config, fields)).initialize_weights()  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever a class raises
        return error
    return None


def _stack(model: nn.Module, name: str) -> nn.ModuleList:
    stack = model.get_submodule(name)
    assert isinstance(stack, nn.ModuleList)
    return stack


def _counts(stacks: Mapping[str, nn.ModuleList]) -> dict[str, tuple[int, ...]]:
    return {name: (len(stack),) for name, stack in stacks.items()}


def _digest(model: PreTrainedModel) -> str:
    shape = shape_of(model).to_dict()
    return hashlib.sha256(json.dumps([shape["tensors"], shape["blocks"]], sort_keys=True).encode()).hexdigest()[:16]


def _remove(
    model: PreTrainedModel,
    blocks: Mapping[str, list[int]],
    fields: Fields,
    attributes: Numbers,
    trial: bool = False,
) -> set[nn.Parameter]:
    """Removes blocks, by stack, from a model, in place, and returns what has gone; the model is as before if that fails.

    Refuses a block that runs several times, and a model that then computes something else than with the blocks skipped, or does
    not run with a key-value cache, as generating uses it.
    """
    if not blocks:
        return set()
    with skipping(model, blocks) as runs:
        expected = answer(model)
    if often := next((key for key, times in runs.items() if times > 1), None):
        raise ValueError(f"blocks: block {often[1]} of {often[0]} runs {runs[often]} times in a forward: its weights are shared")
    with skipping(model, blocks):
        cached, _ = cached_answer(model)
    before = set(model.parameters())
    with store_of(model).following(), undone_by_errors(model):
        _take_out(model, blocks, fields, attributes)
        _check_alike(model, blocks, expected, cached)
        if trial:
            raise _Tried
    return before - set(model.parameters())


def _take_out(model: PreTrainedModel, blocks: Mapping[str, list[int]], fields: Fields, attributes: Numbers) -> None:
    """Takes blocks out of their stacks; numbers and the config follow."""
    for name, gone in blocks.items():
        stack = _stack(model, name)
        keep(stack, [own for place, own in enumerate(numbers_of(stack)) if place not in gone])
    for name, (before, after) in attributes.items():
        owner, _, attr = name.rpartition(".")
        if getattr(model.get_submodule(owner), attr, None) == before:
            setattr(model.get_submodule(owner), attr, after)
    store_of(model).follow()
    set_fields(model.config, fields)
    note_shape(model)


def _check_alike(
    model: PreTrainedModel, blocks: Mapping[str, list[int]], expected: Sequence[Tensor], cached: Sequence[Tensor]
) -> None:
    """Compares what a model computes without blocks with what it did when they were skipped, also with a key-value cache."""
    kind, near = type(model).__name__, tolerance(model)
    found, error = cached_answer(model)
    if error is not None and len(found) < len(cached):
        raise ValueError(
            f"blocks: {kind} does not run without {blocks} and with a key-value cache, as generate uses it: "
            f"{type(error).__name__}: {error}"
        ) from error
    for how, then, now in (("", expected, answer(model)), (" with a key-value cache", cached, found[: len(cached)])):
        if not alike(then, now, near):
            raise ValueError(
                f"blocks: {kind} computes something else{how} without {blocks} than it does when they are skipped: "
                "later blocks need them, or count on their own place"
            )


def _forget(gone: set[nn.Parameter], optimizers: Iterable[Optimizer]) -> None:
    with uninterrupted():
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"][:] = [parameter for parameter in group["params"] if parameter not in gone]
            for parameter in gone & optimizer.state.keys():
                del optimizer.state[parameter]
