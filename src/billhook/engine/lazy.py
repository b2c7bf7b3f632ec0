"""Other values for parameters of a model whose blocks come and go: they lie elsewhere, too, until they are asked for."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn
from typing_extensions import Self

from billhook.engine.shards import turns_of
from billhook.engine.state import replaced

Reads = Mapping[str, Mapping[str, Callable[[], Tensor]]]
"""By module and by the name in it, what reads the values of a parameter."""


class Aside(Mapping[str, Mapping[str, Tensor]]):
    """Values of parameters, by module and by their name in it, which are read each time that the module is asked for.

    Args:
        reads: What reads each of them, by module and name.
    """

    def __init__(self, reads: Reads) -> None:
        self.reads = reads

    @classmethod
    def of(cls, values: Mapping[str, Mapping[str, Tensor]]) -> Self:
        """Returns values as they are if they are such, and otherwise such, of values that are here."""
        if isinstance(values, cls):
            return values
        return cls({module: {part: partial(itself, one) for part, one in own.items()} for module, own in values.items()})

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


def itself(value: Tensor) -> Tensor:
    """Returns a value that is here."""
    return value


def by_module(reads: Mapping[str, Callable[[], Tensor]]) -> Reads:
    """Takes names of parameters, after a number if there is one, apart into modules and names in them."""
    found = defaultdict[str, dict[str, Callable[[], Tensor]]](dict)
    for key, read in reads.items():
        module, _, part = key.rpartition(" ")[2].rpartition(".")
        found[module][part] = read
    return dict(found)


@contextmanager
def computing_with(model: nn.Module, new: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
    """Has modules compute with other values of parameters, within; in blocks that ranks share they are read when these come."""
    turns, coming, here = turns_of(model), dict[nn.Parameter, Callable[[], Tensor]](), dict[nn.Module, dict[str, Tensor]]()
    for name, own in Aside.of(new).reads.items():
        module = model.get_submodule(name)
        for part, read in own.items():
            parameter = module.get_parameter(part)
            if turns is not None and module in turns.owner and parameter in turns.shards:
                coming[parameter] = read
            else:
                here.setdefault(module, {})[part] = read()
    with nullcontext() if turns is None else turns.instead(coming), replaced(here):
        yield
