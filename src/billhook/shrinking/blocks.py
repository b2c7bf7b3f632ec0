"""Finds the whole blocks that a search may remove: they add nothing to the stream once their last linears are zero."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from billhook.engine.lazy import LazyTensors
from billhook.engine.store import store_of
from billhook.model.costs import cost_of
from billhook.model.inputs import outputs_match, run_outputs, tolerance
from billhook.model.layers import is_linear
from billhook.pruning.block_plan import BlockPlan, checked_block_plan, find_block_plan, without_blocks
from billhook.pruning.target import RatioSearch
from billhook.shrinking.cache import zeroed
from billhook.shrinking.layers import Layer
from billhook.units.blocks import block_of, skipping
from billhook.units.find import find_units, units_of
from billhook.units.units import Units


@dataclass(frozen=True)
class Block:
    """A whole block that may go.

    Attributes:
        name: Its module's name with its kind, as a layer in it may be called after the module alone.
        number: Its place in its stack.
        layers: Names of the layers in it that may keep less.
        cost: What all of it costs, norms too.
    """

    name: str
    number: int
    layers: tuple[str, ...]
    cost: int


@dataclass(eq=False)
class Blocks:
    """The whole blocks of a model that may go.

    Attributes:
        model: The model.
        stack: The name of the list that holds all blocks; empty if none may go.
        able: Those that may go; never all there are.
        writers: By the name of each block, the linears that write its outputs.
        why: Why none may go; empty if some may.
    """

    model: PreTrainedModel
    stack: str = ""
    able: list[Block] = field(default_factory=list)
    writers: dict[str, list[str]] = field(default_factory=dict)
    why: str = ""
    _refusals: dict[tuple[int, ...], str] = field(default_factory=dict)

    def priced(self, price: int, layers: Sequence[Layer]) -> "Blocks":
        """Returns the same blocks, each at a price that holds for all, or more where the layers in it cost more."""
        costs = {layer.name: layer.cost(layer.count) for layer in layers}
        able = [replace(block, cost=max(price, sum(costs[name] for name in block.layers))) for block in self.able]
        return replace(self, able=able)

    def removed(self, kept: Mapping[str, int]) -> list[Block]:
        """Returns the blocks of which nothing is kept."""
        return [block for block in self.able if not kept.get(block.name, 1)]

    def refusal(self, removed: Sequence[Block]) -> str:
        """Says why these blocks cannot go together; empty if they can, as has been tried once."""
        numbers = tuple(block.number for block in removed)
        if numbers not in self._refusals:
            try:
                checked_block_plan(self.model, find_block_plan(self.model, {self.stack: numbers}))
                self._refusals[numbers] = ""
            except ValueError as error:
                self._refusals[numbers] = str(error)
        return self._refusals[numbers]

    def planned(self, model: PreTrainedModel, removed: Sequence[Block]) -> BlockPlan:
        """Finds the plan by which blocks go from a model, also on meta tensors, and once units have been removed from it."""
        return find_block_plan(model, {self.stack: [block.number for block in removed]}, names=[self.stack])

    def zeros(self, removed: Sequence[Block]) -> LazyTensors:
        """Returns the parameters, all zero, with which linears of blocks write nothing."""
        return zeroed(self.model, [name for block in removed for name in self.writers[block.name]])

    def behind(self, removed: Sequence[Block]) -> list[str]:
        """Returns the linears that write the outputs of blocks that stay, behind the first that goes."""
        if not removed:
            return []
        first, names = min(block.number for block in removed), {block.name for block in removed}
        later = [name for number, name in enumerate(self.writers) if number > first and name not in names]
        return [linear for name in later for linear in self.writers[name]]


def find_blocks(search: RatioSearch, target: str, layers: Sequence[Layer]) -> Blocks:
    """Finds the blocks that may go for a target, next to the layers that may keep less; protected ones stay.

    Whether a config can say that one goes is asked once of those of a shape, and in the end of those that do (`Blocks.refusal`).
    """
    model, amount = search.model, search.amount
    try:
        stacks = find_units(model, "block")
        units = units_of(model, search.structure, ["head", "channel"])
    except ValueError as error:
        return Blocks(model, why=str(error))
    if len(stacks) > 1:
        return Blocks(model, why=f"{' and '.join(stacks)} are stacks of their own")
    ((stack, numbered),) = stacks.items()
    count = numbered.count()
    blocks = Blocks(model, stack, writers=_writers(model, stack, count, units))
    inside: dict[int, list[Layer]] = {number: [] for number in range(count)}
    for layer in layers:
        where = {block_of(search.units[name].name, {stack: ()}) for name in layer.names}
        if len(where) > 1:
            return Blocks(model, why=f"{layer.name} loses what others lose")
        if (block := where.pop()) is not None:
            inside[block[1]].append(layer)
    costs = dict[object, int | str]()
    for number in range(amount.first, count - amount.last):
        name, module = f"{stack}.{number} block", model.get_submodule(f"{stack}.{number}")
        shapes = tuple((key, one.shape, one.dtype) for key, one in module.named_parameters())
        shape = type(module), shapes, tuple(layer.each for layer in inside[number])
        if shape not in costs:
            costs[shape] = _cost_of(search, target, {stack: [number]})
        cost = costs[shape]
        why = cost if isinstance(cost, str) else _computes(blocks, name, number)
        if not why and isinstance(cost, int):
            blocks.able.append(Block(name, number, tuple(layer.name for layer in inside[number]), cost))
        blocks.why = blocks.why or why
    blocks.able = blocks.able[int(len(blocks.able) == count) :]  # the first stays where any other could
    blocks.why = "" if blocks.able else blocks.why or "all are protected, or it has one alone"
    return blocks


def _writers(model: PreTrainedModel, stack: str, count: int, units: Mapping[str, Units]) -> dict[str, list[str]]:
    """Returns by block the modules that read its heads and channels, which write what it adds to the stream."""
    writers: dict[str, dict[str, None]] = {f"{stack}.{number} block": {} for number in range(count)}
    for reader in (reader for one in units.values() for reader in one.readers):
        where = block_of(reader, {stack: ()})
        if where is not None and is_linear(model.get_submodule(reader)):
            writers[f"{stack}.{where[1]} block"][reader] = None  # each once
    return {name: list(linears) for name, linears in writers.items()}


def _cost_of(search: RatioSearch, target: str, chosen: Mapping[str, list[int]]) -> int | str:
    """Returns what a block costs, or why its config cannot say that it goes."""
    try:
        smaller = without_blocks(search.model, find_block_plan(search.model, chosen))
    except ValueError as error:
        return str(error)
    return int(getattr(search.now, target)) - int(cost_of(smaller, target) or 0)


def _computes(blocks: Blocks, name: str, number: int) -> str:
    """Says why a block stays, as it computes something also with its writers at zero; empty if it may go."""
    model = blocks.model
    with skipping(model, {blocks.stack: [number]}):
        expected = run_outputs(model)
    with store_of(model).computing_with(zeroed(model, blocks.writers[name])):
        zeros_alone = run_outputs(model)
    same = outputs_match(expected, zeros_alone, tolerance(model))
    return "" if same else f"{name} computes something also with the linears behind its heads and channels at zero"
