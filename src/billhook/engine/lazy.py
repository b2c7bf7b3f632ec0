"""New values of parameters, which lie beside the model until they are asked for: in memory, in files, or as shards of ranks."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TypeVar

from torch import Tensor
from typing_extensions import Self

from billhook.engine.parts import fingerprint

Read = Callable[[], Tensor]
"""Reads the values of a parameter; where ranks share them, all ranks call it together."""
T = TypeVar("T", bound=Tensor)
Part = str | Mapping[str, Read]
"""What tells some values from all others, or the values, of which a hash does."""
Change = Callable[[str, Read], Tensor]
"""Makes other values of those of a parameter, given its name and what reads them."""


class LazyTensors(Mapping[str, Tensor]):
    """Values by the parameter's name, each read when it is asked for.

    Args:
        reads: What reads each.
        known_by: What tells them from all others, for work that starts from them; None: a hash of all, read for it.
        parts: The same of values that they are made of, instead.
    """

    def __init__(self, reads: Mapping[str, Read], known_by: str | None = "", parts: Sequence[Part] = ()) -> None:
        self.reads = dict(reads)
        self._parts = tuple(parts) or (self.reads if known_by is None else known_by,)

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> Self:
        """Returns values that are read when they are asked for as they are, and others, which are in memory, as such."""
        return values if isinstance(values, cls) else cls({name: partial(_held, value) for name, value in values.items()}, None)

    @property
    def key(self) -> str:
        """The words and hashes that tell these values from all others."""
        hashes = (part if isinstance(part, str) else fingerprint({n: part[n]() for n in part}) for part in self._parts)
        return " ".join(filter(None, hashes))

    def __getitem__(self, name: str) -> Tensor:
        """Reads the values of one parameter."""
        return self.reads[name]()

    def __contains__(self, name: object) -> bool:
        """Tells whether there are values of a parameter; nothing is read."""
        return name in self.reads

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __len__(self) -> int:
        return len(self.reads)

    def __or__(self, other: Mapping[str, Tensor]) -> "LazyTensors":
        """Returns these values, and others, which count where there are both; nothing is read."""
        others = LazyTensors.of(other)
        return LazyTensors({**self.reads, **others.reads}, parts=(*self._parts, *others._parts)) if self else others

    def __ror__(self, other: Mapping[str, Tensor]) -> "LazyTensors":
        """Returns other values, and these, which count where there are both; nothing is read."""
        return LazyTensors.of(other) | self

    def map(self, change: Change) -> "LazyTensors":
        """Returns what becomes of each, which is made when it is asked for."""
        return LazyTensors({name: partial(change, name, read) for name, read in self.reads.items()}, parts=self._parts)

    def renamed(self, name: Callable[[str], str]) -> "LazyTensors":
        """Returns the same values under other names; nothing is read."""
        return LazyTensors({name(before): read for before, read in self.reads.items()}, parts=self._parts)

    def without(self, names: Collection[str]) -> "LazyTensors":
        """Returns the values of other parameters; nothing is read."""
        return LazyTensors({name: read for name, read in self.reads.items() if name not in names}, parts=self._parts)

    def under(self, modules: Collection[str]) -> "LazyTensors":
        """Returns the values of the parameters that modules have themselves; nothing is read."""
        return LazyTensors({n: read for n, read in self.reads.items() if n.rpartition(".")[0] in modules}, parts=self._parts)

    @cached_property
    def modules(self) -> Mapping[str, Mapping[str, Read]]:
        """The functions that read each, by the module that has the parameter and by its name there."""
        modules: dict[str, dict[str, Read]] = {}
        for name, read in self.reads.items():
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = read
        return modules

    def of_module(self, module: str) -> dict[str, Tensor]:
        """Reads the values of a module's own parameters, by their names in it."""
        return {part: read() for part, read in self.modules.get(module, {}).items()}


def _held(value: Tensor) -> Tensor:
    return value


def by_parameter(values: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Names values of modules' parameters as the model does."""
    return {f"{module}.{part}": value for module, parts in values.items() for part, value in parts.items()}
