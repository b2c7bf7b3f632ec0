"""Finds how a config expresses that blocks were removed, by building the model's class."""

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from transformers import PreTrainedModel

from billhook.model.cache import cached
from billhook.model.config_fields import Fields, build_on_meta, fields_of, read_back, with_fields
from billhook.units.blocks import block_of
from billhook.units.fields import TOGETHER

BlockNumbers = dict[str, tuple[int, int]]
"""Integer attributes by new name: values before and after."""


@dataclass(frozen=True)
class Built:
    """A model as its class builds it: tensor sizes and plain attributes."""

    tensors: dict[str, tuple[int, ...]]
    attributes: dict[str, Any]


def find_block_fields(
    model: PreTrainedModel, stacks: Mapping[str, int], removed: Mapping[str, Sequence[int]]
) -> tuple[Fields, BlockNumbers]:
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
            reason, numbers = finder.compare(finder.build(lists | fields))
            if not reason:
                return lists | fields, numbers
            reasons.append(reason)
    words = " and ".join(f"blocks {', '.join(map(str, numbers))} of {name}" for name, numbers in removed.items())
    raise ValueError(
        f"blocks: the config of {type(model).__name__} cannot express that {words} are removed: "
        + next(filter(None, reasons), "it has no field for their number")
    )


class _Finder:
    def __init__(self, model: PreTrainedModel, stacks: Mapping[str, int], removed: Mapping[str, Sequence[int]]) -> None:
        self.model, self.stacks, self.removed = model, stacks, removed
        self.fields = fields_of(model.config)
        self._known: dict[str, Built | None] = {}
        now = self.build({})
        if now is None or any(_count(now, name) != count for name, count in stacks.items()):
            raise ValueError(f"blocks: {type(model).__name__} has other blocks than its class builds from its config")
        self.now = now
        self.wanted = {new: size for name, size in now.tensors.items() if (new := self._moved(name)) is not None}

    def build(self, fields: Fields) -> Built | None:
        """Builds the class from a changed config, read back; None if the class refuses it."""
        key = str(sorted(fields.items(), key=lambda field: field[0]))
        if key not in self._known:
            try:
                config = read_back(with_fields(self.model.config, fields))
                self._known[key] = cached(
                    lambda: _as_built(build_on_meta(self.model, config)), (type(self.model), config), "built"
                )
            except Exception:  # whatever a class of configs or models raises
                self._known[key] = None
        return self._known[key]

    def _moved(self, name: str) -> str | None:
        """Returns the new name of a tensor or attribute, or None if it is removed."""
        if (block := block_of(name, self.removed)) is None:
            return name
        stack, number = block
        suffix = name.removeprefix(f"{stack}.{number}.")
        removed = self.removed[stack]
        return None if number in removed else f"{stack}.{number - sum(before < number for before in removed)}.{suffix}"

    def lists(self) -> Iterator[Fields]:
        """Yields lists without values of removed blocks, then with fewer lists changed.

        Of two equally deep stacks, only one may own a list.
        """
        shorter: Fields = {}
        for (name, value), (stack, removed) in itertools.product(self.fields.items(), self.removed.items()):
            long = isinstance(value, list | tuple) and len(value) == self.stacks[stack]
            if long and self.build({name: value[:-1]}) != self.now:
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
            if _is_number(value):
                options += [(name, after) for before, after in counts if before == value]
            elif isinstance(value, list | tuple) and 0 <= max(stages, default=-1) < len(value):  # the depths of stages
                depths = [left[stages[stage]] if stage in stages else depth for stage, depth in enumerate(value)]
                fits = all(value[stage] == self.stacks[stack] for stage, stack in stages.items())
                options += [(name, type(value)(depths))] if fits else []
        reason = ""
        for number in range(TOGETHER + 1):
            if number == 2:  # pairs are many
                options = self._useful(options, lists)
            fitting = []
            for fields in map(dict, itertools.combinations(options, number)):
                built = self.build(lists | fields) if len(fields) == number else None
                if built is not None and self._has_counts(built, all_removed=True):
                    different = self._different(built, outside=True)
                    reason = reason or different
                    fitting += [] if different else [fields]
            if fitting:
                return fitting, ""
        return [], reason

    def _useful(self, options: list[tuple[str, Any]], lists: Fields) -> list[tuple[str, Any]]:
        """Drops options that change nothing or other tensors, unless the class refuses them."""
        built_each = [self.build(lists | {name: lower}) for name, lower in options]
        unchanged = None if None in built_each else self.build(lists)
        return [
            option
            for option, built in zip(options, built_each, strict=True)
            if built is None
            or (built != unchanged and not self._different(built, outside=True) and self._has_counts(built, all_removed=False))
        ]

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
        if difference := self._different(built):
            return difference, {}
        numbers: BlockNumbers = {}
        for name, value in self.now.attributes.items():
            if (new := self._moved(name)) is None or (new_value := built.attributes.get(new)) == value:
                continue
            if _is_number(value) and _is_number(new_value) and self._is_numbering(name, new, value, new_value):
                numbers[new] = (value, new_value)
            elif block_of(name, self.removed) is not None:
                return f"its class then builds {new} = {new_value!r}, but the block moved there has {value!r}", {}
        return "", numbers

    def _has_counts(self, built: Built, all_removed: bool) -> bool:
        """Returns whether each stack has its final number of blocks (or its old, if allowed)."""
        return all(
            _count(built, stack) in (self.stacks[stack] - len(removed), *(() if all_removed else (self.stacks[stack],)))
            for stack, removed in self.removed.items()
        )

    def _different(self, built: Built, outside: bool = False) -> str:
        """Describes the first tensor of another size, optionally only outside blocks."""
        for name in [*self.wanted, *built.tensors]:
            sizes = built.tensors.get(name), self.wanted.get(name)
            if sizes[0] != sizes[1] and not (outside and block_of(name, self.removed)):
                sizes_shown = (size or "missing" for size in sizes)
                return "{} is {} in the model that its class then builds, but {} in the pruned model".format(name, *sizes_shown)
        return ""

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
            if _is_number(known) and known - value != step * (other - number):
                return False
        return not remainder and step > 0


def _as_built(meta_model: PreTrainedModel) -> Built:
    attributes: dict[str, Any] = {}
    for name, module in meta_model.named_modules():
        if next(module.parameters(), None) is not None:
            for attribute, value in vars(module).items():
                plain = isinstance(value, bool | int | float | str | None)
                if plain and not attribute.startswith("_") and attribute != "training":
                    attributes[f"{name}.{attribute}"] = value
    return Built({name: tuple(tensor.shape) for name, tensor in meta_model.state_dict().items()}, attributes)


def _count(built: Built, stack: str) -> int:
    return len({block_of(name, [stack]) for name in built.tensors} - {None})


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int
