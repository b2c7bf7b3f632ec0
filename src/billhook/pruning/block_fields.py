"""Finds how a config expresses that blocks were removed, by building the model's class."""

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from billhook.model import Built, Fields, build, fields_of, find_fields
from billhook.units import UnitNumbers, block_of

BlockNumbers = dict[str, tuple[int, int]]
"""Integer attributes by new name: values before and after."""


def find_block_fields(model: PreTrainedModel, stacks: Mapping[str, int], removed: UnitNumbers) -> tuple[Fields, BlockNumbers]:
    """Finds the config change for which the model's class builds the remaining blocks.

    It tries lists with a value per block, without those of removed blocks; the fewest block counts that, changed together, give
    the right number of blocks and change nothing else; and, if the wrong blocks are then built, one more field, such as the
    numbers of blocks without experts. If nothing works, the error names the difference.

    Args:
        model: The model.
        stacks: Number of blocks in each stack.
        removed: Blocks to remove, by stack.
    """
    finder = _Finder(model, stacks, removed)
    reasons = []
    for lists in finder.lists():
        counts, reason = finder.counts(lists)
        reasons.append(reason)
        for fields in (*counts, *(counts[0] | more for more in finder.numberings(counts))):
            reason, numbers = finder.compare(build(model, fields))
            if not reason:
                return fields, numbers
            reasons.append(reason)
    words = " and ".join(f"blocks {', '.join(map(str, numbers))} of {name}" for name, numbers in removed.items())
    raise ValueError(
        f"blocks: the config of {type(model).__name__} cannot express that {words} are removed: "
        + next(filter(None, reasons), "it has no field for their number")
    )


class _Finder:
    def __init__(self, model: PreTrainedModel, stacks: Mapping[str, int], removed: UnitNumbers) -> None:
        self.model, self.stacks, self.removed = model, stacks, removed
        self.fields = fields_of(model.config)
        now = build(model, {})
        if now is None or any(_count(now, name) != count for name, count in stacks.items()):
            raise ValueError(f"blocks: {type(model).__name__} has other blocks than its class builds from its config")
        self.now = now
        self.wanted = {new: size for name, size in now.tensors.items() if (new := self._moved(name)) is not None}

    def _moved(self, name: str) -> str | None:
        """Returns the new name of a tensor or attribute, or None if it is removed."""
        if (block := block_of(name, self.removed)) is None:
            return name
        stack, number = block
        suffix = name.removeprefix(f"{stack}.{number}.")
        removed = self.removed[stack]
        return None if number in removed else f"{stack}.{number - sum(before < number for before in removed)}.{suffix}"

    def lists(self) -> Iterator[Fields]:
        """Yields lists without values of removed blocks, then with fewer lists changed."""
        shorter = {}
        for (name, value), (stack, removed) in itertools.product(self.fields.items(), self.removed.items()):
            long = isinstance(value, list | tuple) and len(value) == self.stacks[stack]
            # of two equally deep stacks, only one may own a list
            if long and build(self.model, {name: value[:-1]}) != self.now:
                shorter[name] = type(value)(item for number, item in enumerate(value) if number not in removed)
        for number in range(len(shorter), -1, -1):
            yield from map(dict, itertools.combinations(shorter.items(), number))

    def counts(self, lists: Fields) -> tuple[list[Fields], str]:
        """Returns the fewest fields that give the number of blocks, or the first side effect."""
        left = {stack: count - len(self.removed.get(stack, ())) for stack, count in self.stacks.items()}
        counts = dict.fromkeys((self.stacks[stack], left[stack]) for stack in self.removed)
        stages = {int(part): stack for stack in self.stacks for part in stack.split(".") if part.isdigit()}
        options: list[tuple[str, Any]] = []
        for name, value in self.fields.items():
            if type(value) is int:
                options += [(name, after) for before, after in counts if before == value]
            elif stages and isinstance(value, list | tuple) and max(stages) < len(value):  # the depths of stages
                depths = [left[stages[stage]] if stage in stages else depth for stage, depth in enumerate(value)]
                same = all(value[stage] == self.stacks[stack] for stage, stack in stages.items())
                options += [(name, type(value)(depths))] if same else []
        reasons = []

        def fits(built: Built) -> bool:
            if any(_count(built, stack) != left[stack] for stack in self.removed):
                return False
            reasons.append(built.difference(self.wanted, ignored=lambda name: block_of(name, self.removed)))
            return not reasons[-1]

        results = itertools.groupby(find_fields(self.model, options, lists, self.wanted, fits), len)
        for _, fewest in results:
            return list(fewest), ""
        return [], next(filter(None, reasons), "")

    def numberings(self, counts: Sequence[Fields]) -> Iterator[Fields]:
        """Yields another field that may number single blocks: a count of first blocks, or a list."""
        if not counts:
            return
        for (name, value), (stack, removed) in itertools.product(self.fields.items(), self.removed.items()):
            count = self.stacks[stack]
            left = [number for number in range(count) if number not in removed]
            if type(value) is int and name not in counts[0] and 0 < value <= count:
                yield {name: bisect_left(left, value)}
            elif isinstance(value, list | tuple) and set(map(type, value)) == {int} and 0 <= min(value) <= max(value) < count:
                yield {name: type(value)(left.index(number) for number in value if number in left)}

    def compare(self, built: Built | None) -> tuple[str, BlockNumbers]:
        """Describes the first difference in the remaining blocks, or returns the changed numbers."""
        if built is None:
            return "its class refuses the changed config", {}
        if difference := built.difference(self.wanted):
            return difference, {}
        numbers = {}
        for name, value in self.now.attributes.items():
            if (new := self._moved(name)) is None or (new_value := built.attributes.get(new)) == value:
                continue
            if type(value) is int and type(new_value) is int and self._is_numbering(name, new, value, new_value):
                numbers[new] = (value, new_value)
            elif block_of(name, self.removed) is not None:
                return f"its class then builds {new} = {new_value!r}, but the block moved there has {value!r}", {}
        return "", numbers

    def _is_numbering(self, name: str, new: str, value: int, new_value: int) -> bool:
        """Returns whether a changed integer only gives a block's number or the block count."""
        block, block_then = block_of(name, self.removed), block_of(new, self.removed)
        counts = [(self.stacks[stack], self.stacks[stack] - len(removed)) for stack, removed in self.removed.items()]
        if block is None or block_then is None or (value, new_value) in counts:
            return True
        (stack, number), (_, number_then) = block, block_then
        if number == number_then:
            return False
        step, remainder = divmod(value - new_value, number - number_then)
        suffix = name.removeprefix(f"{stack}.{number}")
        for other in range(self.stacks[stack]):
            known = self.now.attributes.get(f"{stack}.{other}{suffix}")
            if type(known) is int and known - value != step * (other - number):
                return False
        return not remainder and step > 0


def _count(built: Built, stack: str) -> int:
    return len({block_of(name, [stack]) for name in built.tensors} - {None})
