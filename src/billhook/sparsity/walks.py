"""Walks over a model whose weights are pruned: in memory, sharded over ranks, or streamed from files."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from billhook.calibration.calibration import Batches, batches_of
from billhook.engine.batches import Run, runs_of, tell_apart
from billhook.engine.files import FileStore
from billhook.engine.lazy import by_parameter
from billhook.engine.passes import ActivationFiles, outputs_in_files
from billhook.engine.sharding import gathered, is_sharded, unsharded
from billhook.engine.state import undisturbed
from billhook.engine.store import store_of
from billhook.engine.walk import Reduce, Sequential, Site, Walk, find_sites, with_ways_out
from billhook.model.linears import find_twins
from billhook.sparsity.matched import refuse_again
from billhook.sparsity.matching import BlockMatching
from billhook.sparsity.streamed import StreamedPruning
from billhook.sparsity.streamed_global import StreamedGlobalPruning
from billhook.sparsity.visitor import GlobalPruningVisitor, InputsDiffer, PruningVisitor

V = TypeVar("V", bound=PruningVisitor)


def runs_for(model: nn.Module, batches: Batches | None, needing: Sequence[object], reduce: Reduce | None) -> list[Run]:
    """Makes a run of each batch, if something needs data; refuses to go without any, on all ranks together."""
    if not needing:
        return []
    if batches is None and (is_sharded(model) or reduce is not None):
        raise ValueError(f"batches=None: {type(needing[0]).__name__} needs calibration data")
    runs = runs_of(model, batches_of(batches, model))
    matches = any(isinstance(one, BlockMatching) for one in needing)
    found = torch.tensor([len(runs), int(matches and len(runs) < 2)], device=next(model.parameters()).device)
    count, lacking = (found if reduce is None else reduce(found)).tolist()
    if not count:
        raise ValueError(f"batches=an empty collection: {type(needing[0]).__name__} needs calibration data")
    if lacking:
        each = "" if reduce is None else " on each rank"
        raise ValueError(f"batches: match holds some out, and needs two at least{each}, got {len(runs)} here: give smaller ones")
    return runs


@dataclass(frozen=True, eq=False)
class Walks:
    """Walks over one model, all with the same runs."""

    model: nn.Module
    linears: Mapping[str, nn.Module]
    runs: Sequence[Run]
    reduce: Reduce | None
    offload: torch.device | None
    activations: str | None
    adapters: Mapping[str, nn.Module]

    @cached_property
    def twins(self) -> list[tuple[str, nn.Module]]:
        """Other linears that have the weight of one."""
        return find_twins(self.model, self.linears)

    def __call__(self, sequential: Sequential | None, make: Callable[..., V], key: str | None = None) -> V:
        """Walks with a visitor and returns it; once more without shared statistics if inputs are shared in some runs only.

        It also walks once more if a run has called linears again later: with these first, so that every call counts. With
        `sequential=None` nothing runs: the visitor needs no data. A model that is streamed takes what the visitor makes at once,
        if there is a key, which tells this work from all other: what an earlier process has done of it is not done again.
        """
        tokens, shared, often = [run.tokens for run in self.runs], True, {name for name, _ in self.twins}
        while True:
            visitor = make(tokens=tokens, reduce=self.reduce, adapters=self.adapters, shared=shared)
            try:
                again = self._go(sequential, visitor, often, key and f"{key} {shared}")
            except InputsDiffer:
                if not shared:
                    raise
                shared = False
                continue
            if again <= often:
                break
            often |= again
        visitor.close()
        return visitor

    def _go(self, sequential: Sequential | None, visitor: PruningVisitor, often: set[str], key: str | None) -> set[str]:
        """Returns the linears of which a walk left out some calls. Those called often come first, in the dense model."""
        forwards = [run.forward for run in self.runs] * (2 if visitor.dense else 1)
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.model))
            if self.offload is not None:
                stack.enter_context(store_of(self.model).on(self.offload, [site.module for site in self.blocks()]))
            if self.activations is not None:
                files = stack.enter_context(closing(ActivationFiles(self.activations)))
                whole = [] if sequential == "layer" else [site.module for site in self.blocks()]
                stack.enter_context(outputs_in_files(files, self.model, whole))
            if isinstance(stream := store_of(self.model), FileStore):
                if self.twins:
                    raise ValueError(
                        f"model: {self.twins[0][0]} shares its weight with another linear: prune it in memory, not streamed"
                    )
                self._stream(stream, sequential, visitor, forwards, key and f"{key} {tell_apart(self.runs)}")
                return set()
            if sequential is None:
                visitor.finish(self.linears)
                return set()
            if visitor.dense and self.twins:
                refuse_again(name for name, _ in self.twins)
            if is_sharded(self.model):
                self._walk_sharded(sequential, visitor, forwards)
                return set()
            return self._walk(sequential, visitor, often, forwards)

    def _walk(
        self,
        sequential: Sequential,
        visitor: PruningVisitor,
        often: set[str],
        forwards: Sequence[Callable[[], object]],
    ) -> set[str]:
        first = {name: one for name, one in self.linears.items() if name in often or sequential == "none"}
        others = {name: one for name, one in self.linears.items() if name not in first}
        new: dict[str, Tensor] = {}
        if first:
            site = Site(self.model, first, False if often else None, self.twins)
            Walk([site], visitor, self.reduce)(forwards)
            new = by_parameter(visitor.parameters(site))
        if not others:
            return set()
        with store_of(self.model).computing_with(new):
            sites = find_sites(self.model, others, sequential, gates=self.offload is not None)
            sites = with_ways_out(self.model, sites) if visitor.dense else sites
            walk = Walk(sites, visitor, self.reduce, visitor.dense, ends=1, compares=visitor)
            walk(forwards)
            return {name for site in walk.again for name in site.linears}

    def _stream(
        self,
        stream: FileStore,
        sequential: Sequential | None,
        visitor: PruningVisitor,
        forwards: Sequence[Callable[[], object]],
        key: str | None,
    ) -> None:
        """Has each block come once; where all linears compete, first for what they see, if they need it, and then three times."""
        all_compete = isinstance(visitor, GlobalPruningVisitor)
        if all_compete and sequential is None:
            visitor.finish(self.linears)
        else:
            walk = StreamedPruning(stream, self.linears, visitor, self.reduce, None if all_compete else key)
            walk.go(sequential, forwards)
        if isinstance(visitor, GlobalPruningVisitor):
            StreamedGlobalPruning(stream, visitor, self.linears, key).go()
            visitor.seen.clear()

    def _walk_sharded(
        self,
        sequential: Sequential,
        visitor: PruningVisitor,
        forwards: Sequence[Callable[[], object]],
    ) -> None:
        """Gathers one block at a time, on all ranks together; with `"none"` the runs pass through the dense blocks, too."""
        blocks, dense = [site.module for site in self.blocks()], visitor.dense
        owner = {module: block for block in blocks for module in block.modules()}
        sites = find_sites(self.model, self.linears, "block" if sequential == "none" else sequential, gates=True)
        sites = with_ways_out(self.model, sites) if dense else sites
        untouched = range(len(forwards)) if sequential == "none" else dense
        walk = Walk(
            sites, visitor, self.reduce, untouched, lambda module: gathered(owner[module]),
            leave=visitor.leave, compares=visitor,
        )  # fmt: skip
        with unsharded(self.model), gathered(self.model, but=blocks):
            walk(forwards)

    def blocks(self) -> list[Site]:
        """Returns the blocks, and the linears outside of them."""
        return find_sites(self.model, self.linears, "block")
