"""Refits the linears of a model whose blocks come and go, one block after the other; the new weights are staged beside it."""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

from billhook.engine.comm import ALONE, Comm
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.passes import activation_files, outputs_in_files
from billhook.engine.store import BlockStore
from billhook.engine.walk import Site, Walk, find_sites
from billhook.repairs.visitor import RepairVisitor


class BlockwiseRepair:
    """One walk over a model whose blocks come and go, in which each block's linears are refitted while it is there.

    Args:
        model: The model; its blocks are called one after the other, and stay as they are.
        store: Where they come from, and where new weights are staged.
        visitor: What refits linears.
        linears: All linears that are looked at, by name.
        kept: The names of those that are refitted.
        comm: The ranks; all load the same blocks in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        store: BlockStore,
        visitor: RepairVisitor,
        linears: Mapping[str, nn.Module],
        kept: Collection[str],
        comm: Comm = ALONE,
    ) -> None:
        self.model, self.store, self.visitor = model, store, visitor
        self.linears, self.kept, self.comm = linears, kept, comm
        self.block: nn.Module | None = None
        self.new = LazyTensors({})

    def go(
        self, key: str, more: Callable[[], str], forwards: Sequence[Callable[[], object]], untouched: Collection[int]
    ) -> LazyTensors:
        """Goes over blocks up to the last that has such linears; of those that an earlier process has done, takes what is there.

        Args:
            key: What tells this work from all other.
            more: Returns the rest of it; see `BlockStore.step`.
            forwards: The runs.
            untouched: The numbers of those that keep the old parameters.
        """
        with self.store.step(key, more), activation_files(self.store) as self.visitor.files:
            sites = self._sites()
            last = max(number for number, site in enumerate(sites) if site.linears)
            self.visitor.take(self._inside(None))
            with outputs_in_files(self.visitor.files, self.model):
                self.visitor.untouched = untouched
                Walk(sites[: last + 1], self.visitor, self.comm, self._enter)(forwards)
            self._pass()
            self._stage(None)
            self.store.release()
            return self.new

    def _sites(self) -> list[Site]:
        """Finds where runs rest: at each linear, and at each block, in the order of the model's modules."""
        place = {module: number for number, module in enumerate(self.model.modules())}
        sites = find_sites(self.model, self.linears, "layer", gates=True)
        blocks = set(self.store.blocks.values()) & place.keys()
        sites += [Site(block, {}) for block in blocks - {site.module for site in sites}]
        return sorted(sites, key=lambda site: place[site.module])

    def _enter(self, module: nn.Module) -> None:
        """Has the block of a module in memory; another one, which all runs have passed, goes first."""
        block = self.store.owner.get(module)
        if block is not None and block is not self.block:
            self._pass()
            self.block = self.store.load(module)
            self.visitor.take(self._inside(block))
            if (known := self.store.known(block)) is not None:
                values, refitted = known
                for linear in refitted:
                    self.visitor.know(linear, values.of_module(linear) if refitted[linear] else None)
        elif block is not None:
            self.store.load(block)

    def _pass(self) -> None:
        """Stages what has become of a block's linears, and lets go of it."""
        if self.block is not None:
            self._stage(self.block)
            self.block = None

    @torch.no_grad()
    def _stage(self, block: nn.Module | None) -> None:
        inside = self._inside(block)
        new = {name: self.visitor.own(name) for name in inside if name in self.kept}
        self.new |= self.store.stage(block, by_parameter(new), {name: not self.visitor.left[name] for name in new})
        self.visitor.drop(inside)

    def _inside(self, block: nn.Module | None) -> list[str]:
        return [name for name, linear in self.linears.items() if self.store.owner.get(linear) is block]
