"""Other values for parameters of a model whose blocks come from files: they lie in files, too, until they are asked for."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


class Aside(Mapping[str, Mapping[str, Tensor]]):
    """Values of parameters, by module and by their name in it, which are read each time that the module is asked for.

    Args:
        reads: What reads each of them, by module and name.
    """

    def __init__(self, reads: Mapping[str, Mapping[str, Callable[[], Tensor]]]) -> None:
        self._reads = reads

    def __getitem__(self, module: str) -> Mapping[str, Tensor]:
        """Reads the values of one module."""
        return {name: read() for name, read in self._reads[module].items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)

    def over(self, other: "Aside") -> "Aside":
        """Returns these values, and another's for modules that have none of these."""
        return Aside({**other._reads, **self._reads})
