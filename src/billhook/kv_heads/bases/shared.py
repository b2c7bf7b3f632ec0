"""The attentions of a model whose blocks ranks share: each rank has its shards of what becomes of them."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from torch import nn

from billhook.engine.batches import Run
from billhook.engine.lazy import Aside, by_module, computing_with
from billhook.engine.passes import Together, passing
from billhook.engine.shards import Turns, turns_of
from billhook.engine.state import undisturbed
from billhook.engine.store import apart
from billhook.engine.walk import Reduce
from billhook.kv_heads.bases.moments import Moments
from billhook.kv_heads.bases.passing import Passing
from billhook.kv_heads.bases.ready import Attentions
from billhook.kv_heads.methods.base import Rendered
from billhook.model.plan import Weights
from billhook.repairs.in_turn import Refitted
from billhook.repairs.repair import Repair
from billhook.repairs.shared import Gathered, InShards
from billhook.repairs.visitor import Given


class SharedAttentions(Attentions):
    """The attentions of a model, a block of which is whole at a time, that are to have fewer KV heads."""

    def __init__(self, turns: Turns, model: nn.Module, groups: Mapping[str, int], reduce: Reduce | None = None) -> None:
        super().__init__(model, groups, reduce)
        self._turns, self._rest = turns, InShards(turns, dict(model.named_modules()))

    def rendered(self, methods: Sequence[Rendered], trials: Sequence[Run]) -> Iterator[tuple[Rendered, Given]]:
        """Yields for each of some methods, which group heads alike, what `equal` returns; one pass renders all of them.

        Where blocks are called one after the other, moments go with their block; otherwise those of all are there at once.
        """
        if not any(self.summed(len(trials))) or not self._orderly(trials[:1]):
            yield from super().rendered(methods, trials)
            return
        passed, owner = Passing(self, methods[0].grouping, trials, self.places, self._reduce), self._turns.owner
        of = {name: owner.get(self.model.get_submodule(name)) for name in self.places}
        reads = [dict[str, Gathered]() for _ in methods]

        def render(block: nn.Module | None) -> None:
            for name in [name for name, inside in of.items() if inside is block]:
                del of[name]
                moments = passed.moments(name)
                for method, found in zip(methods, reads, strict=True):
                    found |= self._rest.put(None, self.equal_in(name, method, moments), {})

        passed.go(Together(self.model, render, self._turns, self._reduce))
        for block in list(dict.fromkeys(of.values())):  # what no run has come to, which is refused, and what is in no block
            render(block)
        yield from zip(methods, (Aside(by_module(found)) for found in reads), strict=True)

    def _orderly(self, trials: Sequence[Run]) -> bool:
        """Tells whether runs need blocks one after the other, on all ranks."""
        with undisturbed(self.model), apart(self.model, self._reduce), passing(self._turns, self.model) as passed:
            for trial in trials:
                trial.visit()
        return not any(self.summed(not passed.orderly))

    def equal(self, method: Rendered, moments: Mapping[str, Moments], pool: bool = True) -> Aside:
        """Returns by linear the parameters with which the heads of each group are equal; each attention's become shards."""
        reads = dict[str, Gathered]()
        for name, own in moments.items():
            reads |= self._rest.put(None, self.equal_in(name, method, own, pool), {})
        return Aside(by_module(reads))

    def repaired(self, new: Given, trials: Sequence[Run], repair: Repair) -> Aside:
        """Returns the same, with the linears behind attentions and feed-forwards refitted."""
        assert isinstance(new, Aside), "they are in memory"
        found = self._refitted(new, trials, repair)
        if isinstance(found, Refitted):
            return Aside(by_module(found.reads)).over(new)
        return Aside(by_module(self._rest.put(None, self.parameters(found), {}))).over(new)

    def weights(self, new: Given) -> Weights:
        """Returns new values by parameter, each gathered when it is asked for."""
        assert isinstance(new, Aside), "they are in memory"
        reads = {f"{linear}.{part}": read for linear, own in new.reads.items() for part, read in own.items()}
        return Refitted(reads)

    def compared(self, new: Given, trials: Sequence[Run]) -> Iterator[tuple[Run, list[Any], list[Any]]]:
        """Yields each run with the model's own outputs and those with other parameters; all ranks go on until none has any."""
        assert isinstance(new, Aside), "they are in memory"
        for number in count():
            mine = trials[number : number + 1]
            if not any(self.summed(len(mine))):
                return
            given = list[list[Any]]()
            for own in (Aside({}), new):
                with computing_with(self.model, own), apart(self.model, self._reduce):
                    given += [self._outputs({}, trial) for trial in mine]
            for trial in mine:
                yield trial, given[0], given[1]


def attentions_of(model: nn.Module, groups: Mapping[str, int], reduce: Reduce | None = None) -> Attentions:
    """Returns the attentions of a model, in memory or shared by ranks, that are to have fewer KV heads."""
    turns = turns_of(model)
    return Attentions(model, groups, reduce) if turns is None else SharedAttentions(turns, model, groups, reduce)
