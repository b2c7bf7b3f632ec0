"""Finds the whole blocks that a search may remove: they add nothing to the stream once their last linears are zero."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedModel

from billhook.engine.lazy import LazyTensors
from billhook.engine.store import store_of
from billhook.model.figures import figure_of
from billhook.model.inputs import alike, answer, tolerance
from billhook.model.linears import is_linear
from billhook.pruning.block_plan import BlockPlan, find_block_plan, tried, without
from billhook.pruning.target import Search
from billhook.shrinking.levels import Place
from billhook.shrinking.variants import zeros_of
from billhook.units.blocks import block_of, skipping
from billhook.units.find import find_units, units_of
from billhook.units.units import Units


@dataclass(frozen=True)
class Block:
    """A whole block that may go.

    Attributes:
        name: Its module's name with its kind, as a place in it may be called after the module alone.
        number: Its place in its stack.
        places: Names of the places in it that may keep less.
        cost: What all of it costs, norms too.
    """

    name: str
    number: int
    places: tuple[str, ...]
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
    _tried: dict[tuple[int, ...], str] = field(default_factory=dict)

    def priced(self, each: int, places: Sequence[Place]) -> "Blocks":
        """Returns the same blocks, each at a price that holds for all, or more where the places in it cost more."""
        of = {place.name: place.cost(place.count) for place in places}
        able = [replace(block, cost=max(each, sum(of[name] for name in block.places))) for block in self.able]
        return replace(self, able=able)

    def gone(self, kept: Mapping[str, int]) -> list[Block]:
        """Returns the blocks of which nothing is kept."""
        return [block for block in self.able if not kept.get(block.name, 1)]

    def refusal(self, gone: Sequence[Block]) -> str:
        """Says why these blocks cannot go together; empty if they can, as has been tried."""
        numbers = tuple(block.number for block in gone)
        if numbers not in self._tried:
            try:
                tried(self.model, find_block_plan(self.model, {self.stack: numbers}))
                self._tried[numbers] = ""
            except ValueError as error:
                self._tried[numbers] = str(error)
        return self._tried[numbers]

    def planned(self, model: PreTrainedModel, gone: Sequence[Block]) -> BlockPlan:
        """Finds the plan by which blocks go from a model, also on meta tensors, and once units have been removed from it."""
        return find_block_plan(model, {self.stack: [block.number for block in gone]}, names=[self.stack])

    def zeros(self, gone: Sequence[Block]) -> LazyTensors:
        """Returns the parameters, all zero, with which linears of blocks write nothing."""
        return zeros_of(self.model, [name for block in gone for name in self.writers[block.name]])

    def behind(self, gone: Sequence[Block]) -> list[str]:
        """Returns the linears that write the outputs of blocks that stay, behind the first that goes."""
        first, names = min(block.number for block in gone), {block.name for block in gone}
        later = [name for number, name in enumerate(self.writers) if number > first and name not in names]
        return [linear for name in later for linear in self.writers[name]]


def find_blocks(search: Search, target: str, places: Sequence[Place]) -> Blocks:
    """Finds the blocks that may go for a target, next to the places that may keep less; protected ones stay.

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
    ((stack, blocks),) = stacks.items()
    found = Blocks(model, stack, writers=_writers(model, stack, blocks.count(), units))
    of = {place.name: {block_of(search.units[name].name, {stack: ()}) for name in place.names} for place in places}
    if several := next((name for name, own in of.items() if len(own) > 1), None):
        return Blocks(model, why=f"{several} loses what others lose")
    costs, each = dict[object, int | ValueError](), {place.name: place.each for place in places}
    for number in range(amount.first, blocks.count() - amount.last):
        name, own = f"{stack}.{number} block", tuple(place for place, where in of.items() if where == {(stack, number)})
        shape = _shape(model.get_submodule(f"{stack}.{number}")), tuple(each[place] for place in own)
        if shape not in costs:
            costs[shape] = _cost_of(search, target, {stack: [number]})
        cost = costs[shape]
        why = str(cost) if isinstance(cost, ValueError) else _adds(found, name, number)
        if not why and isinstance(cost, int):
            found.able.append(Block(name, number, own, cost))
        found.why = found.why or why
    found.able = found.able[int(len(found.able) == blocks.count()) :]  # the first stays where any other could
    found.why = "" if found.able else found.why or "all are protected, or it has one alone"
    return found


def _writers(model: PreTrainedModel, stack: str, count: int, units: Mapping[str, Units]) -> dict[str, list[str]]:
    """Returns by block the modules that read its heads and channels, which write what it adds to the stream."""
    found: dict[str, list[str]] = {f"{stack}.{number} block": [] for number in range(count)}
    for one in units.values():
        for reader in one.readers:
            if (where := block_of(reader, {stack: ()})) is not None and is_linear(model.get_submodule(reader)):
                found[f"{stack}.{where[1]} block"].append(reader)
    return {name: list(dict.fromkeys(own)) for name, own in found.items()}


def _shape(block: nn.Module) -> object:
    """Returns what blocks that cost the same have in common."""
    return type(block), tuple((name, one.shape, one.dtype) for name, one in block.named_parameters())


def _cost_of(search: Search, target: str, chosen: Mapping[str, list[int]]) -> int | ValueError:
    """Returns what a block costs, or why its config cannot say that it goes."""
    try:
        smaller = without(search.model, find_block_plan(search.model, chosen))
    except ValueError as error:
        return error
    return int(getattr(search.now, target)) - int(figure_of(smaller, target) or 0)


def _adds(blocks: Blocks, name: str, number: int) -> str:
    """Says why a block stays, as it computes something also with its writers at zero; empty if it may go."""
    model, zeros = blocks.model, zeros_of(blocks.model, blocks.writers[name])
    with skipping(model, {blocks.stack: [number]}):
        expected = answer(model)
    with store_of(model).computing_with(zeros):
        found = answer(model)
    same = alike(expected, found, tolerance(model))
    return "" if same else f"{name} computes something also with the linears behind its heads and channels at zero"
