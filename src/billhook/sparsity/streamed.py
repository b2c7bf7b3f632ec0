"""Prunes a model whose blocks come from files one at a time, and go with zeros in them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn

from billhook.engine.batches import Run, runs_of
from billhook.engine.files import FileStore
from billhook.engine.trees import tree_map_only
from billhook.engine.walk import Reduce, Sequential, Site, Walk, find_sites, with_ways_out
from billhook.model.meta import to_meta
from billhook.sparsity.pruned import Applied
from billhook.sparsity.visitor import PruningVisitor

Note = Mapping[str, int]
"""How many weights of each linear of a block are kept."""


class StreamedPruning:
    """One walk over a model that is streamed: a block takes what it becomes when all runs have passed it, and is written.

    Args:
        stream: Where its blocks come from and go.
        linears: Those to prune, by name.
        visitor: What prunes them.
        reduce: Sums over ranks.
        key: What tells this work from all other; without one, the model stays as it is.
    """

    def __init__(
        self, stream: FileStore, linears: Mapping[str, nn.Module], visitor: PruningVisitor, reduce: Reduce | None, key: str | None
    ) -> None:
        self.stream, self.linears, self.visitor, self.reduce = stream, linears, visitor, reduce
        self.key, self.applies = key, key is not None
        self.done: dict[str, Note] = {}
        self.names = {block: name for name, block in stream.blocks.items()}

    def go(self, sequential: Sequential | None, forwards: Sequence[Callable[[], object]]) -> None:
        """Goes over all blocks: of those that an earlier process has done, runs only pass what it made of them."""
        with nullcontext() if self.key is None else self.stream.step(self.key):
            self.done = {} if self.key is None else self.stream.done
            sites = self._sites("block" if sequential in ("none", None) else sequential)
            if sequential is None:
                self._each(sites)
            else:
                self._walk(sites, sequential == "none", forwards)
            self.stream.release()
        for site in sites:
            if self.applies and site.module not in self.stream.owner:
                self._take(site)

    def _walk(self, sites: Sequence[Site], dense: bool, forwards: Sequence[Callable[[], object]]) -> None:
        """Walks with runs, which pass blocks as they become, or as they were."""
        untouched = range(len(forwards)) if dense else self.visitor.dense
        around = self._there if untouched else self._adopted
        walk = Walk(sites, self.visitor, self.reduce, untouched, around, ends=1, leave=self._leave, compares=self.visitor)
        walk(forwards)
        if walk.again:  # where a run on the meta device does not tell
            modules = {site.module for site in walk.again}
            _refuse(next(name for name, module in self.stream.model.named_modules() if module in modules))

    def _sites(self, sequential: Sequential) -> list[Site]:
        """Finds where runs rest: also at blocks of which nothing is pruned, or left to do, as all leave one before the next."""
        found = find_sites(self.stream.model, self.linears, sequential, gates=True)
        found += [Site(block, {}) for block in set(self.names) - {site.module for site in found}]
        place = {module: number for number, module in enumerate(self.stream.model.modules())}
        left = [self._left(site) for site in found if site.module in self.names or not self._is_done(site)]
        left.sort(key=lambda site: place[site.module])
        return with_ways_out(self.stream.model, left) if self.visitor.dense else left

    def _each(self, sites: Sequence[Site]) -> None:
        """Prunes blocks whose visitor needs no data."""
        with torch.no_grad():
            for site in sites:
                if site.linears:
                    self.stream.load(site.module)
                    self.visitor.finish(site.linears)
                self._leave(site)

    def _is_done(self, site: Site) -> bool:
        block = self.stream.owner.get(site.module)
        return block is not None and self.names[block] in self.done

    def _left(self, site: Site) -> Site:
        """Returns a site of which there is nothing left to do if its block is done; runs of the dense model pass it as it was."""
        if not self._is_done(site):
            return site
        return Site(site.module, {}, becomes=partial(self._made, site.module) if self.visitor.dense else None)

    def _made(self, block: nn.Module) -> dict[nn.Module, dict[str, Tensor]]:
        """Reads the weights that an earlier process has made of a block's linears; the block is as it was, before and after."""
        back, inside = self.stream.way_back(), set(block.modules())
        self.stream.adopt(self.names[block])
        self.stream.load(block)
        own = [linear for linear in self.linears.values() if linear in inside]
        new = {linear: {"weight": linear.get_parameter("weight").detach().clone()} for linear in own}
        back()
        self.stream.load(block)
        return new

    @contextmanager
    def _there(self, module: nn.Module) -> Iterator[None]:
        """Has the block of a module in memory."""
        self.stream.load(module)
        yield

    @contextmanager
    def _adopted(self, module: nn.Module) -> Iterator[None]:
        """Has the block of a module in memory, as an earlier process has left it if it has."""
        if (name := self.names.get(module)) in self.done and name is not None:
            self.stream.adopt(name)
        with self._there(module):
            yield

    def _leave(self, site: Site) -> None:
        """Has a block take what its linears become; linears outside of blocks wait until nothing can fail any more."""
        block = self.stream.owner.get(site.module)
        if not self.applies or block is None:
            return
        pruned, name = self.visitor.pruned, self.names[block]
        if self.visitor.dense and not site.out and name not in self.done:
            return
        if name in self.done:
            self.stream.adopt(name)
            pruned |= {linear: Applied(kept) for linear, kept in self.done[name].items()}
            self.visitor.tell()
            return
        self._take(site)
        inside = set(block.modules())
        own = (linear for linear, one in self.linears.items() if one in inside and linear in pruned)
        self.stream.change(block, {linear: pruned[linear].kept for linear in own})

    @torch.no_grad()
    def _take(self, site: Site) -> None:
        """Puts what the linears of a site become in their place."""
        for linear, new in self.visitor.parameters(site).items():
            for key, value in new.items():
                site.linears[linear].get_parameter(key).copy_(value)
        pruned = self.visitor.pruned
        pruned |= {linear: Applied(pruned[linear].kept) for linear in site.linears if linear in pruned}


def check_called_once(stream: FileStore, runs: Sequence[Run]) -> None:
    """Refuses a model that calls a block again later, as far as a run on the meta device can tell; no block is read for it."""
    batch = next((run.batch for run in runs if run.batch is not None), None)
    if batch is None:
        return
    shadow, calls = to_meta(stream.model), Counter[str]()
    for name in stream.blocks:
        shadow.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    batch = tree_map_only(Tensor, lambda one: one.to("meta"), batch)
    with suppress(Exception), torch.no_grad():  # code that asks for values has none there
        runs_of(shadow, [batch])[0].visit()
    if again := next((name for name in stream.blocks if calls[name] > 1), None):
        _refuse(again)


def _refuse(again: str) -> NoReturn:
    raise ValueError(f"model: {again} is called again later, and is streamed: prune the model in memory")
