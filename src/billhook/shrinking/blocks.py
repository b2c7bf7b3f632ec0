"""Finds blocks whose removal equals zeroing their output layers.

With zeroed output layers they add nothing to the residual stream.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from billhook.model import cost_of
from billhook.pruning.block_plan import block_writers, checked_block_plan, find_block_plan, why_not_zeros, without_blocks
from billhook.pruning.target import RatioSearch
from billhook.shrinking.modules import PrunableModule
from billhook.units import block_of, find_units, units_of


@dataclass(frozen=True)
class Block:
    """A removable block.

    Attributes:
        name: Module name followed by ` block`, to tell it from a prunable module of the same name.
        number: Index in its stack.
        modules: Names of its prunable modules.
        cost: Cost of the whole block, including norms.
    """

    name: str
    number: int
    modules: tuple[str, ...]
    cost: int


@dataclass(eq=False)
class Blocks:
    """The removable blocks of a model.

    Attributes:
        model: The model.
        stack: Name of the block stack; empty if no block is removable.
        removable: The removable blocks; at least one block of the stack always stays.
        writers: By block number, the linear layers that write its output to the residual stream.
        why: Reason why no block is removable; empty if there is one.
    """

    model: PreTrainedModel
    stack: str = ""
    removable: list[Block] = field(default_factory=list)
    writers: dict[int, list[str]] = field(default_factory=dict)
    why: str = ""
    _refusals: dict[tuple[int, ...], str] = field(default_factory=dict)

    def removed(self, kept: Mapping[str, int]) -> list[Block]:
        """Returns the blocks that a candidate removes."""
        return [block for block in self.removable if not kept.get(block.name, 1)]

    def refusal(self, removed: Sequence[Block]) -> str:
        """Returns the reason why these blocks cannot be removed together; empty if they can."""
        numbers = tuple(block.number for block in removed)
        if numbers not in self._refusals:
            try:
                checked_block_plan(self.model, find_block_plan(self.model, {self.stack: numbers}))
                self._refusals[numbers] = ""
            except ValueError as error:
                self._refusals[numbers] = str(error)
        return self._refusals[numbers]


def find_blocks(search: RatioSearch, target: str, modules: Sequence[PrunableModule]) -> Blocks:
    """Finds the removable blocks; blocks of a shape share a trial of the config."""
    model, amount = search.model, search.amount
    try:
        stacks = find_units(model, "block")
        units = units_of(model, search.structure, ["head", "channel"])
    except ValueError as error:
        return Blocks(model, why=str(error))
    if len(stacks) > 1:
        return Blocks(model, why=f"{' and '.join(stacks)} are separate block stacks")
    ((stack, numbered),) = stacks.items()
    count = numbered.count()
    blocks = Blocks(model, stack, writers=block_writers(model, stack, units))
    inside = defaultdict(list)
    for module in modules:
        where = {block_of(search.units[name].name, [stack]) for name in module.names}
        if len(where) > 1:
            return Blocks(model, why=f"{module.name} is coupled to modules of other blocks")
        if (block := where.pop()) is not None:
            inside[block[1]].append(module)
    costs = {}  # of a block without, or the reason why it cannot be removed
    for number in range(amount.first, count - amount.last):
        name, block_module = f"{stack}.{number} block", model.get_submodule(f"{stack}.{number}")
        parameters = tuple((part, parameter.shape, parameter.dtype) for part, parameter in block_module.named_parameters())
        shape = type(block_module), parameters, tuple(inner.unit_cost for inner in inside[number])  # of blocks of equal cost
        if shape not in costs:
            try:
                smaller = without_blocks(model, find_block_plan(model, {stack: [number]}))
                costs[shape] = int(getattr(search.now, target)) - int(cost_of(smaller, target) or 0), ""
            except ValueError as error:  # the config cannot express it
                costs[shape] = 0, str(error)
        cost, why = costs[shape]
        if not (why := why or why_not_zeros(model, {stack: [number]}, blocks.writers[number])):
            blocks.removable.append(Block(name, number, tuple(module.name for module in inside[number]), cost))
        blocks.why = blocks.why or why
    blocks.removable = blocks.removable[int(len(blocks.removable) == count) :]  # the first stays where any other could
    blocks.why = "" if blocks.removable else blocks.why or "all blocks are protected, or there is only one"
    return blocks
