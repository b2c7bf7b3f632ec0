"""Other values for parameters of a model whose blocks come and go: they lie elsewhere, too, until they are asked for."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

Reads = Mapping[str, Mapping[str, Callable[[], Tensor]]]
"""By module and by the name in it, what reads the values of a parameter."""


class Aside(Mapping[str, Mapping[str, Tensor]]):
    """Values of parameters, by module and by their name in it, which are read each time that the module is asked for.

    Args:
        reads: What reads each of them, by module and name.
    """

    def __init__(self, reads: Reads) -> None:
        self.reads = reads

    def __getitem__(self, module: str) -> Mapping[str, Tensor]:
        """Reads the values of one module."""
        return {name: read() for name, read in self.reads[module].items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __len__(self) -> int:
        return len(self.reads)

    def over(self, other: "Aside") -> "Aside":
        """Returns these values, and another's for modules that have none of these."""
        return Aside({**other.reads, **self.reads})


def by_module(reads: Mapping[str, Callable[[], Tensor]]) -> Reads:
    """Takes names of parameters, after a number if there is one, apart into modules and names in them."""
    found = defaultdict[str, dict[str, Callable[[], Tensor]]](dict)
    for key, read in reads.items():
        module, _, part = key.rpartition(" ")[2].rpartition(".")
        found[module][part] = read
    return dict(found)
