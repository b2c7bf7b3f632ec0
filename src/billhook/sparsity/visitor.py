"""Walks over a model whose linears are pruned: sums of what each linear reads, and what becomes of it beside the model."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import repeat
from typing import Any, NoReturn, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from billhook.adapters.masked import effective_weight, lora_product
from billhook.engine.batches import Run, runs_fingerprint
from billhook.engine.comm import Comm
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.passes import ActivationFiles, spilled_outputs
from billhook.engine.state import evaluating_without_grad
from billhook.engine.statistics import Statistics
from billhook.engine.store import BlockStore, store_of
from billhook.engine.walk import Sequential, Site, Visitor, Walk, find_sites, with_exits
from billhook.model.layers import (
    adjacent_inputs,
    batched,
    find_tied,
    is_convolution,
    output_positions,
    patches,
    size_of,
    to_layout,
    weight_of,
)
from billhook.sparsity.criteria import Criterion, check_finite
from billhook.sparsity.grouped import GroupedStatistics, empty_statistics, prefix_errors, prune_weight, score_weight
from billhook.sparsity.masks import RemovalThreshold, pruned_count, where_kept
from billhook.sparsity.weight_plan import PrunedLayer

VALUES = 2**24
"""How many values of patches are in memory at a time, unless one image has more."""


V = TypeVar("V", bound="PruningVisitor")


class InputsDiffer(Exception):
    """Two linears that read one and the same tensor in one run do not in another, of this rank or of another."""


@dataclass(frozen=True, eq=False)
class Walks:
    """Walks over one model, all with the same runs.

    Attributes:
        model: The model.
        linears: Those to prune, by name.
        runs: One for each batch; none where nothing needs data.
        comm: The ranks.
        offload: The device on which blocks compute, if it is another one.
        activations: A folder for the outputs of modules; None for memory.
        adapters: The layers of LoRA that count, by linear: as if they were merged.
    """

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
        return find_tied(self.model, self.linears)

    @cached_property
    def store(self) -> BlockStore:
        """Where the model's blocks live."""
        return store_of(self.model)

    @property
    def blocks(self) -> list[Site]:
        """The blocks, and the linears outside of them."""
        return find_sites(self.model, self.linears, "block")

    def __call__(self, sequential: Sequential | None, make: Callable[["Walks", bool], V], key: str | None = None) -> V:
        """Walks with a visitor and returns it; once more without shared statistics if inputs are shared in some runs only.

        It also walks once more if a run has called linears again later: with these first, so that every call counts.

        Args:
            sequential: Where runs rest; None: nothing runs, as the visitor needs no data.
            make: Makes the visitor, given these walks and whether linears that read one tensor share their statistics.
            key: What tells this work from all other: what an earlier process has staged of blocks in files is not made again.
        """
        shared, called_again = True, {name for name, _ in self.twins}
        if called_again and not self.store.holds_all:
            name = min(called_again)
            raise ValueError(f"model: {name} shares its weight with another linear: prune it in memory, not block by block")
        while True:
            visitor = make(self, shared)
            step = self.store.step(f"{key} {shared}", partial(runs_fingerprint, self.runs)) if key else nullcontext()
            try:
                with self._ready(sequential), step:
                    again = self._go(sequential, visitor, called_again, resumes=key is not None)
                    if again <= called_again:
                        visitor.close()
                        visitor.stage()
                        self.store.release()
                        return visitor
                    called_again |= again
            except InputsDiffer:
                if not shared:
                    raise
                shared = False

    @contextmanager
    def _ready(self, sequential: Sequential | None) -> Iterator[None]:
        """Has the model ready for runs, on the device and with the files that are asked for."""
        with ExitStack() as stack:
            stack.enter_context(evaluating_without_grad(self.model))
            blocks = [site.module for site in self.blocks] if self.offload or self.activations else []
            if self.offload is not None:
                stack.enter_context(self.store.on(self.offload, blocks))
            if self.activations is not None:
                files = stack.enter_context(closing(ActivationFiles(self.activations)))
                # runs that rest at each linear hold outputs of modules within blocks, too
                stack.enter_context(spilled_outputs(files, self.model, [] if sequential == "layer" else blocks))
            yield

    def _go(self, sequential: Sequential | None, visitor: "PruningVisitor", called_again: set[str], resumes: bool) -> set[str]:
        """Walks once and returns the linears of which it left out some calls; `called_again` come first, in the dense model."""
        done = set(visitor.resume() if resumes else ())
        if sequential is None:
            for site in self.blocks:
                if self.store.owner.get(site.module) not in done:
                    visitor.finish(site.linears)
            return set()
        visitor.check_runs()
        forwards = [run.forward for run in self.runs] * (2 if visitor.dense else 1)
        at_once = sequential == "none" and not self.store.blocks
        first = {name: linear for name, linear in self.linears.items() if at_once or name in called_again}
        new: dict[str, Tensor] = {}
        if first:
            site = Site(self.model, first, False if called_again else None, self.twins)
            Walk([site], visitor, self.comm)(forwards)
            new = by_parameter(visitor.parameters(site))
        rest = {name: linear for name, linear in self.linears.items() if name not in first}
        # where blocks come and go, all runs leave one before the next
        sites = find_sites(self.model, rest, "block" if sequential == "none" else sequential, self.store.blocks.values())
        for site in sites:
            site.done = self.store.owner.get(site.module) in done
        if all(site.done or not site.linears for site in sites):
            return set()
        visitor.untouched = range(len(forwards)) if sequential == "none" else visitor.dense
        visitor.ends = 1  # one run goes on to its end, to see which linears are called again
        with self.store.computing_with(new) if new else nullcontext():
            walk = Walk(with_exits(self.model, sites) if visitor.dense else sites, visitor, self.comm, visitor.enter)
            walk(forwards)
        return {name for site in walk.again for name in site.linears}


Progress = Callable[[int, int], None]
"""Called with how many linears are done, and of how many."""


class PruningVisitor(Visitor):
    """Gathers a criterion's statistics, and prunes each linear of a site when all runs have been there; the model stays as it is.

    Args:
        criterion: How weights are pruned.
        sparsities: Of each linear.
        pattern: `"unstructured"` or `"N:M"`.
        progress: Called with how many linears are done, and of how many.
        walks: The model, its linears and all that is needed beside it.
        shared: Whether linears that read one and the same tensor share their statistics; if they do so in some runs only, that
            raises `InputsDiffer`.

    Attributes:
        pruned: What has become of each linear.
        tokens: Of each linear that is no convolution, how many tokens it has read, and how many inputs it has.
        statistics: Of the inputs of linears that are not complete, by the first linear that reads them.
    """

    def __init__(
        self,
        criterion: Criterion,
        sparsities: Mapping[str, float],
        pattern: str,
        progress: Progress | None,
        walks: Walks,
        shared: bool,
    ) -> None:
        self.criterion, self.sparsities, self.pattern, self.progress = criterion, sparsities, pattern, progress
        self.walks, self.store, self.comm, self.shared = walks, walks.store, walks.comm, shared
        self.pruned: dict[str, PrunedLayer] = {}
        self.tokens: dict[str, tuple[int, int]] = {}
        self.statistics: dict[str, Statistics | GroupedStatistics] = {}
        self._names = {module: name for name, module in self.store.model.named_modules()}
        self._block: nn.Module | None = None  # in which runs are
        self._staged = set[str]()
        self._source: dict[str, str] = {}  # linear -> the one whose statistics are its own
        self._last: dict[int, tuple[ReferenceType[Tensor], float, str]] = {}  # run -> inputs, their version, who read them first
        self._calls = Counter[str]()
        self._complete: set[str] = set()
        self._differ = False

    def check_runs(self) -> None:
        """Refuses a model that this visitor cannot walk over."""

    def resume(self) -> list[nn.Module]:
        """Takes what an earlier process has made of blocks in the same step, and returns these."""
        blocks = list[nn.Module]()
        for block in self.store.blocks.values():
            if (known := self.store.known(block)) is not None:
                tensors, kept = known
                self._take(kept, tensors)
                blocks.append(block)
        return blocks

    def _take(self, kept: Mapping[str, int], tensors: LazyTensors) -> None:
        """Takes linears that a store has staged, with the number of weights that each keeps."""
        self.pruned |= {name: PrunedLayer.staged(kept[name], self._weight(name), tensors) for name in kept}
        self._staged |= kept.keys()

    def enter(self, module: nn.Module) -> None:
        """Has the block of a module in memory; what has become of the one that all runs have left is staged first."""
        block = self.store.owner.get(module)
        if block is not self._block:
            self.stage()
        self._block = block
        self.store.load(module)

    @torch.no_grad()
    def stage(self) -> None:
        """Stages what the linears of the block that runs are in have become, or of those that are in none."""
        linears, new = self.walks.linears, dict[str, PrunedLayer]()
        for name, pruned in self.pruned.items():
            # a linear that is not in the store's model is beside it, and waits in memory
            if self.store.owner.get(linears[name]) is self._block and linears[name] in self._names:
                new[name] = pruned
        if not self.store.blocks or self._staged.issuperset(new):  # in memory it is where it stays
            return
        values = {key: value for name, pruned in new.items() for key, value in pruned.to_stage(self._weight(name)).items()}
        kept = {name: pruned.kept for name, pruned in new.items()}
        self._take(kept, self.store.stage(self._block, values, kept, torch.device("cpu")))

    def _weight(self, name: str) -> str:
        """Names the weight of a linear as the store does."""
        return f"{self._names[self.walks.linears[name]]}.weight"

    def on_reentry(self, site: Site) -> None:
        """Refuses blocks that come one at a time and are called again when what they become has been decided."""
        if not self.store.holds_all:
            raise_called_again(self._names[site.module])

    def observe(self, name: str, linear: nn.Module, inputs: Tensor, run: int) -> None:
        """Adds the inputs of a linear in one run; of a convolution, whatever reads the same tensor may read other patches."""
        last, reader = self._last.get(run), name
        if self.shared and not is_convolution(linear) and last and last[0]() is inputs and last[1] == _version(inputs):
            reader = last[2]
        source = self._source.setdefault(name, reader)
        self._calls[name] += 1
        self._differ |= source not in (name, reader)
        if source != name:
            return
        if name not in self.statistics:
            self.statistics[name] = empty_statistics(self.criterion, linear, inputs.device)
        if not is_convolution(linear):
            self.statistics[name].add(inputs, self._counting(inputs.shape[:-1], inputs, run))
            self._last[run] = ref(inputs), _version(inputs), name
            return
        images = batched(linear, inputs)
        outputs = output_positions(linear, images)
        keep = self._counting(outputs, images, run)
        step = max(1, VALUES // max(1, outputs[1:].numel() * linear.groups * size_of(linear)[1]))
        keeps = repeat(None) if keep is None else torch.split(keep, step)
        for some, counting in zip(torch.split(images, step), keeps, strict=False):
            self.statistics[name].add(patches(linear, some), counting)

    def _counting(self, shape: torch.Size, inputs: Tensor, run: int) -> Tensor | None:
        """Finds the mask of tokens that are not padding, if one fits the shape of those that inputs hold."""
        for keep in self.walks.runs[run].tokens.values():
            if keep.shape == shape or (len(shape) == 1 and keep.numel() == shape[0]):
                return keep.reshape(shape).to(inputs.device)
        return None

    def complete(self, site: Site) -> None:
        """Prunes the linears of a site that were given tokens."""
        self._sum(site)
        called = {name: linear for name, linear in site.linears.items() if name in self._source}
        reached = dict[str, nn.Module]()
        for name, linear in called.items():
            if tokens := int(self.statistics[self._source[name]].tokens):
                reached[name] = linear
                if not is_convolution(linear):
                    self.tokens[name] = tokens, adjacent_inputs(linear)
        self.finish(reached)
        self._complete |= site.linears.keys()
        # a linear that rests alone may read what the next one reads: its statistics stay until another tensor is read
        if site.module not in called.values() or self.comm.size > 1:
            self._last = {run: last for run, last in self._last.items() if last[2] not in self._complete}
        needed = {reader for _, _, reader in self._last.values()}
        self.statistics = {name: sums for name, sums in self.statistics.items() if name in needed or name not in self._complete}

    def _sum(self, site: Site) -> None:
        """Sums the statistics of a site over ranks together, once all have agreed on which there are."""
        sources = {name: self._source[name] for name in site.linears if name in self._source}
        for name, source in sources.items():
            self._differ |= self._calls[name] != self._calls[source]  # one of them came again
        ranks, agreed = self.comm.gather((sources, self._differ)), dict[str, str]()
        for of_rank, _ in ranks:
            agreed |= of_rank
        # equality is asked of what was gathered, so that all ranks raise or none does
        if any(differ or not agreed.items() >= of_rank.items() for of_rank, differ in ranks):
            raise InputsDiffer
        self._source |= agreed
        sums, read = list[Tensor](), set(agreed.values())
        for name, linear in site.linears.items():
            if name in read:
                if name not in self.statistics:  # zeros, on a rank that has not called it
                    self.statistics[name] = empty_statistics(self.criterion, linear, linear.get_parameter("weight").device)
                sums += self.statistics[name].tensors()
        self.comm.sum_(*sums)

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Prunes linears whose statistics are complete, or are not needed."""
        divided = self.criterion.updates and self.comm.size > 1  # to solve for weights takes longer than to send them
        solved = self._solve_own(linears) if divided else {}
        for name, linear in linears.items():
            self.enter(linear)
            weight, scored = weight_of(linear), self.scored(name)
            if divided:  # zeros of all ranks but one, summed: the bits of what that one has solved
                mine = solved.pop(name, None)
                new = torch.zeros_like(scored) if mine is None else mine.weight(scored)
                keep = torch.zeros_like(scored, dtype=torch.bool) if mine is None else mine.keep(scored)
                new, keep = self.comm(new.float()).to(new.dtype), self.comm(keep.byte()).bool()
            else:
                new, keep = self._prune(name, scored)
            if name in self.walks.adapters:
                if not torch.equal(new, where_kept(scored, keep)):
                    kind = type(self.criterion).__name__
                    raise ValueError(f"{name}: count_adapters=True, and {kind} changes kept weights (`updates` is False)")
                new = where_kept(weight, keep)
            self.pruned[name] = PrunedLayer.of(weight, new, keep)
            self.report()

    def _solve_own(self, linears: Mapping[str, nn.Module]) -> dict[str, PrunedLayer]:
        """Prunes this rank's linears, reckoned to cost rows x width^2 + width^3, before any are sent."""
        costs = [width**2 * (rows + width) for rows, width in map(size_of, linears.values())]
        solved = dict[str, PrunedLayer]()
        for (name, linear), is_own in zip(linears.items(), self.comm.owned_pieces(costs), strict=True):
            self.store.load(linear)
            if is_own:
                scored = self.scored(name)
                solved[name] = PrunedLayer.of(scored, *self._prune(name, scored))
        return solved

    def scored(self, name: str) -> Tensor:
        """Returns the weight that a criterion sees: with its adapter, if that counts."""
        weight, adapter = weight_of(self.walks.linears[name]), self.walks.adapters.get(name)
        return weight if adapter is None else effective_weight(weight, adapter)

    def scores(self, name: str, statistics: Statistics | GroupedStatistics | None) -> Tensor:
        """Scores the weight of a linear, whose block is in memory."""
        with prefix_errors(name):
            weight = self.scored(name)
            check_finite(weight, "the weight")
            return score_weight(self.criterion, weight, statistics)

    def _prune(self, name: str, scored: Tensor) -> tuple[Tensor, Tensor]:
        with prefix_errors(name):
            return prune_weight(self.criterion, scored, self.statistics_of(name), self.sparsities[name], self.pattern)

    def statistics_of(self, name: str) -> Statistics | GroupedStatistics | None:
        """Returns the statistics of a linear's inputs; None if it was not called."""
        return self.statistics[self._source[name]] if name in self._source else None

    def report(self) -> None:
        """Reports how many linears are done."""
        if self.progress is not None:
            self.progress(len(self.pruned), len(self.sparsities))

    def close(self) -> None:
        """Ends the walk, when all runs have been everywhere."""

    def parameters(self, site: Site) -> dict[str, dict[str, Tensor]]:
        """Returns the new weights of a site's linears, as they lie in memory."""
        new: dict[str, dict[str, Tensor]] = {}
        for name, linear in site.linears.items():
            if name in self.pruned:
                weight = self.pruned[name].weight(weight_of(linear))
                if name in self.walks.adapters:  # what LoRA adds where weights are zero is left out, as by merging
                    added = where_kept(lora_product(self.walks.adapters[name]), ~self.pruned[name].keep(weight))
                    weight = weight - added.to(weight.dtype)
                new[name] = {"weight": to_layout(linear, weight)}
        return new


class GlobalPruningVisitor(PruningVisitor):
    """A visitor for which the weights of all linears compete with one another, when all statistics are complete.

    Their scores are computed three times, of one linear at a time: twice to find the lowest that is kept, and to prune.
    """

    def __init__(self, *args: Any) -> None:  # noqa: ANN401 - those of a visitor
        super().__init__(*args)
        self._seen: dict[str, Statistics | GroupedStatistics | None] = {}

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Keeps the statistics of linears."""
        self._seen |= {name: self.statistics_of(name) for name in linears}

    def resume(self) -> list[nn.Module]:
        """Takes nothing: how many scores of each linear are lowest has to be found again."""
        return []

    def close(self) -> None:
        """Finds the lowest score that is kept of all, and prunes by it."""
        seen = {name: linear for name, linear in self.walks.linears.items() if name in self._seen}
        sparsity = next(iter(self.sparsities.values()))
        count = pruned_count(sum(math.prod(size_of(linear)) for linear in seen.values()), sparsity)
        lowest = RemovalThreshold.of(lambda: map(self._scores, seen), count)
        for site in self.walks.blocks:
            for name in (name for name in site.linears if name in seen):
                keep = lowest.keep(self._scores(name))
                weight = weight_of(seen[name])
                self.pruned[name] = PrunedLayer.of(weight, where_kept(weight, keep), keep)
            self.report()

    def _scores(self, name: str) -> Tensor:
        self.enter(self.walks.linears[name])
        return self.scores(name, self._seen[name])


def raise_called_again(block: str) -> NoReturn:
    """Refuses a model that calls a block again, of which one is there at a time."""
    raise ValueError(f"model: {block} is called again later, and its blocks come one at a time: prune it where all are in memory")


def _version(tensor: Tensor) -> float:
    """Returns a number that is another after each change in place; nan in inference mode, where nothing counts."""
    return math.nan if tensor.is_inference() else tensor._version
