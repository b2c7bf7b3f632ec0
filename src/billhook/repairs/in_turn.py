"""Refits the linears of a model whose blocks come and go, one block after the other; the new weights rest elsewhere."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from billhook.engine.files import Stream
from billhook.engine.lazy import itself
from billhook.engine.offload import outputs_in
from billhook.engine.shards import Turns
from billhook.engine.walk import Reduce, Site, Walk, find_sites
from billhook.repairs.visitor import RepairVisitor

Parameters = Mapping[str, Mapping[str, Tensor]]
"""By linear, its parameters by their name in it."""
Reads = Mapping[str, Callable[[], Tensor]]
"""What reads the values of parameters, by the parameter's name."""
Values = Mapping[str, Tensor]
"""New values of parameters, by the parameter's name."""


class Refitted(Mapping[str, Tensor]):
    """New values of parameters, by the parameter's name; each is read when it is asked for.

    Attributes:
        reads: What reads each.
        told: A hash of those values that no step of a stream has written; those that are the first rank's need none.
    """

    def __init__(self, reads: Reads, told: str = "") -> None:
        self.reads, self.told = reads, told

    def __getitem__(self, name: str) -> Tensor:
        """Returns the values of one parameter."""
        return self.reads[name]()

    def __contains__(self, name: object) -> bool:
        """Tells whether there are values of a parameter; nothing is read."""
        return name in self.reads

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __len__(self) -> int:
        return len(self.reads)


class Rest(Protocol):
    """Lets what becomes of linears rest somewhere."""

    def known(self, block: nn.Module) -> Mapping[str, dict[str, Tensor] | None]:
        """Returns what an earlier process has made of the linears of a block; None for one that it left without a refit."""

    def put(self, block: nn.Module | None, new: Parameters, refitted: Mapping[str, bool]) -> Reads:
        """Lets what has become of a block's linears rest, or of those in none, and returns what reads it.

        Args:
            block: The block, or None.
            new: The new parameters of its linears.
            refitted: Whether each of them was refitted.
        """


class RepairInTurn:
    """One walk over a model whose blocks come and go, in which each block's linears are refitted while it is there.

    Args:
        model: The model; its blocks are called one after the other, and stay as they are.
        coming: What has them come and go.
        rest: Where new weights rest.
        visitor: What refits linears.
        linears: All linears that are looked at, by name.
        kept: The names of those that are refitted.
        reduce: Sums over ranks; all then have the same blocks come in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        coming: Stream | Turns,
        rest: Rest,
        visitor: RepairVisitor,
        linears: Mapping[str, nn.Module],
        kept: Collection[str],
        reduce: Reduce | None = None,
    ) -> None:
        self.model, self.coming, self.rest, self.visitor = model, coming, rest, visitor
        self.linears, self.kept, self.reduce = linears, kept, reduce
        self.block: nn.Module | None = None
        self.reads = dict[str, Callable[[], Tensor]]()

    def go(self, sites: Sequence[Site], forwards: Sequence[Callable[[], object]], untouched: Collection[int]) -> Refitted:
        """Goes over sites with runs, of which some keep the old parameters."""
        self.visitor.take(self._inside(None))
        with outputs_in(self.visitor.shelf, self.model):
            Walk(sites, self.visitor, self.reduce, untouched=untouched, around=self._there)(forwards)
        self._pass()
        self._put(None)
        self.coming.leave()
        return Refitted(self.reads)

    def sites(self) -> list[Site]:
        """Finds where runs rest: at each linear, and at each block, in the order of the model's modules."""
        place = {module: number for number, module in enumerate(self.model.modules())}
        found = find_sites(self.model, self.linears, "layer", gates=True)
        blocks = set(self.coming.owner.values()) & place.keys()
        found += [Site(block, {}) for block in blocks - {site.module for site in found}]
        return sorted(found, key=lambda site: place[site.module])

    @contextmanager
    def _there(self, module: nn.Module) -> Iterator[None]:
        """Has the block of a module here; another one, which all runs have passed, goes first."""
        block = self.coming.owner.get(module)
        if block is not None and block is not self.block:
            self._pass()
            self.block = self.coming.bring(module)
            self.visitor.take(self._inside(block))
            for linear, own in self.rest.known(block).items():
                self.visitor.know(linear, own)
        elif block is not None:
            self.coming.bring(block)
        yield

    def _pass(self) -> None:
        """Lets what has become of a block's linears rest, and lets go of it."""
        if self.block is not None:
            self._put(self.block)
            self.block = None

    def _put(self, block: nn.Module | None) -> None:
        inside = self._inside(block)
        new = {name: self.visitor.own(name) for name in inside if name in self.kept}
        self.reads |= self.rest.put(block, new, {name: not self.visitor.left[name] for name in new})
        self.visitor.drop(inside)

    def _inside(self, block: nn.Module | None) -> list[str]:
        return [name for name, linear in self.linears.items() if self.coming.owner.get(linear) is block]


def by_parameter(new: Parameters) -> dict[str, Tensor]:
    """Names parameters of linears as the model does."""
    return {f"{linear}.{part}": value for linear, own in new.items() for part, value in own.items()}


def but(weights: Values, names: Collection[str]) -> Values:
    """Returns new values without those of some parameters; nothing is read."""
    if isinstance(weights, Refitted):
        return Refitted({name: read for name, read in weights.reads.items() if name not in names}, weights.told)
    return {name: values for name, values in weights.items() if name not in names}


def each_changed(weights: Values, change: Callable[[str, Callable[[], Tensor]], Tensor]) -> Values:
    """Returns what becomes of each of some new values; those that are read when they are asked for are changed then."""
    if isinstance(weights, Refitted):
        return Refitted({name: partial(change, name, read) for name, read in weights.reads.items()}, weights.told)
    return {name: change(name, partial(itself, value)) for name, value in weights.items()}


def called(weights: Values, name: Callable[[str], str]) -> Values:
    """Returns the same new values under other names; nothing is read."""
    if isinstance(weights, Refitted):
        return Refitted({name(own): read for own, read in weights.reads.items()}, weights.told)
    return {name(own): values for own, values in weights.items()}
