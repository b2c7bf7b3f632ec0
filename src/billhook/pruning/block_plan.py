"""Plans of blocks to remove, and the output layers of the blocks around them."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import RenderableType
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from typing_extensions import Self

from billhook.display import text_table
from billhook.engine import LazyTensors, by_parameter, store_of, uninterrupted
from billhook.model import (
    Fields,
    ShapePlan,
    UpdateOptimizers,
    Weights,
    block_numbers,
    build_on_meta,
    cached_outputs,
    change_blockwise,
    find_transformer,
    is_linear,
    keep_blocks,
    outputs_match,
    record_shape,
    restored_on_error,
    run_outputs,
    set_fields,
    shape_of,
    snapshot_with_store,
    to_meta,
    tolerance,
    with_fields,
    with_weights,
)
from billhook.pruning.block_fields import BlockNumbers, find_block_fields
from billhook.units import UnitKind, UnitNumbers, UnitsByModule, block_of, find_blocks, skipping


@dataclass(frozen=True, repr=False)
class BlockPlan(ShapePlan):
    """A plan to remove blocks, by stack; `print` shows a table.

    Attributes:
        made_for: Digest of the names and sizes of the model's tensors, and of blocks removed before.
        fields: Config fields with their new values; dots separate nested configs.
        attributes: Attributes with block numbers, by new name: values before and after.
        scores: Score of each block by stack, for display only.
    """

    kind = "blocks"

    model: str
    made_for: str
    units: UnitNumbers
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
        """Number of blocks that remain, by stack."""
        return {name: (count - len(self.units.get(name, ())),) for name, (count,) in self.before.items()}

    @property
    def words(self) -> str:
        """The number of removed blocks, in words."""
        return f"{sum(map(len, self.units.values())):,} of {sum(count for (count,) in self.before.values()):,} blocks"

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain data; see `ModelPlan.to_json`."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def _read(cls, plain: Mapping[str, Any], model: nn.Module) -> Self:
        try:
            fields = dict(plain)
            fields.pop("kind", None)
            fields["attributes"] = {name: (before, after) for name, (before, after) in plain["attributes"].items()}
            fields["before"] = {name: (int(count),) for name, (count,) in plain["before"].items()}
            before, after = plain["parameters"]
            plan = cls(**fields | {"parameters": (before, after)})
            are_numbers = set(map(type, itertools.chain.from_iterable(plan.units.values()))) <= {int}
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"plan is malformed ({type(error).__name__}: {error}). Pass the output of to_json.") from error
        if not are_numbers:
            raise ValueError(f"plan: units={str(plan.units)[:80]!r} must be lists of numbers by stack")
        plan.check_made_for(model)
        return plan

    def check_made_for(self, model: nn.Module) -> None:
        """Raises if the plan was made for another model; see `ModelPlan.check_made_for`."""
        subject = find_transformer(model)
        kind = type(subject).__name__
        if (self.model, self.made_for) != (kind, _digest(subject)):
            counts = self.before, _counts(find_blocks(subject))
            blocks_in_plan, blocks_here = (
                ", ".join(f"{count} blocks in {name}" for name, (count,) in before.items()) for before in counts
            )
            raise ValueError(
                f"plan: it was made for a {self.model} with {blocks_in_plan}; this {kind} has {blocks_here}, or other tensors"
            )
        if find_block_plan(subject, self.units) != self:
            raise ValueError(f"plan: its config or attributes do not match the removal of these blocks from this {self.model}")

    def change(self, model: nn.Module, weights: Weights | None = None) -> UpdateOptimizers:
        """Removes the blocks; see `ShapePlan.change`."""
        subject = find_transformer(model)
        with store_of(subject).restored_on_error():
            with with_weights(subject, weights):
                if weights is None or store_of(subject).holds_all:
                    return partial(_forget, _remove(subject, self))
                # blocks store their new values under their old names, before these change
                change_blockwise(subject, {}, f"values for {self.units} {LazyTensors.of(weights).key}")
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
    """Finds how config and attributes change if blocks are removed, or raises.

    Args:
        model: The model.
        chosen: Blocks to remove, by stack.
        scores: Score of each block by stack, for display.
        names: Stacks of a model on meta tensors, which cannot be detected by a run.
    """
    stacks = find_blocks(model) if names is None else {name: _stack(model, name) for name in names}
    removed = {}
    for name, chosen_blocks in chosen.items():
        numbers, count = sorted(set(chosen_blocks)), len(stacks.get(name, ()))
        if not set(numbers) <= set(range(count)):
            raise ValueError(f"plan: {str(name)[:80]!r} does not have all of the blocks {str(numbers)[:80]}")
        if numbers and len(numbers) == count:
            raise ValueError(f"blocks: {name} would be left without blocks; at least one of its {count} must stay")
        if numbers:
            removed[name] = numbers
    staying, leaving = {}, []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = block_of(name, stacks)
        if block is not None and block[1] in removed.get(block[0], ()):
            leaving.append((block, id(parameter)))
        else:
            staying[id(parameter)] = name
    for (stack, number), key in leaving:
        if key in staying:
            raise ValueError(f"blocks: block {number} of {stack} shares weights with {staying[key]}, which stays")
    sizes = dict(zip(stacks, map(len, stacks.values()), strict=True))
    fields, attributes = find_block_fields(model, sizes, removed) if removed else ({}, {})
    # some classes refuse too few blocks; compare with the unchanged config
    if (error := _building_error(model, fields)) is not None and _building_error(model, {}) is None:
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"blocks: {type(model).__name__} cannot be built with the remaining blocks: {cause}") from error
    removed_params = set[nn.Parameter]()
    for name, numbers in removed.items():
        for number in numbers:
            removed_params.update(stacks[name][number].parameters())
    before = sum(map(Tensor.numel, model.parameters()))
    parameters = before, before - sum(map(Tensor.numel, removed_params))
    score_lists = {name: values.tolist() for name, values in (scores or {}).items()}
    return BlockPlan(type(model).__name__, _digest(model), removed, _counts(stacks), fields, attributes, parameters, score_lists)


def _building_error(model: PreTrainedModel, fields: Fields) -> Exception | None:
    """Returns the error of building the model on meta with changed config fields, or None."""
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


def checked_block_plan(model: PreTrainedModel, plan: BlockPlan) -> BlockPlan:
    """Returns the plan after a trial removal; raises if it fails. The model is unchanged."""
    back = snapshot_with_store(model)
    try:
        _remove(model, plan)
    finally:
        back()
    return plan


def _remove(model: PreTrainedModel, plan: BlockPlan) -> set[nn.Parameter]:
    """Removes the blocks of a plan in place and returns their parameters; undone on errors.

    Raises for a block that runs several times, and for a model whose output then differs from the one with the blocks skipped or
    that fails with a KV cache, as used by `generate`.
    """
    if not plan.units:
        return set()
    with skipping(model, plan.units) as runs:
        expected = run_outputs(model)
    for (stack, number), times in runs.items():
        if times > 1:
            raise ValueError(f"blocks: block {number} of {stack} runs {times} times per forward pass: its weights are shared")
    with skipping(model, plan.units):
        cached, _ = cached_outputs(model)
    before = set(model.parameters())
    with store_of(model).restored_on_error(), restored_on_error(model):
        remove_blocks(model, plan)
        kind, tolerances = type(model).__name__, tolerance(model)
        now_cached, error = cached_outputs(model)
        if error is not None and len(now_cached) < len(cached):
            raise ValueError(
                f"blocks: {kind} does not run without {plan.units} if a KV cache is used, as generate does: "
                f"{type(error).__name__}: {error}"
            ) from error
        outputs = {"": (expected, run_outputs(model)), " with a KV cache": (cached, now_cached[: len(cached)])}
        for how, (expected_output, output) in outputs.items():
            if not outputs_match(expected_output, output, tolerances):
                raise ValueError(
                    f"blocks: {kind} computes something else{how} without {plan.units} than with these blocks skipped: later "
                    "blocks depend on them or on their own position"
                )
    return before - set(model.parameters())


def without_blocks(model: PreTrainedModel, plan: BlockPlan) -> PreTrainedModel:
    """Returns the model without the blocks of a plan, on the meta device, unchecked."""
    meta_model = to_meta(model)
    remove_blocks(meta_model, plan)
    return meta_model


def remove_blocks(model: PreTrainedModel, plan: BlockPlan) -> None:
    """Removes the blocks of a plan in place, without comparing outputs."""
    for name, removed in plan.units.items():
        stack = _stack(model, name)
        keep_blocks(stack, [first for number, first in enumerate(block_numbers(stack)) if number not in removed])
    for name, (before, after) in plan.attributes.items():
        owner, _, attribute = name.rpartition(".")
        if getattr(model.get_submodule(owner), attribute, None) == before:
            setattr(model.get_submodule(owner), attribute, after)
    store_of(model).reindex()
    set_fields(model.config, plan.fields)
    record_shape(model)


def _forget(removed: set[nn.Parameter], optimizers: Iterable[Optimizer]) -> None:
    with uninterrupted():
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"][:] = [parameter for parameter in group["params"] if parameter not in removed]
            for parameter in removed & optimizer.state.keys():
                del optimizer.state[parameter]


def block_writers(model: nn.Module, stack: str, units: UnitsByModule) -> dict[int, list[str]]:
    """Returns by block number the linear layers that write to the residual stream.

    Args:
        model: The model.
        stack: Name of the block stack.
        units: The heads and channels of the model, whose consumer layers these are.
    """
    writers: dict[int, list[str]] = {number: [] for number, _ in enumerate(model.get_submodule(stack).children())}
    for consumer in dict.fromkeys(consumer for of_module in units.values() for consumer in of_module.own_readers):
        where = block_of(consumer, [stack])
        if where is not None and is_linear(model.get_submodule(consumer)):
            writers[where[1]].append(consumer)
    return writers


def writers_behind(writers: Mapping[int, Sequence[str]], removed: Sequence[int]) -> list[str]:
    """Returns the writers of the kept blocks after the first removed block."""
    behind = [number for number in writers if removed and number > min(removed) and number not in removed]
    return [name for number in behind for name in writers[number]]


def zero_weights(model: nn.Module, linears: Iterable[str]) -> LazyTensors:
    """Returns zero parameters for linear layers, created when they are read."""
    names = list(linears)
    values = by_parameter({name: dict(model.get_submodule(name).named_parameters()) for name in names})
    return LazyTensors({name: partial(_zeros, value) for name, value in values.items()}, f"zeros of {names}")


def _zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter.data, device="cpu" if parameter.is_meta else None)  # meta: its block is not loaded


def why_not_zeros(model: PreTrainedModel, blocks: UnitNumbers, writers: Iterable[str]) -> str:
    """Returns why zeroed writers do not equal the removal of blocks; empty if they do."""
    with skipping(model, blocks):
        expected = run_outputs(model)
    with store_of(model).computing_with(zero_weights(model, writers)):
        zeros_alone = run_outputs(model)
    if outputs_match(expected, zeros_alone, tolerance(model)):
        return ""
    names = " and ".join(f"{stack}.{number}" for stack, numbers in blocks.items() for number in numbers)
    return f"{names} changes the output even if the layers after its heads and channels are zero"
