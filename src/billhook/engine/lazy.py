"""Lazy parameter values, which are read on access from memory, files, or shards."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TypeVar

from torch import Tensor
from typing_extensions import Self

from billhook.engine.parts import fingerprint
from billhook.linalg import TensorsByName

Read = Callable[[], Tensor]  # reads the values of a parameter; for shards, all ranks call it together
T = TypeVar("T", bound=Tensor)


class LazyTensors(Mapping[str, Tensor]):
    """Values by parameter name, each read on access.

    Args:
        reads: The function that reads each value.
        known_by: Key that identifies the values. None hashes all of them on demand.
        parts: Keys of the parts that these values were made of, or their values, which are hashed, instead of `known_by`.
    """

    def __init__(
        self, reads: Mapping[str, Read], known_by: str | None = "", parts: Sequence[str | Mapping[str, Read]] = ()
    ) -> None:
        self.reads = dict(reads)
        self._parts = tuple(parts) or (self.reads if known_by is None else known_by,)

    @classmethod
    def of(cls, values: TensorsByName) -> Self:
        """Returns lazy values unchanged, and wraps values in memory."""
        return (
            values if isinstance(values, cls) else cls({name: partial(_identity, value) for name, value in values.items()}, None)
        )

    @property
    def key(self) -> str:
        """The key that identifies these values, made of words and hashes."""
        hashes = (part if isinstance(part, str) else fingerprint({n: part[n]() for n in part}) for part in self._parts)
        return " ".join(filter(None, hashes))

    def __getitem__(self, name: str) -> Tensor:
        """Reads the value of a parameter."""
        return self.reads[name]()

    def __contains__(self, name: object) -> bool:
        """Returns whether a parameter has a value, without reading it."""
        return name in self.reads

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __len__(self) -> int:
        return len(self.reads)

    def __or__(self, other: TensorsByName) -> "LazyTensors":
        """Merges with other values, which take precedence. Nothing is read."""
        others = LazyTensors.of(other)
        return LazyTensors({**self.reads, **others.reads}, parts=(*self._parts, *others._parts)) if self else others

    def __ror__(self, other: TensorsByName) -> "LazyTensors":
        """Merges other values with these, which take precedence. Nothing is read."""
        return LazyTensors.of(other) | self

    def map(self, change: Callable[[str, Read], Tensor]) -> "LazyTensors":
        """Returns values that a function of name and read function changes on access."""
        return LazyTensors({name: partial(change, name, read) for name, read in self.reads.items()}, parts=self._parts)

    def renamed(self, name: Callable[[str], str]) -> "LazyTensors":
        """Renames parameters. Nothing is read."""
        return LazyTensors({name(before): read for before, read in self.reads.items()}, parts=self._parts)

    def without(self, names: Collection[str]) -> "LazyTensors":
        """Returns the values of all other parameters. Nothing is read."""
        return LazyTensors({name: read for name, read in self.reads.items() if name not in names}, parts=self._parts)

    @cached_property
    def modules(self) -> Mapping[str, Mapping[str, Read]]:
        """The read functions by module and by parameter name in the module."""
        modules: dict[str, dict[str, Read]] = {}
        for name, read in self.reads.items():
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = read
        return modules

    def of_module(self, module: str) -> dict[str, Tensor]:
        """Reads the values of a module's own parameters, by name in the module."""
        return {part: read() for part, read in self.modules.get(module, {}).items()}


def _identity(value: Tensor) -> Tensor:
    return value


def by_parameter(values: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    """Names values by parameter, as the model does."""
    return {f"{module}.{part}": value for module, parts in values.items() for part, value in parts.items()}
