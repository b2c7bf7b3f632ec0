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

from billhook.display import text_table
from billhook.engine.state import uninterrupted
from billhook.engine.store import store_of
from billhook.model.config_fields import Fields, build_on_meta, set_fields, with_fields
from billhook.model.find import find_transformer
from billhook.model.inputs import cached_outputs, outputs_match, run_outputs, tolerance
from billhook.model.meta import to_meta
from billhook.model.plan import ShapePlan, Weights, with_weights
from billhook.model.shape import block_numbers, keep_blocks, record_shape, shape_of
from billhook.model.surgery import UpdateOptimizers, restored_on_error
from billhook.pruning.block_fields import BlockNumbers, find_block_fields
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
    attributes: BlockNumbers
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
            fields = {name: value for name, value in plain.items() if name != "kind"}
            fields["attributes"] = {name: (before, after) for name, (before, after) in plain["attributes"].items()}
            fields["before"] = {name: (int(count),) for name, (count,) in plain["before"].items()}
            before, after = plain["parameters"]
            plan = cls(**fields | {"parameters": (before, after)})
            are_numbers = all(type(number) is int for numbers in plan.units.values() for number in numbers)
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"plan: it is not as to_json returns it ({type(error).__name__}: {error})") from error
        if not are_numbers:
            raise ValueError(f"plan: units is {str(plan.units)[:80]!r}, and must be lists of numbers by stack")
        plan.check_made_for(model)
        return plan

    def check_made_for(self, model: nn.Module) -> None:
        """Refuses a model that the plan was not made for; see `ModelPlan.check_made_for`."""
        subject = find_transformer(model)
        kind = type(subject).__name__
        if (self.model, self.made_for) != (kind, _digest(subject)):
            counts = self.before, _counts(find_blocks(subject))
            then, now = (", ".join(f"{count} blocks in {name}" for name, (count,) in before.items()) for before in counts)
            raise ValueError(f"plan: it was made for a {self.model} with {then}; this {kind} has {now}, or other tensors")
        if find_block_plan(subject, self.units) != self:
            raise ValueError(f"plan: it is not what removes these blocks from this {self.model}")

    def change(self, model: nn.Module, weights: Weights | None = None) -> UpdateOptimizers:
        """Removes the blocks; see `ShapePlan.change`."""
        subject = find_transformer(model)
        with with_weights(subject, weights):
            return partial(_forget, _remove(subject, self))

    def _renderables(self) -> list[RenderableType]:
        before, after = self.parameters
        rows = []
        for name, (count,) in self.before.items():
            removed, scores = self.units.get(name, []), self.scores.get(name)
            numbers = [f"{number} ({scores[number]:.4g})" if scores else str(number) for number in removed]
            rows.append((name, f"{count} -> {self.after[name][0]} blocks; without {', '.join(numbers) or 'none'}"))
        title = f"{self.model}: {before:,} -> {after:,} parameters ({1 - after / before:.1%} fewer)"
        return [title, text_table(rows, aligns="<", indent=2)]


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
    removed: dict[str, list[int]] = {}
    for name, some in chosen.items():
        numbers, count = sorted(set(some)), len(stacks.get(name, ()))
        if not set(numbers) <= set(range(count)):
            raise ValueError(f"plan: there are no blocks {str(numbers)[:80]} in {str(name)[:80]!r}")
        if numbers and len(numbers) == count:
            raise ValueError(f"blocks: {name} would be left without blocks; at least one of its {count} must stay")
        if numbers:
            removed[name] = numbers
    _check_unshared(model, stacks, removed)
    sizes = {name: len(stack) for name, stack in stacks.items()}
    fields, attributes = find_block_fields(model, sizes, removed) if removed else ({}, {})
    # some classes build no model of too few blocks; this one does of its config as it is
    if (error := _building_error(model, fields)) is not None and _building_error(model, {}) is None:
        left = f"{type(model).__name__} is not built of what is left: {type(error).__name__}: {error}"
        raise ValueError(f"blocks: {left}") from error
    going = set[nn.Parameter]()
    for name, numbers in removed.items():
        for number in numbers:
            going.update(stacks[name][number].parameters())
    before = sum(parameter.numel() for parameter in model.parameters())
    parameters = before, before - sum(parameter.numel() for parameter in going)
    shown = {name: values.tolist() for name, values in (scores or {}).items()}
    return BlockPlan(type(model).__name__, _digest(model), removed, _counts(stacks), fields, attributes, parameters, shown)


def _check_unshared(model: nn.Module, stacks: Mapping[str, nn.ModuleList], removed: Mapping[str, list[int]]) -> None:
    """Refuses blocks that share parameters with other modules, which stay."""
    named = [(name, id(p), block_of(name, stacks)) for name, p in model.named_parameters(remove_duplicate=False)]
    blocks = {(name, number) for name, numbers in removed.items() for number in numbers}
    staying = {parameter: name for name, parameter, block in named if block not in blocks}
    for _, parameter, block in named:
        if block in blocks and block is not None and parameter in staying:
            raise ValueError(f"blocks: block {block[1]} of {block[0]} shares weights with {staying[parameter]}, which stays")


def _building_error(model: PreTrainedModel, fields: Fields) -> Exception | None:
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


class _Tried(Exception):
    """The end of a trial, by which everything is put back."""


def checked_block_plan(model: PreTrainedModel, plan: BlockPlan) -> BlockPlan:
    """Returns a plan that can be carried out, as has been tried; the model is as before."""
    with suppress(_Tried):
        _remove(model, plan, trial=True)
    return plan


def _remove(model: PreTrainedModel, plan: BlockPlan, trial: bool = False) -> set[nn.Parameter]:
    """Removes the blocks of a plan, in place, and returns what has been removed; the model is as before if that fails.

    Refuses a block that runs several times, and a model that then computes something else than with the blocks skipped, or does
    not run with a key-value cache, as generating uses it.
    """
    if not plan.units:
        return set()
    with skipping(model, plan.units) as runs:
        expected = run_outputs(model)
    for (stack, number), times in runs.items():
        if times > 1:
            raise ValueError(f"blocks: block {number} of {stack} runs {times} times in a forward: its weights are shared")
    with skipping(model, plan.units):
        cached, _ = cached_outputs(model)
    before = set(model.parameters())
    with store_of(model).restored_on_error(), restored_on_error(model):
        remove_blocks(model, plan)
        _check_alike(model, plan.units, expected, cached)
        if trial:
            raise _Tried
    return before - set(model.parameters())


def without_blocks(model: PreTrainedModel, plan: BlockPlan) -> PreTrainedModel:
    """Returns a model without the blocks of a plan, on meta tensors, where what it computes is not compared."""
    meta_model = to_meta(model)
    remove_blocks(meta_model, plan)
    return meta_model


def remove_blocks(model: PreTrainedModel, plan: BlockPlan) -> None:
    """Takes the blocks of a plan out of a model, where what it computes is not compared; numbers and the config follow."""
    for name, removed in plan.units.items():
        stack = _stack(model, name)
        keep_blocks(stack, [first for number, first in enumerate(block_numbers(stack)) if number not in removed])
    for name, (before, after) in plan.attributes.items():
        owner, _, attribute = name.rpartition(".")
        if getattr(model.get_submodule(owner), attribute, None) == before:
            setattr(model.get_submodule(owner), attribute, after)
    store_of(model).follow()
    set_fields(model.config, plan.fields)
    record_shape(model)


def _check_alike(
    model: PreTrainedModel, blocks: Mapping[str, list[int]], expected: Sequence[Tensor], cached: Sequence[Tensor]
) -> None:
    """Compares what a model computes without blocks with what it did when they were skipped, also with a key-value cache."""
    kind, near = type(model).__name__, tolerance(model)
    now_cached, error = cached_outputs(model)
    if error is not None and len(now_cached) < len(cached):
        raise ValueError(
            f"blocks: {kind} does not run without {blocks} and with a key-value cache, as generate uses it: "
            f"{type(error).__name__}: {error}"
        ) from error
    for how, then, now in (("", expected, run_outputs(model)), (" with a key-value cache", cached, now_cached[: len(cached)])):
        if not outputs_match(then, now, near):
            raise ValueError(
                f"blocks: {kind} computes something else{how} without {blocks} than it does when they are skipped: "
                "later blocks need them, or count on their own place"
            )


def _forget(removed: set[nn.Parameter], optimizers: Iterable[Optimizer]) -> None:
    with uninterrupted():
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"][:] = [parameter for parameter in group["params"] if parameter not in removed]
            for parameter in removed & optimizer.state.keys():
                del optimizer.state[parameter]
