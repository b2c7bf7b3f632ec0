"""Finds config fields that determine unit counts, by building models with changed fields."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from billhook.model.cache import cached
from billhook.model.config_fields import build_on_meta, fields_of, with_fields
from billhook.tracing.axes import leaves
from billhook.tracing.groups import Group, count_positions
from billhook.tracing.trace import trace

TOGETHER = 3  # largest number of fields that change together

Sizes = dict[tuple[str, int], int]
"""Sizes of dimensions of parameters: (parameter, dimension) -> size."""


class FieldFinder:
    """Finds config fields by changing them. Results are cached by model signature."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.now = _sizes_of(model)
        self._known: dict[tuple[tuple[str, int], ...], Sizes | None] = {}

    def find(self, groups: Sequence[Group]) -> tuple[str, ...]:
        """Finds the fields, by dotted name, that together reduce all groups and nothing else.

        The result includes fields that must be set explicitly because others change them. It is empty if no fields match.
        """
        return cached(partial(self._find_new, groups), self.model, "fields", *(group.number for group in groups))

    def _find_new(self, groups: Sequence[Group]) -> tuple[str, ...]:
        before = groups[0].size
        if before == 1:  # a field without a smaller value
            return ()
        after = next(before // n for n in range(2, before + 1) if before % n == 0)
        wanted: Sizes = {}
        for group in groups:
            for member in group.members:
                if not member.buffer:
                    fewer = (before - after) * count_positions(member.axis, group.leaf)
                    wanted[member.name, member.dim] = member.axis.size - fewer
        stated, unset = dict[str, int](), dict[str, int]()
        for name, value in _numbers(self.model.config):
            if value is None:
                unset[name] = after
            elif value % before == 0:
                stated[name] = value // before * after
        fields = self._find(stated, wanted, groups, after) or self._find(unset, wanted, groups, after)
        return fields or (self._find(stated, wanted, groups, after, self._defaults) if self._defaults else ())

    def values(self, size: int, fields: Sequence[str], count: int) -> dict[str, int]:
        """Returns the fields for `count` units. An unset field keeps its default."""
        stated = {name: value for name, value in _numbers(self.model.config) if name in fields}
        left_open = self._defaults if any(stated.values()) else {}
        return {name: left_open.get(name, count) if v is None else v // size * count for name, v in stated.items()}

    @cached_property
    def _defaults(self) -> dict[str, int]:
        """The defaults of unset fields that determine parameter sizes."""
        defaults: dict[str, int] = {}
        for name, value in _numbers(self.model.config):
            if value is None and (changed := self._changed({name: 2})):
                # setting the field to 2 instead of its default has reduced these dimensions
                widths = {2 * self.now[key] // size for key, size in changed.items() if size}
                if len(widths) == 1 and self._changed({name: min(widths)}) == {}:
                    defaults[name] = min(widths)
        return defaults

    def _find(
        self, tried: dict[str, int], wanted: Sizes, groups: Sequence[Group], after: int, also: Mapping[str, int] = {}
    ) -> tuple[str, ...]:
        fitting: dict[str, int] = {}
        for name, value in tried.items():
            changed = self._changed({name: value, **also})
            if changed and changed.items() <= wanted.items():
                fitting[name] = value
        for count in range(1, min(len(fitting), TOGETHER) + 1):
            for names in itertools.combinations(fitting, count):
                values = {**{name: fitting[name] for name in names}, **also}
                if self._changed(values) == wanted and self._has_fewer(values, groups, after):
                    return (*names, *also)
        return ()

    def _has_fewer(self, values: dict[str, int], groups: Sequence[Group], after: int) -> bool:
        """Returns whether the units themselves are fewer, not narrower, such as half-width heads."""
        try:
            axes = trace(build_on_meta(self.model, with_fields(self.model.config, values))).axes
        except ValueError:
            return False
        for group in groups:
            for member in group.members:
                sizes = [leaf.size for leaf in leaves(axes[member.name][member.dim]) if leaf.size > 1]
                expected = [size for leaf in leaves(member.axis) if (size := after if leaf is group.leaf else leaf.size) > 1]
                if sizes != expected:
                    return False
        return True

    def _changed(self, values: dict[str, int]) -> Sizes | None:
        """Returns the sizes that fields change. None if the class raises or has other parameters."""
        key = tuple(sorted(values.items()))
        if key not in self._known:
            sizes: Sizes = {}
            with suppress(Exception):  # whatever a model's own code raises
                config = with_fields(self.model.config, values)
                sizes = cached(lambda: _sizes_of(build_on_meta(self.model, config)), (type(self.model), config), "places")
            same = sizes.keys() == self.now.keys()
            self._known[key] = {key: size for key, size in sizes.items() if size != self.now[key]} if same else None
        return self._known[key]


def _sizes_of(model: nn.Module) -> Sizes:
    return {(name, d): size for name, parameter in model.named_parameters() for d, size in enumerate(parameter.shape)}


def _numbers(config: PretrainedConfig) -> list[tuple[str, int | None]]:
    """Returns the integer fields of a config, and unset fields that could be integers."""
    return [(name, value) for name, value in fields_of(config).items() if value is None or (type(value) is int and value > 1)]
