"""Finds how a config says that blocks were removed, by building the model's own class; nothing is looked up."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import nn
from transformers import PreTrainedModel

from billhook.model.config_fields import Fields, build_on_meta, fields_of, read_back, with_fields
from billhook.model.memory import remembered
from billhook.units.fields import TOGETHER

Gone = Mapping[str, Sequence[int]]
"""Removed blocks, by stack."""
STAGES = 6  # numbers in one field that may all change, at most
Numbers = dict[str, tuple[int, int]]
"""Whole-number attributes, by their new names: their values before and after."""


@dataclass(frozen=True)
class Built:
    """A model as its class builds it: sizes of tensors in `state_dict`, plain attributes of modules that hold parameters."""

    tensors: dict[str, tuple[int, ...]]
    attributes: dict[str, Any]


def find_then(model: PreTrainedModel, stacks: Mapping[str, int], gone: Gone) -> tuple[Fields, Numbers]:
    """Finds how the config says that blocks are removed, so that the model's class builds just those that remain.

    It tries lists with a value for each block, without those of removed ones; the fewest numbers of blocks that, changed
    together, make the class build as many blocks and all else as it is; and, where others than those that remain are then
    built, one more field, as the numbers of blocks without experts. Where none says it, the error names what would differ.
    """
    finder = _Finder(model, dict(stacks), gone)
    reasons = list[str]()
    for lists in finder.lists():
        counts, reason = finder.counts(lists)
        reasons.append(reason)
        for fields in (*counts, *(counts[0] | more for more in finder.others(counts))):
            reason, numbers = finder.compare(finder.build(lists | fields))
            if not reason:
                return lists | fields, numbers
            reasons.append(reason)
    raise ValueError(
        f"blocks: the config of {type(model).__name__} cannot say that {finder.words} are removed: "
        + next(filter(None, reasons), "no field of it says how many there are")
    )


class _Finder:
    def __init__(self, model: PreTrainedModel, stacks: dict[str, int], gone: Gone) -> None:
        self.model, self.stacks, self.gone = model, stacks, gone
        self.words = " and ".join(f"blocks {', '.join(map(str, own))} of {name}" for name, own in gone.items())
        self.fields = fields_of(model.config)
        self.tried: dict[str, Built | None] = {}
        now = self.build({})
        if now is None or any(_count(now.tensors, name) != count for name, count in stacks.items()):
            raise ValueError(f"blocks: {type(model).__name__} does not have the blocks that its class builds from its config")
        self.now = now
        self.wanted = {new: size for name, size in now.tensors.items() if (new := self.moved(name)) is not None}

    def build(self, fields: Fields) -> Built | None:
        """Builds the class from the config with some fields changed, as it is read back; None if the class refuses it."""
        key = str(sorted(fields.items(), key=lambda one: one[0]))
        if key not in self.tried:
            self.tried[key] = self._build(fields)
        return self.tried[key]

    def _build(self, fields: Fields) -> Built | None:
        try:
            config = read_back(with_fields(self.model.config, fields))
            return remembered(lambda: _built(build_on_meta(self.model, config)), (type(self.model), config), "built")
        except Exception:  # whatever a class of configs or models raises
            return None

    def moved(self, name: str) -> str | None:
        """Returns the new name of a tensor or attribute; None if it is removed."""
        if (stack := self._stack_of(name)) is None:
            return name
        place, rest = _place(name, stack)
        gone = self.gone[stack]
        return None if place in gone else f"{stack}.{place - sum(number < place for number in gone)}.{rest}"

    def lists(self) -> Iterator[Fields]:
        """Yields lists without values of removed blocks, fewer and fewer: of two equally deep stacks, one may own some."""
        found: Fields = {}
        for (name, value), (stack, gone) in itertools.product(self.fields.items(), self.gone.items()):
            long = isinstance(value, list | tuple) and len(value) == self.stacks[stack]
            if long and self.build({name: value[:-1]}) != self.now:
                found[name] = type(value)(one for number, one in enumerate(value) if number not in gone)
        for number in range(len(found), -1, -1):
            yield from map(dict, itertools.combinations(found.items(), number))

    def counts(self, lists: Fields) -> tuple[list[Fields], str]:
        """Returns the fewest fields that give the number of blocks; or none, and what else would change."""
        fewer = {(self.stacks[stack], len(gone)): None for stack, gone in self.gone.items()}
        options = [(name, lower) for name, value in self.fields.items() for lower in _lowered(value, list(fewer), len(self.gone))]
        reason = ""
        for number in range(TOGETHER + 1):
            if number == 2:
                options = self._of_use(options, lists)
            chosen = [dict(fields) for fields in itertools.combinations(options, number) if len(dict(fields)) == number]
            built = [(fields, made) for fields in chosen if (made := self.build(lists | fields)) and self._as_many(made)]
            if fitting := [fields for fields, made in built if not self._different(made, outside=True)]:
                return fitting, ""
            reason = reason or next((self._different(made, outside=True) for _, made in built), "")
        return [], reason

    def _of_use(self, options: list[tuple[str, Any]], lists: Fields) -> list[tuple[str, Any]]:
        """Leaves out what alone changes all else, or nothing; but nothing where the class builds others only if more change."""
        alone = [self.build(lists | {name: lower}) for name, lower in options]
        as_it_is = None if None in alone else self.build(lists)
        return [
            option
            for option, made in zip(options, alone, strict=True)
            if made is None or (made != as_it_is and not self._different(made, outside=True) and self._towards(made))
        ]

    def others(self, counts: Sequence[Fields]) -> Iterator[Fields]:
        """Yields one more field that may name single blocks, if others count them: a number of first ones, or numbers."""
        if not counts:
            return
        for (name, value), (stack, gone) in itertools.product(self.fields.items(), self.gone.items()):
            left = [number for number in range(self.stacks[stack]) if number not in gone]
            if type(value) is int and name not in counts[0] and 0 < value <= self.stacks[stack]:
                yield {name: value - sum(number < value for number in gone)}
            elif isinstance(value, list | tuple) and value and all(type(v) is int and 0 <= v < self.stacks[stack] for v in value):
                yield {name: type(value)(left.index(number) for number in value if number in left)}

    def compare(self, built: Built | None) -> tuple[str, Numbers]:
        """Describes the first difference in the remaining blocks, and returns the block numbers that change."""
        if built is None:
            return "its class does not accept it", {}
        if different := self._different(built):
            return different, {}
        numbers: Numbers = {}
        for name, value in self.now.attributes.items():
            if (new := self.moved(name)) is None or (made := built.attributes.get(new)) == value:
                continue
            if _is_number(value) and _is_number(made) and self._numbering(name, new, value, made):
                numbers[new] = (value, made)
            elif self._stack_of(name) is not None:
                return f"its class then builds {new} = {made!r}, and what comes to that place has {value!r}", {}
        return "", numbers

    def _as_many(self, built: Built) -> bool:
        return all(_count(built.tensors, stack) == self.stacks[stack] - len(gone) for stack, gone in self.gone.items())

    def _towards(self, built: Built) -> bool:
        """Tells whether each stack has as many blocks as it had or as it shall have."""
        counts = ((_count(built.tensors, stack), self.stacks[stack], len(gone)) for stack, gone in self.gone.items())
        return all(made in (before, before - fewer) for made, before, fewer in counts)

    def _different(self, built: Built, outside: bool = False) -> str:
        """Describes the first tensor whose size differs from what remains, or only of those outside of blocks."""
        for name in [*self.wanted, *built.tensors]:
            if outside and self._stack_of(name) is not None:
                continue
            if (stays := self.wanted.get(name)) != (made := built.tensors.get(name)):
                sizes = (size or "missing" for size in (made, stays))
                return "{} is {} in what its class then builds, and {} in what comes to that place".format(name, *sizes)
        return ""

    def _numbering(self, name: str, new: str, value: int, made: int) -> bool:
        """Tells whether a whole number that would change only says which block it is in, or how many blocks there are."""
        stack = self._stack_of(name)
        counts = [(self.stacks[own], self.stacks[own] - len(gone)) for own, gone in self.gone.items()]
        if stack is None or (value, made) in counts:
            return True
        (place, rest), (then, _) = _place(name, stack), _place(new, stack)
        own = {number: self.now.attributes.get(f"{stack}.{number}.{rest}") for number in range(self.stacks[stack])}
        there = [(number, known) for number, known in own.items() if _is_number(known)]
        step, odd = divmod(value - made, place - then) if place != then else (0, 1)
        return not odd and step > 0 and all(known - value == step * (number - place) for number, known in there)

    def _stack_of(self, name: str) -> str | None:
        return next((stack for stack in self.gone if name.startswith(f"{stack}.")), None)


def _built(shadow: nn.Module) -> Built:
    return Built({name: tuple(tensor.shape) for name, tensor in shadow.state_dict().items()}, dict(_attributes(shadow)))


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if next(module.parameters(), None) is not None:
            for attr, value in vars(module).items():
                if not attr.startswith("_") and attr != "training" and isinstance(value, bool | int | float | str | None):
                    yield f"{name}.{attr}", value


def _lowered(value: Any, fewer: Sequence[tuple[int, int]], stacks: int) -> list[Any]:  # noqa: ANN401 - any field of a config
    """Returns a number of blocks less the removed ones; of a list of such numbers, as of stages, at most one for each stack.

    >>> _lowered([2, 2, 6], [(2, 1)], 2)
    [[1, 1, 6], [1, 2, 6], [2, 1, 6]]
    """
    if _is_number(value):
        return [value - by for count, by in fewer if count == value]
    if not isinstance(value, list | tuple) or not all(map(_is_number, value)):
        return []
    changes = [[(at, one - by) for count, by in fewer if count == one] for at, one in enumerate(value)]
    there = [own for own in changes if own]
    most = min(stacks, len(there)) if len(there) <= STAGES else 1
    chosen = (itertools.product(*own) for number in range(most, 0, -1) for own in itertools.combinations(there, number))
    return [type(value)(dict(new).get(at, one) for at, one in enumerate(value)) for new in itertools.chain(*chosen)]


def _place(name: str, stack: str) -> tuple[int, str]:
    """Returns a block's place in its stack, and the rest of the name."""
    number, _, rest = name.removeprefix(f"{stack}.").partition(".")
    return int(number), rest


def _count(names: Iterable[str], stack: str) -> int:
    return len({_place(name, stack)[0] for name in names if name.startswith(f"{stack}.")})


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int
