"""Finds how a config says that blocks were removed, by building the model's own class; nothing is looked up."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from transformers import PreTrainedModel

from billhook.model.cache import cached
from billhook.model.config_fields import Fields, build_on_meta, fields_of, read_back, with_fields
from billhook.units.blocks import block_of
from billhook.units.fields import TOGETHER

STAGES = 6  # numbers in one field that may all change, at most
BlockNumbers = dict[str, tuple[int, int]]
"""Whole-number attributes, by their new names: their values before and after."""


@dataclass(frozen=True)
class Built:
    """A model as its class builds it: sizes of tensors in `state_dict`, plain attributes of modules that hold parameters."""

    tensors: dict[str, tuple[int, ...]]
    attributes: dict[str, Any]


def find_block_fields(
    model: PreTrainedModel, stacks: Mapping[str, int], removed: Mapping[str, Sequence[int]]
) -> tuple[Fields, BlockNumbers]:
    """Finds how the config says that blocks are removed, so that the model's class builds just those that remain.

    It tries lists with a value for each block, without those of removed ones; the fewest numbers of blocks that, changed
    together, make the class build as many blocks and all else as it is; and, where others than those that remain are then
    built, one more field, as the numbers of blocks without experts. Where none says it, the error names what would differ.

    Args:
        model: The model.
        stacks: The number of blocks in each stack.
        removed: The blocks that are removed, by stack.
    """
    finder = _Finder(model, stacks, removed)
    reasons = list[str]()
    for lists in finder.lists():
        counts, reason = finder.counts(lists)
        reasons.append(reason)
        for fields in (*counts, *(counts[0] | more for more in finder.others(counts))):
            reason, numbers = finder.compare(finder.build(lists | fields))
            if not reason:
                return lists | fields, numbers
            reasons.append(reason)
    words = " and ".join(f"blocks {', '.join(map(str, numbers))} of {name}" for name, numbers in removed.items())
    raise ValueError(
        f"blocks: the config of {type(model).__name__} cannot say that {words} are removed: "
        + next(filter(None, reasons), "no field of it says how many there are")
    )


class _Finder:
    def __init__(self, model: PreTrainedModel, stacks: Mapping[str, int], removed: Mapping[str, Sequence[int]]) -> None:
        self.model, self.stacks, self.removed = model, stacks, removed
        self.fields = fields_of(model.config)
        self._known: dict[str, Built | None] = {}
        now = self.build({})
        if now is None or any(_count(now, name) != count for name, count in stacks.items()):
            raise ValueError(f"blocks: {type(model).__name__} does not have the blocks that its class builds from its config")
        self.now = now
        self.wanted = {new: size for name, size in now.tensors.items() if (new := self._moved(name)) is not None}

    def build(self, fields: Fields) -> Built | None:
        """Builds the class from the config with some fields changed, as it is read back; None if the class refuses it."""
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
        """Returns the new name of a tensor or attribute; None if it is removed."""
        if (block := block_of(name, self.removed)) is None:
            return name
        stack, number = block
        rest = name.removeprefix(f"{stack}.{number}.")
        removed = self.removed[stack]
        return None if number in removed else f"{stack}.{number - sum(before < number for before in removed)}.{rest}"

    def lists(self) -> Iterator[Fields]:
        """Yields lists without values of removed blocks, fewer and fewer: of two equally deep stacks, one may own some."""
        shorter: Fields = {}
        for (name, value), (stack, removed) in itertools.product(self.fields.items(), self.removed.items()):
            long = isinstance(value, list | tuple) and len(value) == self.stacks[stack]
            if long and self.build({name: value[:-1]}) != self.now:
                shorter[name] = type(value)(item for number, item in enumerate(value) if number not in removed)
        for number in range(len(shorter), -1, -1):
            yield from map(dict, itertools.combinations(shorter.items(), number))

    def counts(self, lists: Fields) -> tuple[list[Fields], str]:
        """Returns the fewest fields that give the number of blocks; or none, and what else would change."""
        fewer = list(dict.fromkeys((self.stacks[stack], len(removed)) for stack, removed in self.removed.items()))
        options = [(name, lower) for name, value in self.fields.items() for lower in _lowered(value, fewer, len(self.removed))]
        reason = ""
        for number in range(TOGETHER + 1):
            if number == 2:  # pairs are many
                options = self._of_use(options, lists)
            fitting = list[Fields]()
            for fields in map(dict, itertools.combinations(options, number)):
                built = self.build(lists | fields) if len(fields) == number else None
                if built is not None and self._has_counts(built, all_removed=True):
                    different = self._different(built, outside=True)
                    reason = reason or different
                    fitting += [] if different else [fields]
            if fitting:
                return fitting, ""
        return [], reason

    def _of_use(self, options: list[tuple[str, Any]], lists: Fields) -> list[tuple[str, Any]]:
        """Leaves out what alone changes all else, or nothing; but nothing where the class builds others only if more change."""
        alone = [self.build(lists | {name: lower}) for name, lower in options]
        unchanged = None if None in alone else self.build(lists)
        return [
            option
            for option, built in zip(options, alone, strict=True)
            if built is None
            or (built != unchanged and not self._different(built, outside=True) and self._has_counts(built, all_removed=False))
        ]

    def others(self, counts: Sequence[Fields]) -> Iterator[Fields]:
        """Yields one more field that may name single blocks, if others count them: a number of first ones, or numbers."""
        if not counts:
            return
        for (name, value), (stack, removed) in itertools.product(self.fields.items(), self.removed.items()):
            count = self.stacks[stack]
            left = [number for number in range(count) if number not in removed]
            if type(value) is int and name not in counts[0] and 0 < value <= count:
                yield {name: value - sum(number < value for number in removed)}
            elif isinstance(value, list | tuple) and value and all(type(v) is int and 0 <= v < count for v in value):
                yield {name: type(value)(left.index(number) for number in value if number in left)}

    def compare(self, built: Built | None) -> tuple[str, BlockNumbers]:
        """Describes the first difference in the remaining blocks, and returns the block numbers that change."""
        if built is None:
            return "its class does not accept it", {}
        if different := self._different(built):
            return different, {}
        numbers: BlockNumbers = {}
        for name, value in self.now.attributes.items():
            if (new := self._moved(name)) is None or (then := built.attributes.get(new)) == value:
                continue
            if _is_number(value) and _is_number(then) and self._is_numbering(name, new, value, then):
                numbers[new] = (value, then)
            elif block_of(name, self.removed) is not None:
                return f"its class then builds {new} = {then!r}, and what comes to that place has {value!r}", {}
        return "", numbers

    def _has_counts(self, built: Built, all_removed: bool) -> bool:
        """Tells whether each stack has as many blocks as it shall have, or, unless `all_removed`, as it had."""
        return all(
            _count(built, stack) in (self.stacks[stack] - len(removed), *(() if all_removed else (self.stacks[stack],)))
            for stack, removed in self.removed.items()
        )

    def _different(self, built: Built, outside: bool = False) -> str:
        """Describes the first tensor whose size differs from what remains, or only of those outside of blocks."""
        for name in [*self.wanted, *built.tensors]:
            sizes = built.tensors.get(name), self.wanted.get(name)
            if sizes[0] != sizes[1] and not (outside and block_of(name, self.removed)):
                shown = (size or "missing" for size in sizes)
                return "{} is {} in what its class then builds, and {} in what comes to that place".format(name, *shown)
        return ""

    def _is_numbering(self, name: str, new: str, value: int, then: int) -> bool:
        """Tells whether a whole number that would change only says which block it is in, or how many blocks there are."""
        block, block_then = block_of(name, self.removed), block_of(new, self.removed)
        counts = [(self.stacks[stack], self.stacks[stack] - len(removed)) for stack, removed in self.removed.items()]
        if block is None or block_then is None or (value, then) in counts:
            return True
        (stack, number), (_, number_then) = block, block_then
        if number == number_then:
            return False
        step, rest = divmod(value - then, number - number_then)
        prefix, suffix = f"{stack}.", name.removeprefix(f"{stack}.{number}")
        values = {other: self.now.attributes.get(f"{prefix}{other}{suffix}") for other in range(self.stacks[stack])}
        even = all(known - value == step * (other - number) for other, known in values.items() if _is_number(known))
        return not rest and step > 0 and even


def _as_built(meta_model: PreTrainedModel) -> Built:
    attributes: dict[str, Any] = {}
    for name, module in meta_model.named_modules():
        if next(module.parameters(), None) is not None:
            for attribute, value in vars(module).items():
                plain = isinstance(value, bool | int | float | str | None)
                if plain and not attribute.startswith("_") and attribute != "training":
                    attributes[f"{name}.{attribute}"] = value
    return Built({name: tuple(tensor.shape) for name, tensor in meta_model.state_dict().items()}, attributes)


def _lowered(value: Any, fewer: Sequence[tuple[int, int]], stacks: int) -> list[Any]:  # noqa: ANN401 - any field of a config
    """Returns a number of blocks less the removed ones; of a list of such numbers, as of stages, at most one for each stack.

    >>> _lowered([2, 2, 6], [(2, 1)], 2)
    [[1, 1, 6], [1, 2, 6], [2, 1, 6]]
    """
    if _is_number(value):
        return [value - by for count, by in fewer if count == value]
    if not isinstance(value, list | tuple) or not all(map(_is_number, value)):
        return []
    changes = [[(at, number - by) for count, by in fewer if count == number] for at, number in enumerate(value)]
    changes = [options for options in changes if options]
    lowered = []
    for count in range(min(stacks, len(changes)) if len(changes) <= STAGES else 1, 0, -1):
        for new in itertools.chain(*(itertools.product(*some) for some in itertools.combinations(changes, count))):
            numbers = list(value)
            for at, number in new:
                numbers[at] = number
            lowered.append(type(value)(numbers))
    return lowered


def _count(built: Built, stack: str) -> int:
    return len({block_of(name, [stack]) for name in built.tensors} - {None})


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int
