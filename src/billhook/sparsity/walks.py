"""Walks over a model whose weights are pruned: in memory, sharded over ranks, or streamed from files."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from billhook.adapters.masked import counted
from billhook.calibration.calibration import Batches, batches_of
from billhook.engine.batches import Run, runs_of, tell_apart
from billhook.engine.comm import ALONE, Comm
from billhook.engine.lazy import by_parameter
from billhook.engine.passes import ActivationFiles, outputs_in_files
from billhook.engine.state import undisturbed
from billhook.engine.store import BlockStore, store_of
from billhook.engine.walk import Sequential, Site, Walk, find_sites, with_ways_out
from billhook.model.linears import find_twins, size_of, weight_of
from billhook.sparsity.allocation import Allocation
from billhook.sparsity.criteria import Wanda
from billhook.sparsity.matching import BlockMatching, refuse_called_again
from billhook.sparsity.visitor import InputsDiffer, PruningVisitor, scores_of

V = TypeVar("V", bound=PruningVisitor)


def runs_for(model: nn.Module, batches: Batches | None, needing: Sequence[object], comm: Comm) -> list[Run]:
    """Makes a run of each batch, if something needs data; refuses to go without any, on all ranks together."""
    if not needing:
        return []
    if batches is None and comm is not ALONE:
        raise ValueError(f"batches=None: {type(needing[0]).__name__} needs calibration data")
    runs = runs_of(model, batches_of(batches, model))
    matches = any(isinstance(one, BlockMatching) for one in needing)
    found = torch.tensor([len(runs), int(matches and len(runs) < 2)], device=next(model.parameters()).device)
    count, lacking = comm(found).tolist()
    if not count:
        raise ValueError(f"batches=an empty collection: {type(needing[0]).__name__} needs calibration data")
    if lacking:
        each = "" if comm is ALONE else " on each rank"
        raise ValueError(f"batches: match holds some out, and needs two at least{each}, got {len(runs)} here: give smaller ones")
    return runs


@dataclass(frozen=True, eq=False)
class Walks:
    """Walks over one model, all with the same runs."""

    model: nn.Module
    linears: Mapping[str, nn.Module]
    runs: Sequence[Run]
    comm: Comm
    offload: torch.device | None
    activations: str | None
    adapters: Mapping[str, nn.Module]

    @cached_property
    def twins(self) -> list[tuple[str, nn.Module]]:
        """Other linears that have the weight of one."""
        return find_twins(self.model, self.linears)

    @cached_property
    def store(self) -> BlockStore:
        """Where the model's blocks live."""
        return store_of(self.model)

    def __call__(self, sequential: Sequential | None, make: Callable[..., V], key: str | None = None) -> V:
        """Walks with a visitor and returns it; once more without shared statistics if inputs are shared in some runs only.

        It also walks once more if a run has called linears again later: with these first, so that every call counts. With
        `sequential=None` nothing runs: the visitor needs no data. A key tells this work from all other: what an earlier process
        has staged of blocks in files is not made again.
        """
        shared, often = True, {name for name, _ in self.twins}
        if often and not self.store.holds_all:
            raise ValueError(f"model: {min(often)} shares its weight with another linear: prune it in memory, not block by block")
        while True:
            visitor = make(
                store=self.store, linears=self.linears, tokens=[run.tokens for run in self.runs], comm=self.comm,
                adapters=self.adapters, shared=shared,
            )  # fmt: skip
            try:
                with (
                    self._ready(sequential),
                    self.store.step(f"{key} {shared}", partial(tell_apart, self.runs)) if key else nullcontext(),
                ):
                    again = self._go(sequential, visitor, often, resumes=key is not None)
                    if again <= often:
                        if (prune := visitor.close()) is not None:
                            self._each(prune)
                        visitor.stage()
                        self.store.release()
                        return visitor
            except InputsDiffer:
                if not shared:
                    raise
                shared = False
            else:
                often |= again

    @contextmanager
    def _ready(self, sequential: Sequential | None) -> Iterator[None]:
        """Has the model ready for runs, and what they need in its place."""
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.model))
            if self.offload is not None:
                stack.enter_context(self.store.on(self.offload, [site.module for site in self.blocks()]))
            if self.activations is not None:
                files = stack.enter_context(closing(ActivationFiles(self.activations)))
                whole = [] if sequential == "layer" else [site.module for site in self.blocks()]
                stack.enter_context(outputs_in_files(files, self.model, whole))
            yield

    def _go(self, sequential: Sequential | None, visitor: PruningVisitor, often: set[str], resumes: bool) -> set[str]:
        """Returns the linears of which a walk left out some calls. Those called often come first, in the dense model."""
        done = set(visitor.resume() if resumes else ())
        if sequential is None:
            self._each(visitor.finish, done)
            return set()
        if visitor.dense and self.twins:
            refuse_called_again(name for name, _ in self.twins)
        forwards = [run.forward for run in self.runs] * (2 if visitor.dense else 1)
        at_once = sequential == "none" and not self.store.blocks
        first = {name: one for name, one in self.linears.items() if name in often or at_once}
        new: dict[str, Tensor] = {}
        if first:
            site = Site(self.model, first, False if often else None, self.twins)
            Walk([site], visitor, self.comm)(forwards)
            new = by_parameter(visitor.parameters(site))
        others = {name: one for name, one in self.linears.items() if name not in first}
        sites = self._sites(others, sequential, done)
        if all(site.done or not site.linears for site in sites):
            return set()
        visitor.untouched = range(len(forwards)) if sequential == "none" else visitor.dense
        visitor.ends = 1
        with self.store.computing_with(new):
            walk = Walk(with_ways_out(self.model, sites) if visitor.dense else sites, visitor, self.comm, visitor.enter)
            walk(forwards)
        return {name for site in walk.again for name in site.linears}

    def _sites(self, linears: Mapping[str, nn.Module], sequential: Sequential, done: Collection[nn.Module]) -> list[Site]:
        """Finds where runs rest; where blocks come and go, or are done, also at all of them, as all leave one before the next."""
        if not linears:
            return []
        blocks, store = "block" if sequential == "none" else sequential, self.store
        sites = find_sites(self.model, linears, blocks, gates=bool(store.blocks))
        if store.blocks:
            place = {module: number for number, module in enumerate(self.model.modules())}
            rests = {site.module: site for site in sites if store.owner.get(site.module) not in done}
            for block in (block for block in store.blocks.values() if block in place and block not in rests):
                inside = set(block.modules()) if block in done else ()
                rests[block] = Site(block, {name: one for name, one in linears.items() if one in inside}, done=block in done)
            sites = sorted(rests.values(), key=lambda site: place[site.module])
        return sites

    def _each(self, prune: Callable[[Mapping[str, nn.Module]], None], done: Collection[nn.Module] = ()) -> None:
        """Prunes linears without runs, those of one block after the other."""
        for site in self.blocks():
            if self.store.owner.get(site.module) not in done:
                prune(site.linears)

    def blocks(self) -> list[Site]:
        """Returns the blocks, and the linears outside of them."""
        return find_sites(self.model, self.linears, "block")


def sparsities_of(walks: Walks, amount: float, allocation: Allocation) -> dict[str, float]:
    """Finds the sparsity of each linear; blocks that no batch reaches take no part in measuring."""
    blocks: Sequence[Mapping[str, nn.Module]] = [site.linears for site in walks.blocks()]
    measured: dict[int, float] = {}
    if allocation.measures:
        found = walks("none", partial(_Measured, blocks, allocation)).measured
        measured = walks.comm.decide(lambda: found)
        blocks = [blocks[number] for number in measured]
    sizes = [{name: math.prod(size_of(linear)) for name, linear in block.items()} for block in blocks]
    return dict.fromkeys(walks.linears, amount) | (allocation.allocate(sizes, amount, list(measured.values())) if sizes else {})


class _Measured(PruningVisitor):
    """A visitor that prunes nothing, and measures each block."""

    def __init__(self, blocks: Sequence[Mapping[str, nn.Module]], allocation: Allocation, **walk: Any) -> None:  # noqa: ANN401 - those of a visitor
        super().__init__(Wanda(), {}, "unstructured", **walk)
        self.blocks, self.allocation = blocks, allocation
        self.measured: dict[int, float] = {}

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Measures the blocks by Wanda's scores."""
        for number, block in enumerate(self.blocks):
            called = {name: linear for name, linear in block.items() if name in linears}
            scores = [self._scores(name, linear) for name, linear in called.items()]
            if scores:
                self.measured[number] = self.allocation.measure(scores)

    def _scores(self, name: str, linear: nn.Module) -> Tensor:
        self.store.load(linear)
        weight = counted(weight_of(linear), self.adapters.get(name))
        return scores_of(self.criterion, weight, self.statistics[self._first[name]])
