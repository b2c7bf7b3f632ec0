"""Prunes during a walk over a model: gathers statistics of each linear's inputs, and keeps the pruned weights aside."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from billhook.adapters.masked import counted, product_of
from billhook.engine.ranks import Ranks, own_of
from billhook.engine.sharding import is_sharded, whole
from billhook.engine.statistics import Statistics
from billhook.engine.walk import Given, Reduce, Site
from billhook.model.convolutions import batched, is_convolution, places_of
from billhook.model.linears import channels, in_place, turned, weight_of
from billhook.sparsity.criteria import Criterion, check_finite
from billhook.sparsity.grouped import Grouped, add_patches, empty_for, prune_by, scores_of
from billhook.sparsity.masks import Lowest, keep_global, pruned_count, where_kept
from billhook.sparsity.pruned import Applied, Pruned, Share

Progress = Callable[[int, int], None]
"""Called with how many linears are done, and of how many."""


class InputsDiffer(Exception):
    """Two linears that read one and the same tensor in one run do not in another, of this rank or of another."""


class PruningVisitor:
    """Gathers a criterion's statistics, and prunes each linear of a site when all runs have been there; the model stays as it is.

    Args:
        criterion: How weights are pruned.
        sparsities: Of each linear.
        pattern: `"unstructured"` or `"N:M"`.
        progress: Called with how many linears are done, and of how many.
        tokens: Of each run, which tokens count: bool, `[batch, length]`, one for each of its sequences that is padded.
        reduce: Sums statistics over ranks; None on one.
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
        tokens: Sequence[Mapping[str, Tensor]],
        reduce: Reduce | None,
        adapters: Mapping[str, nn.Module],
        shared: bool,
    ) -> None:
        self.criterion, self.sparsities, self.pattern, self.progress = criterion, sparsities, pattern, progress
        self.tokens, self.reduce, self.adapters, self.shared = tokens, reduce, adapters, shared
        self.pruned: dict[str, Pruned | Share | Applied] = {}
        self.given: dict[str, tuple[int, int]] = {}  # linear -> how many tokens it was given, and how many inputs it has
        self._passed: dict[str, Tensor] | None = None  # whole weights for runs to pass, where each rank keeps its share of them
        self.statistics: dict[str, Statistics | Grouped] = {}
        self._first: dict[str, str] = {}  # linear -> the one whose statistics are its own
        self._last: dict[int, tuple[ReferenceType[Tensor], float, str]] = {}  # run -> inputs, their version, who read them first
        self._calls = Counter[str]()
        self._complete: set[str] = set()
        self._differ = False

    @property
    def dense(self) -> Sequence[int]:
        """The numbers of runs, after those of the batches, that pass the dense model, for comparison."""
        return ()

    def came_out(self, run: int, given: Given, output: object) -> None:
        """Notes what a block was given in a run, and what it gave; here nothing."""

    def came_again(self, site: Site) -> None:
        """Is told of a site that a run comes to once more when it is complete; here nothing is done."""

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
        if self.reduce is not None:
            self._sum(site, self.reduce)
        if self._differ:
            raise InputsDiffer
        called = {name: linear for name, linear in site.linears.items() if name in self._first}
        self._passed = {}
        tokens = {name: int(self.statistics[self._first[name]].tokens) for name in called}
        linears = {name: linear for name, linear in called.items() if tokens[name] and not is_convolution(linear)}
        self.given |= {name: (tokens[name], channels(linear)) for name, linear in linears.items()}
        self.finish({name: linear for name, linear in called.items() if tokens[name]})
        self._complete |= site.linears.keys()
        if site.module not in called.values() or self.reduce is not None:
            self._last = {run: last for run, last in self._last.items() if last[2] not in self._complete}
        wanted = {last[2] for last in self._last.values()}
        self.statistics = {name: one for name, one in self.statistics.items() if name in wanted or name not in self._complete}

    def _sum(self, site: Site, reduce: Reduce) -> None:
        """Sums statistics over ranks, once all have agreed on which there are."""
        names, device = list(site.linears), weight_of(next(iter(site.linears.values()))).device
        place = {name: number for number, name in enumerate(names)}
        who = [place[self._first[name]] if name in self._first else None for name in names]
        rows = [[1, first, first * first] if first is not None else [0, 0, 0] for first in who]
        sums = reduce(torch.tensor([*rows, [int(self._differ), 0, 0]], dtype=torch.int64, device=device)).tolist()
        self._differ = sums[-1][0] > 0 or any(ranks * squares != total**2 for ranks, total, squares in sums[:-1])
        if self._differ:
            return
        self._first |= {name: names[total // ranks] for name, (ranks, total, _) in zip(names, sums, strict=False) if ranks}
        for name in dict.fromkeys(self._first[name] for name in names if name in self._first):
            if name not in self.statistics:
                self.statistics[name] = empty_for(self.criterion, site.linears[name], device)
            for tensor in self.statistics[name].tensors():
                reduce(tensor)

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Prunes linears whose statistics are complete, or are not needed."""
        own = {} if (ranks := self._dividing) is None else self._own(linears, ranks)
        for name, linear in linears.items():
            weight, adapter = whole(weight_of(linear)), self.adapters.get(name)
            scored = counted(weight, adapter)
            if ranks is None:
                new, keep = self._solved(name, scored, self._statistics(name))
            else:
                nothing = torch.zeros_like(scored), torch.zeros_like(scored, dtype=torch.bool)
                new, keep = own.pop(name, nothing)
                new, keep = ranks(new.float()).to(new.dtype), ranks(keep.byte()).bool()
            if adapter is not None:
                if not torch.equal(new, where_kept(scored, keep)):
                    kind = type(self.criterion).__name__
                    raise ValueError(f"{name}: count_adapters=True, and {kind} changes kept weights (`updates` is False)")
                new = where_kept(weight, keep)
            self.take(name, linear, weight, Pruned.of(weight, new, keep))
            self.tell()

    def take(self, name: str, linear: nn.Module, weight: Tensor, one: Pruned) -> None:
        """Notes what a linear becomes; of a sharded one this rank's share, and the whole weight until runs have passed it."""
        old = in_place(linear)
        if isinstance(old, DTensor):
            if self._passed is not None:
                self._passed[name] = turned(linear, self._as_passed(name, weight, one))
            self.pruned[name] = one.share(old)
        else:
            self.pruned[name] = one

    def leave(self, _: Site) -> None:
        """Lets go of what runs have passed."""
        self._passed = None

    @property
    def _dividing(self) -> Ranks | None:
        """The ranks that divide linears, where weights are solved for, which takes longer than to send them."""
        return self.reduce if self.criterion.updates and isinstance(self.reduce, Ranks) else None

    def _own(self, linears: Mapping[str, nn.Module], ranks: Ranks) -> dict[str, tuple[Tensor, Tensor]]:
        """Prunes this rank's linears, reckoned to cost rows x width^2 + width^3, before any are sent."""
        costs = [width**2 * (rows + width) for rows, width in (weight_of(linear).shape for linear in linears.values())]
        found = dict[str, tuple[Tensor, Tensor]]()
        for (name, linear), is_own in zip(linears.items(), own_of(costs, ranks), strict=True):
            scored = counted(whole(weight_of(linear)), self.adapters.get(name))  # all ranks gather a sharded weight
            if is_own:
                found[name] = self._solved(name, scored, self._statistics(name))
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

    def close(self) -> None:
        """Ends the walk, when all runs have been everywhere."""

    def parameters(self, site: Site) -> dict[str, dict[str, Tensor]]:
        """Returns the new weights of a site's linears, as they lie in memory."""
        new = {}
        for name, linear in site.linears.items():
            if isinstance(pruned := self.pruned.get(name), Pruned):
                new[name] = {"weight": turned(linear, self._as_passed(name, weight_of(linear), pruned))}
            elif self._passed is not None and name in self._passed:
                new[name] = {"weight": self._passed[name]}
        return new

    def _as_passed(self, name: str, old: Tensor, one: Pruned) -> Tensor:
        """Returns a new weight; it makes up for what LoRA adds where weights are zero, which merging will leave out."""
        weight = one.weight(old)
        if name not in self.adapters:
            return weight
        added = where_kept(product_of(self.adapters[name]), ~one.keep(weight))
        return weight - added.to(weight.dtype)


class GlobalPruningVisitor(PruningVisitor):
    """A visitor for which the weights of all linears compete with one another, when all statistics are complete."""

    def __init__(self, *args: Any, **walk: Any) -> None:  # noqa: ANN401 - those of a visitor
        super().__init__(*args, **walk)
        self.seen: dict[str, tuple[nn.Module, Statistics | Grouped | None]] = {}

    @property
    def sparsity(self) -> float:
        """The fraction that is removed of all together."""
        return next(iter(self.sparsities.values()))

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Keeps the statistics of linears."""
        self.seen |= {name: (linear, self._statistics(name)) for name, linear in linears.items()}

    def scores(self, name: str) -> Tensor:
        """Scores the weights of a linear."""
        linear, statistics = self.seen[name]
        weight = counted(whole(weight_of(linear)), self.adapters.get(name))
        with naming(name):
            check_finite(weight, "the weight")
            return scores_of(self.criterion, weight, statistics)

    def close(self) -> None:
        """Prunes all linears at once; all scores are in memory, or where weights are sharded, those of one linear at a time."""
        if any(is_sharded(linear) for linear, _ in self.seen.values()):
            keeps = self._keeps_in_turn()
        else:
            keeps = iter(keep_global([self.scores(name) for name in self.seen], self.sparsity))
        for (name, (linear, _)), keep in zip(self.seen.items(), keeps, strict=True):
            weight = whole(weight_of(linear))
            self.take(name, linear, weight, Pruned.of(weight, where_kept(weight, keep), keep))
        self.tell()

    def _keeps_in_turn(self) -> Iterator[Tensor]:
        """Yields the keep-mask of each linear in turn, whose scores are computed three times."""
        count = pruned_count(sum(weight_of(linear).numel() for linear, _ in self.seen.values()), self.sparsity)
        lowest = Lowest.of(lambda: map(self.scores, self.seen), count)
        for name in self.seen:
            yield lowest.keep(self.scores(name))


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
