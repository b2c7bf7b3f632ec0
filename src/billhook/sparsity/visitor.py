"""Prunes during a walk over a model: gathers statistics of each linear's inputs, and keeps the pruned weights aside."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import Any, NoReturn
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from billhook.adapters.masked import counted, product_of
from billhook.engine.comm import Comm
from billhook.engine.statistics import InputNorms, Statistics
from billhook.engine.store import BlockStore
from billhook.engine.walk import Site, Visitor
from billhook.model.linears import batched, channels, is_convolution, patches, places_of, size_of, turned, weight_of
from billhook.sparsity.criteria import Criterion, check_finite
from billhook.sparsity.masks import Lowest, check_amount, parse_pattern, pruned_count, where_kept
from billhook.sparsity.pruned import Pruned

VALUES = 2**24
"""How many values of patches are in memory at a time, unless one image has more."""


class Grouped:
    """Statistics of a grouped convolution: of each group those of its own channels, as each is a linear beside the others."""

    def __init__(self, parts: Sequence[Statistics]) -> None:
        self.parts = parts

    @property
    def tokens(self) -> Tensor:
        """How many patches were added."""
        return self.parts[0].tokens

    def add(self, inputs: Tensor, keep: Tensor | None = None) -> None:
        """Adds patches, `[..., groups, in_features]`."""
        for part, own in zip(self.parts, inputs.unbind(-2), strict=True):
            part.add(own, keep)

    def settle(self) -> None:
        """Checks the sums of all groups a last time."""
        for part in self.parts:
            part.settle()

    def tensors(self) -> list[Tensor]:
        """Returns the sums of all groups."""
        return [tensor for part in self.parts for tensor in part.tensors()]


def empty_for(criterion: Criterion, linear: nn.Module, device: torch.device) -> Statistics | Grouped:
    """Makes the empty statistics of a linear's inputs; norms, for a criterion that needs none, tell at least who is called."""
    groups, width = linear.groups if is_convolution(linear) else 1, size_of(linear)[1]
    parts = [criterion.statistics(width, device) or InputNorms(width, device) for _ in range(groups)]
    return parts[0] if groups == 1 else Grouped(parts)


def add_patches(
    statistics: Statistics | Grouped, convolution: nn.Conv1d | nn.Conv2d, inputs: Tensor, keep: Tensor | None
) -> None:
    """Adds what a convolution reads of `[batch, channels, *size]`, some images at a time.

    `keep`, bool, `[batch, *places]`, says which outputs count (None: all).
    """
    values = places_of(convolution, inputs)[1:].numel() * convolution.groups * size_of(convolution)[1]
    step = max(1, VALUES // max(1, values))
    counts = repeat(None) if keep is None else torch.split(keep, step)
    for images, counting in zip(torch.split(inputs, step), counts, strict=False):
        statistics.add(patches(convolution, images), counting)


def scores_of(criterion: Criterion, weight: Tensor, statistics: Statistics | Grouped | None) -> Tensor:
    """Scores a weight `[out_features, in_features]`; in groups, the outputs of each by its own inputs."""
    if not isinstance(statistics, Grouped):
        return criterion.score(weight, statistics)
    return torch.cat([criterion.score(own, part) for own, part in _parts(weight, statistics)])


def prune_by(
    criterion: Criterion, weight: Tensor, statistics: Statistics | Grouped | None, sparsity: float, pattern: str
) -> tuple[Tensor, Tensor]:
    """Prunes a weight by a criterion; returns the new weight and the keep-mask. See `Criterion.prune`.

    Scores of groups compete as the criterion says, over the whole layer or in each row. A criterion that updates weights solves
    each group as a layer of its own.
    """
    if not isinstance(statistics, Grouped):
        return criterion.prune(weight, statistics, sparsity, pattern)
    if criterion.updates:
        pruned = [criterion.prune(own, part, sparsity, pattern) for own, part in _parts(weight, statistics)]
        return torch.cat([new for new, _ in pruned]), torch.cat([keep for _, keep in pruned])
    check_finite(weight, "the weight")
    keep = criterion.keep(scores_of(criterion, weight, statistics), check_amount(sparsity, pattern), parse_pattern(pattern))
    return where_kept(weight, keep), keep


def _parts(weight: Tensor, statistics: Grouped) -> list[tuple[Tensor, Statistics]]:
    return list(zip(weight.chunk(len(statistics.parts)), statistics.parts, strict=True))


Progress = Callable[[int, int], None]
"""Called with how many linears are done, and of how many."""


class InputsDiffer(Exception):
    """Two linears that read one and the same tensor in one run do not in another, of this rank or of another."""


class PruningVisitor(Visitor):
    """Gathers a criterion's statistics, and prunes each linear of a site when all runs have been there; the model stays as it is.

    Args:
        criterion: How weights are pruned.
        sparsities: Of each linear.
        pattern: `"unstructured"` or `"N:M"`.
        progress: Called with how many linears are done, and of how many.
        store: Where blocks come from, and where what becomes of their linears is staged.
        linears: All linears, by name.
        tokens: Of each run, which tokens count: bool, `[batch, length]`, one for each of its sequences that is padded.
        comm: The ranks.
        adapters: The layers of LoRA that count, by linear: as if they were merged.
        shared: Whether linears that read one and the same tensor share their statistics; if they do so in some runs only, that
            raises `InputsDiffer`.
    """

    def __init__(
        self,
        criterion: Criterion,
        sparsities: Mapping[str, float],
        pattern: str,
        progress: Progress | None = None,
        *,
        store: BlockStore,
        linears: Mapping[str, nn.Module],
        tokens: Sequence[Mapping[str, Tensor]],
        comm: Comm,
        adapters: Mapping[str, nn.Module],
        shared: bool,
    ) -> None:
        self.criterion, self.sparsities, self.pattern, self.progress = criterion, sparsities, pattern, progress
        self.store, self.linears = store, linears
        self.tokens, self.comm, self.adapters, self.shared = tokens, comm, adapters, shared
        self.pruned: dict[str, Pruned] = {}
        self.given: dict[str, tuple[int, int]] = {}  # linear -> how many tokens it was given, and how many inputs it has
        self._names = {module: name for name, module in store.model.named_modules()}
        self._block: nn.Module | None = None  # which runs are in
        self._staged = set[str]()
        self.statistics: dict[str, Statistics | Grouped] = {}
        self._first: dict[str, str] = {}  # linear -> the one whose statistics are its own
        self._last: dict[int, tuple[ReferenceType[Tensor], float, str]] = {}  # run -> inputs, their version, who read them first
        self._calls = Counter[str]()
        self._complete: set[str] = set()
        self._differ = False

    def resume(self) -> list[nn.Module]:
        """Takes what an earlier process has made of blocks in the same step, and returns these."""
        blocks = list[nn.Module]()
        for block in self.store.blocks.values():
            if (known := self.store.known(block)) is not None:
                tensors, kept = known
                self.pruned |= {name: Pruned.staged(kept[name], self._weight(name), tensors) for name in kept}
                self._staged |= kept.keys()
                blocks.append(block)
        return blocks

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
        own = [name for name in self.pruned if self.store.owner.get(self.linears[name]) is self._block]
        own = [name for name in own if self.linears[name] in self._names]  # or it is beside the model, and waits in memory
        if not self.store.blocks or self._staged.issuperset(own):  # in memory it is where it stays
            return
        values = {key: value for name in own for key, value in self.pruned[name].to_stage(self._weight(name)).items()}
        kept = {name: self.pruned[name].kept for name in own}
        tensors = self.store.stage(self._block, values, kept, torch.device("cpu"))
        self.pruned |= {name: Pruned.staged(kept[name], self._weight(name), tensors) for name in own}
        self._staged |= kept.keys()

    def _weight(self, name: str) -> str:
        """Names the weight of a linear as the store does."""
        return f"{self._names[self.linears[name]]}.weight"

    def came_again(self, site: Site) -> None:
        """Refuses blocks that come one at a time and are called again when what they become has been decided."""
        if not self.store.holds_all:
            refuse_again(self._names[site.module])

    def observe(self, name: str, linear: nn.Module, inputs: Tensor, run: int) -> None:
        """Adds the inputs of a linear in one run; of a convolution, whatever reads the same tensor may read other patches."""
        first = name if is_convolution(linear) else self._reader(inputs, run) or name
        known = self._first.setdefault(name, first)
        self._calls[name] += 1
        self._differ |= known not in (name, first)
        if known == name:
            if name not in self.statistics:
                self.statistics[name] = empty_for(self.criterion, linear, inputs.device)
            if is_convolution(linear):
                images = batched(linear, inputs)
                add_patches(self.statistics[name], linear, images, self._counting(places_of(linear, images), images, run))
                return
            self.statistics[name].add(inputs, self._counting(inputs.shape[:-1], inputs, run))
            self._last[run] = (ref(inputs), _version(inputs), name)

    def _reader(self, inputs: Tensor, run: int) -> str | None:
        """Names the linear that has just read the same tensor."""
        last = self._last.get(run)
        return last[2] if self.shared and last and last[0]() is inputs and last[1] == _version(inputs) else None

    def _counting(self, shape: torch.Size, inputs: Tensor, run: int) -> Tensor | None:
        """Finds the mask of tokens that are not padding, if one fits the shape of those that inputs hold."""
        for keep in self.tokens[run].values():
            if keep.shape == shape or (len(shape) == 1 and keep.numel() == shape[0]):
                return keep.reshape(shape).to(inputs.device)
        return None

    def complete(self, site: Site) -> None:
        """Prunes the linears of a site that were given tokens."""
        firsts = {name: self._first[name] for name in site.linears if name in self._first}
        self._differ |= any(self._calls[name] != self._calls[first] for name, first in firsts.items())  # one was called again
        self._sum(site)
        if self._differ:
            raise InputsDiffer
        called = {name: linear for name, linear in site.linears.items() if name in self._first}
        tokens = {name: int(self.statistics[self._first[name]].tokens) for name in called}
        linears = {name: linear for name, linear in called.items() if tokens[name] and not is_convolution(linear)}
        self.given |= {name: (tokens[name], channels(linear)) for name, linear in linears.items()}
        self.finish({name: linear for name, linear in called.items() if tokens[name]})
        self._complete |= site.linears.keys()
        if site.module not in called.values() or self.comm.size > 1:
            self._last = {run: last for run, last in self._last.items() if last[2] not in self._complete}
        wanted = {last[2] for last in self._last.values()}
        self.statistics = {name: one for name, one in self.statistics.items() if name in wanted or name not in self._complete}

    def _sum(self, site: Site) -> None:
        """Sums the statistics of a site over ranks together, once all have agreed on which there are."""
        known = {name: self._first[name] for name in site.linears if name in self._first}
        ranks = self.comm.gather((known, self._differ))
        firsts = {name: first for firsts, _ in ranks for name, first in firsts.items()}
        self._differ = any(differ or not firsts.items() >= known.items() for known, differ in ranks)
        if self._differ:
            return
        self._first |= firsts
        device = next(iter(site.linears.values())).get_parameter("weight").device
        there = [name for name in site.linears if name in firsts.values()]
        for name in there:
            if name not in self.statistics:
                self.statistics[name] = empty_for(self.criterion, site.linears[name], device)
        self.comm.sum_(*(tensor for name in there for tensor in self.statistics[name].tensors()))

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Prunes linears whose statistics are complete, or are not needed."""
        divided = self.criterion.updates and self.comm.size > 1  # to solve for weights takes longer than to send them
        own = self._own(linears) if divided else {}
        for name, linear in linears.items():
            self.enter(linear)
            weight, adapter = weight_of(linear), self.adapters.get(name)
            scored = weight if adapter is None else counted(weight, adapter)
            if divided:
                solved = own.pop(name, None)
                new = torch.zeros_like(scored) if solved is None else solved.weight(scored)
                keep = torch.zeros_like(scored, dtype=torch.bool) if solved is None else solved.keep(scored)
                new, keep = self.comm(new.float()).to(new.dtype), self.comm(keep.byte()).bool()
            else:
                new, keep = self._solved(name, scored, self._statistics(name))
            if adapter is not None:
                if not torch.equal(new, where_kept(scored, keep)):
                    kind = type(self.criterion).__name__
                    raise ValueError(f"{name}: count_adapters=True, and {kind} changes kept weights (`updates` is False)")
                new = where_kept(weight, keep)
            self.pruned[name] = Pruned.of(weight, new, keep)
            self.tell()

    def _own(self, linears: Mapping[str, nn.Module]) -> dict[str, Pruned]:
        """Prunes this rank's linears, reckoned to cost rows x width^2 + width^3, before any are sent."""
        costs = [width**2 * (rows + width) for rows, width in (size_of(linear) for linear in linears.values())]
        found = dict[str, Pruned]()
        for (name, linear), is_own in zip(linears.items(), self.comm.own_of(costs), strict=True):
            self.store.load(linear)
            if is_own:
                scored = counted(weight_of(linear), self.adapters.get(name))
                found[name] = Pruned.of(scored, *self._solved(name, scored, self._statistics(name)))
        return found

    def _solved(self, name: str, scored: Tensor, statistics: Statistics | Grouped | None) -> tuple[Tensor, Tensor]:
        """Returns the new weight of a linear, and which weights are kept."""
        with naming(name):
            return prune_by(self.criterion, scored, statistics, self.sparsities[name], self.pattern)

    def _statistics(self, name: str) -> Statistics | Grouped | None:
        return self.statistics[self._first[name]] if name in self._first else None

    def tell(self) -> None:
        """Tells how many linears are done."""
        if self.progress is not None:
            self.progress(len(self.pruned), len(self.sparsities))

    def close(self) -> Callable[[Mapping[str, nn.Module]], None] | None:
        """Ends the walk, when all runs have been everywhere; returns what prunes linears then, if none has been pruned yet."""
        return None

    def parameters(self, site: Site) -> dict[str, dict[str, Tensor]]:
        """Returns the new weights of a site's linears, as they lie in memory."""
        own = {name: self.pruned[name] for name in site.linears if name in self.pruned}
        passed = {name: self._as_passed(name, weight_of(site.linears[name]), one) for name, one in own.items()}
        return {name: {"weight": turned(site.linears[name], weight)} for name, weight in passed.items()}

    def _as_passed(self, name: str, old: Tensor, one: Pruned) -> Tensor:
        """Returns a new weight; it makes up for what LoRA adds where weights are zero, which merging will leave out."""
        weight = one.weight(old)
        if name not in self.adapters:
            return weight
        added = where_kept(product_of(self.adapters[name]), ~one.keep(weight))
        return weight - added.to(weight.dtype)


class GlobalPruningVisitor(PruningVisitor):
    """A visitor for which the weights of all linears compete with one another, when all statistics are complete.

    Their scores are computed three times, of one linear at a time: twice to find the lowest that is kept, and to prune.
    """

    def __init__(self, *args: Any, **walk: Any) -> None:  # noqa: ANN401 - those of a visitor
        super().__init__(*args, **walk)
        self._seen: dict[str, Statistics | Grouped | None] = {}

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Keeps the statistics of linears."""
        self._seen |= {name: self._statistics(name) for name in linears}

    def resume(self) -> list[nn.Module]:
        """Takes nothing: how many scores of each linear are lowest has to be found again."""
        return []

    def close(self) -> Callable[[Mapping[str, nn.Module]], None]:
        """Finds the lowest score that is kept of all, and returns what prunes by it."""
        seen = {name: linear for name, linear in self.linears.items() if name in self._seen}
        sparsity = next(iter(self.sparsities.values()))
        count = pruned_count(sum(math.prod(size_of(linear)) for linear in seen.values()), sparsity)
        lowest = Lowest.of(lambda: map(self._scores, seen), count)

        def prune(linears: Mapping[str, nn.Module]) -> None:
            for name in (name for name in linears if name in seen):
                keep = lowest.keep(self._scores(name))
                weight = weight_of(seen[name])
                self.pruned[name] = Pruned.of(weight, where_kept(weight, keep), keep)
            self.tell()

        return prune

    def _scores(self, name: str) -> Tensor:
        linear = self.linears[name]
        self.enter(linear)
        weight = counted(weight_of(linear), self.adapters.get(name))
        with naming(name):
            check_finite(weight, "the weight")
            return scores_of(self.criterion, weight, self._seen[name])


def refuse_again(block: str) -> NoReturn:
    """Refuses a model that calls a block again, of which one is there at a time."""
    raise ValueError(f"model: {block} is called again later, and its blocks come one at a time: prune it where all are in memory")


def _version(tensor: Tensor) -> float:
    """Returns a number that is another after each change in place; nan in inference mode, where nothing counts."""
    return math.nan if tensor.is_inference() else tensor._version


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts a linear's name before the criterion's refusal."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
