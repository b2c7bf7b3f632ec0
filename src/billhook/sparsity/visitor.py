"""Walks over a model in pruning: input statistics of each layer, and pruned layers.

`WalkSettings.walk` makes a `PruningVisitor`, and a `Walk` calls it for one block (or layer) after the other:

1. `resume` restores blocks that an earlier process has staged, whose layers are not pruned again;
2. `enter` stages the block that all runs have left, and loads the next one;
3. `observe` adds the inputs of each linear layer, in each run;
4. `complete` sums statistics over ranks (`_sum`) and calls `finish`, which prunes each layer;
5. `parameters` returns the new weights, with which all runs then compute the inputs of the next block;
6. after the last block, `close` prunes what needs all statistics, and `stage` stages the rest.

The model does not change: `WeightPlan.apply` puts the new weights into it.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from billhook.engine import (
    ActivationFiles,
    BlockStore,
    Comm,
    LazyTensors,
    ModulesByName,
    Run,
    Sequential,
    Site,
    Statistics,
    Visitor,
    Walk,
    by_parameter,
    evaluating_without_grad,
    find_sites,
    runs_fingerprint,
    spilled_outputs,
    store_of,
    with_exits,
)
from billhook.model import (
    ExpertLinear,
    adjacent_inputs,
    batched,
    find_tied,
    holder_of,
    is_convolution,
    output_positions,
    patches,
    raise_called_again,
    routed,
    size_of,
    to_layout,
    weight_of,
)
from billhook.progress import OnProgress
from billhook.sparsity.criteria import Criterion, Magnitude, check_finite
from billhook.sparsity.grouped import GroupedStatistics, empty_statistics, prefix_errors, prune_weight, score_weight
from billhook.sparsity.masks import FEWEST, RemovalThreshold, pruned_count, where_kept
from billhook.sparsity.weight_plan import PrunedLayer

VALUES = 2**24
"""Values of patches in memory at once, unless an image has more."""


V = TypeVar("V", bound="PruningVisitor")


class InputsDiffer(Exception):
    """Two layers share an input tensor in some runs only, on this rank or another."""


@dataclass(frozen=True, eq=False)
class WalkSettings:
    """Settings of walks over a model, all with the same runs.

    Attributes:
        model: The model.
        layers: Linear layers to prune, by name.
        runs: A run for each batch; empty if nothing needs data.
        comm: The ranks.
        offload: Device on which blocks run; None for the model's device.
        activations: Folder for module outputs; None for memory.
    """

    model: nn.Module
    layers: ModulesByName
    runs: Sequence[Run]
    comm: Comm
    offload: torch.device | None
    activations: str | None

    @cached_property
    def tied(self) -> list[tuple[str, nn.Module]]:
        """Other layers that share the weight of a linear layer."""
        return find_tied(self.model, self.layers)

    @cached_property
    def store(self) -> BlockStore:
        """The block store of the model."""
        return store_of(self.model)

    @property
    def blocks(self) -> list[Site]:
        """The blocks, and the linear layers outside of blocks."""
        return find_sites(self.model, self.layers, "block")

    def walk(self, sequential: Sequential | None, make_visitor: Callable[["WalkSettings", bool], V], key: str | None = None) -> V:
        """Walks with a visitor and returns it, repeating the walk if necessary.

        Args:
            sequential: Where runs stop; None if the visitor needs no data.
            make_visitor: Makes the visitor from these settings, and from whether layers with the same input share statistics.
            key: Identifies this work, so that staged blocks of an earlier process are reused for files.

        Raises:
            ValueError: If blocks are loaded one at a time and layers share a weight, or a block is called again.
        """
        shared, called_again = True, {name for name, _ in self.tied}
        if called_again and not self.store.holds_all:
            name = min(called_again)
            raise ValueError(
                f"model: {name} shares its weight with another layer. Prune the model in memory, not block by block."
            )
        # Only a walk shows how layers are called. It is repeated without sharing if inputs are shared in some runs only, and with
        # layers pruned first that a run has called again later, so that every call counts. Both can happen finitely often.
        while True:
            visitor = make_visitor(self, shared)
            step = self.store.step(f"{key} {shared}", partial(runs_fingerprint, self.runs)) if key else nullcontext()
            try:
                with ExitStack() as stack:
                    stack.enter_context(evaluating_without_grad(self.model))
                    blocks = [site.module for site in self.blocks]
                    if self.offload is not None:
                        stack.enter_context(self.store.on(self.offload, blocks))
                    if self.activations is not None:
                        files = stack.enter_context(closing(ActivationFiles(self.activations)))
                        # runs that stop at each layer also hold outputs of modules within blocks
                        stack.enter_context(spilled_outputs(files, self.model, [] if sequential == "layer" else blocks))
                    stack.enter_context(step)
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

    def _go(self, sequential: Sequential | None, visitor: "PruningVisitor", called_again: set[str], resumes: bool) -> set[str]:
        """Walks and returns the layers with missed calls; `called_again` are pruned first."""
        done = set(visitor.resume() if resumes else ())
        if sequential is None:
            for site in self.blocks:
                if self.store.owner.get(site.module) not in done:
                    visitor.finish(site.linears)
            return set()
        forwards = [run.forward for run in self.runs] * (2 if visitor.dense else 1)
        at_once = sequential == "none" and not self.store.blocks
        pruned_first, other_layers = dict[str, nn.Module](), dict[str, nn.Module]()
        for name, linear in self.layers.items():
            (pruned_first if at_once or name in called_again else other_layers)[name] = linear
        new = {}
        if pruned_first:
            site = Site(self.model, pruned_first, False if called_again else None, self.tied)
            Walk([site], visitor, self.comm)(forwards)
            new = by_parameter(visitor.parameters(site))
        # if blocks are loaded on demand, all runs leave a block before the next is loaded
        sites = find_sites(self.model, other_layers, "block" if sequential == "none" else sequential, self.store.blocks.values())
        for site in sites:
            site.done = self.store.owner.get(site.module) in done
        if all(site.done or not site.linears for site in sites):
            return set()
        visitor.untouched = range(len(forwards)) if sequential == "none" else visitor.dense
        visitor.ends = 1  # one run continues to its end, to detect layers that are called again
        with self.store.computing_with(new) if new else nullcontext():
            walk = Walk(with_exits(self.model, sites) if visitor.dense else sites, visitor, self.comm, visitor.enter)
            walk(forwards)
        return set().union(*(site.linears for site in walk.again))


@dataclass(eq=False)
class PruningVisitor(Visitor):
    """Gathers input statistics, and prunes each layer of a stop when all runs have reached it.

    The model does not change.

    Args:
        criterion: Prunes the weights.
        sparsities: Sparsity of each linear layer.
        pattern: `"unstructured"` or `"N:M"`.
        progress: Callback with the number of pruned layers and the total.
        settings: The model, its linear layers, and its runs.
        shared: If True, layers with the same input tensor share statistics. Raises `InputsDiffer` if they do so in some runs
            only.

    Attributes:
        pruned: Result of each linear layer.
        tokens: Numbers of tokens and of inputs of each linear layer that is neither a convolution nor in `by_magnitude`.
        by_magnitude: Tokens of each matrix of an expert that is pruned by magnitude because they are fewer than `FEWEST`.
        statistics: Incomplete input statistics, by the first layer that uses them.
    """

    criterion: Criterion
    sparsities: Mapping[str, float]
    pattern: str
    progress: OnProgress | None
    settings: WalkSettings
    shared: bool

    def __post_init__(self) -> None:
        self.store, self.comm = self.settings.store, self.settings.comm
        self.pruned: dict[str, PrunedLayer] = {}
        self.tokens: dict[str, tuple[int, int]] = {}
        self.statistics: dict[str, Statistics | GroupedStatistics] = {}
        self._names = {module: name for name, module in self.store.model.named_modules()}
        self._block: nn.Module | None = None  # the block that runs are in
        self._staged = set[str]()
        self._source: dict[str, str] = {}  # layer -> the layer whose statistics it shares
        self._last: dict[
            int, tuple[ReferenceType[Tensor], float, str]
        ] = {}  # run -> last inputs, their version, their first layer
        self._calls = Counter[str]()
        self._complete: set[str] = set()
        self._differ = False
        self.by_magnitude: dict[str, int] = {}

    def resume(self) -> list[nn.Module]:
        """Restores the blocks that an earlier process has staged, and returns them."""
        blocks = []
        for block in self.store.blocks.values():
            if (staged := self.store.read_staged(block)) is not None:
                self._take(*staged)
                blocks.append(block)
        return blocks

    def _take(self, tensors: LazyTensors, note: tuple[Mapping[str, int], Mapping[str, int]]) -> None:
        """Adds layers that a store has staged, with a note of `stage`."""
        kept, by_magnitude = note
        self.by_magnitude |= by_magnitude
        for name, count in kept.items():
            weight = self._weight(name)
            self.pruned[name] = PrunedLayer(count, tensors.reads[f"bits {weight}"], tensors.reads.get(f"values {weight}"))
        self._staged |= kept.keys()

    def enter(self, module: nn.Module) -> None:
        """Loads the block of a module, after staging the block that all runs have left."""
        block = self.store.owner.get(module)
        if block is not self._block:
            self.stage()
        self._block = block
        self.store.load(module)

    @torch.no_grad()
    def stage(self) -> None:
        """Stages the pruned layers of the current block, or of the layers outside all blocks."""
        linears, new = self.settings.layers, {}
        for name, pruned in self.pruned.items():
            # a layer outside the store's model stays in memory
            if self.store.owner.get(linears[name]) is self._block and linears[name] in self._names:
                new[name] = pruned
        if not self.store.blocks or self._staged.issuperset(new):  # in memory there is nothing to stage
            return
        values, kept = {}, {}
        for name, pruned in new.items():
            weight, kept[name] = self._weight(name), pruned.kept
            values[f"bits {weight}"] = pruned.read_bits()
            if pruned.read_values is not None:
                values[f"values {weight}"] = pruned.read_values()
        note = kept, dict(self.by_magnitude)
        self._take(self.store.stage(self._block, values, note, torch.device("cpu")), note)

    def _weight(self, name: str) -> str:
        """Returns the name of a layer's weight in the store, after the number of an expert."""
        layer = self.settings.layers[name]
        holder, attribute = holder_of(layer)
        number = f"{layer.number} " if isinstance(layer, ExpertLinear) else ""
        return f"{number}{self._names[holder]}.{attribute}"

    def on_reentry(self, site: Site) -> None:
        """Raises if a block that is loaded on demand is called again after its layers were pruned."""
        if not self.store.holds_all:
            raise_called_again(self._names[site.module])

    def observe(self, name: str, linear: nn.Module, inputs: Tensor, run: int) -> None:
        """Adds the inputs of a linear layer in a run. See `Visitor.observe`.

        Statistics are never shared with a convolution, whose patches depend on its settings.
        """
        # Layers that read one tensor, such as Q, K, and V, have equal statistics. Its address does not tell: a freed tensor's is
        # used again. A weak reference does, without keeping the tensor in memory; its version shows changes in place.
        last, source_name = self._last.get(run), name
        if self.shared and not is_convolution(linear) and last and last[0]() is inputs and last[1] == _version(inputs):
            source_name = last[2]
        source = self._source.setdefault(name, source_name)
        self._calls[name] += 1
        self._differ |= source not in (name, source_name)
        if source != name:
            return
        if name not in self.statistics:
            self.statistics[name] = empty_statistics(self.criterion, linear, inputs.device)
        if not is_convolution(linear):
            self.statistics[name].add(inputs, self._counting(inputs.shape[:-1], inputs, run, linear))
            self._last[run] = ref(inputs), _version(inputs), name
            return
        images = batched(linear, inputs)
        outputs = output_positions(linear, images)
        keep = self._counting(outputs, images, run, linear)
        step = max(1, VALUES // max(1, outputs[1:].numel() * linear.groups * size_of(linear)[1]))
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            self.statistics[name].add(patches(linear, images[part]), None if keep is None else keep[part])

    def _counting(self, shape: torch.Size, inputs: Tensor, run: int, layer: nn.Module) -> Tensor | None:
        """Returns the mask of non-padding tokens that fits a shape, if there is any."""
        for mask in self.settings.runs[run].tokens.values():
            keep = routed(layer, mask)
            if keep.shape == shape or (len(shape) == 1 and keep.numel() == shape[0]):
                return keep.reshape(shape).to(inputs.device)
        return None

    def complete(self, site: Site) -> None:
        """Prunes the linear layers of a stop that had tokens."""
        self._sum(site)
        reached = {}
        for name, linear in site.linears.items():
            tokens = int(self.statistics[self._source[name]].tokens) if name in self._source else 0
            if isinstance(linear, ExpertLinear) and tokens < FEWEST and self.criterion.compares != "global":
                self.by_magnitude[name] = tokens
            elif tokens and not is_convolution(linear):
                self.tokens[name] = tokens, adjacent_inputs(linear)
            if tokens or name in self.by_magnitude:
                reached[name] = linear
        self.finish(reached)
        self._complete |= site.linears.keys()
        # the next stop may have the same input tensor, so statistics stay until another tensor arrives
        if site.module not in site.linears.values() or self.comm.size > 1:
            self._last = {run: last for run, last in self._last.items() if last[2] not in self._complete}
        needed = {source for _, _, source in self._last.values()}
        for name in self._complete - needed:
            self.statistics.pop(name, None)

    def _sum(self, site: Site) -> None:
        """Sums the statistics of a stop over ranks, after an agreement on shared inputs."""
        sources = {name: self._source[name] for name in site.linears if name in self._source}
        for name, source in sources.items():
            self._differ |= self._calls[name] != self._calls[source]  # one of the two was called again
        ranks, agreed = self.comm.gather((sources, self._differ)), dict[str, str]()
        for rank_sources, _ in ranks:
            agreed |= rank_sources
        # computed from gathered data, so that all ranks raise or none does
        if any(differ or not agreed.items() >= rank_sources.items() for rank_sources, differ in ranks):
            raise InputsDiffer
        self._source |= agreed
        sums, used = [], set(agreed.values())
        for name, linear in site.linears.items():
            if name in used:
                if name not in self.statistics:  # zeros on a rank that has not called it
                    self.statistics[name] = empty_statistics(self.criterion, linear, getattr(*holder_of(linear)).device)
                sums += self.statistics[name].tensors()
        self.comm.sum_(*sums)

    def finish(self, linears: ModulesByName) -> None:
        """Prunes linear layers whose statistics are complete, or are not needed.

        Raises:
            ValueError: If a weight or statistics are not finite, or the criterion changes weights that it must keep.
        """
        divided, solved = self.criterion.updates and self.comm.size > 1, {}
        if divided:  # solving for weights takes longer than sending them; its cost is rows x width^2 + width^3
            costs = [width**2 * (rows + width) for rows, width in map(size_of, linears.values())]
            for (name, linear), is_own in zip(linears.items(), self.comm.owned_pieces(costs), strict=True):
                self.store.load(linear)
                if is_own:
                    weight = weight_of(linear)
                    solved[name] = PrunedLayer.of(weight, *self._prune(name, weight))
        for name, linear in linears.items():
            self.enter(linear)
            weight = weight_of(linear)
            if divided:  # all other ranks add zeros, so the sum is bitwise identical to the solution
                part = solved.pop(name, None)
                new = torch.zeros_like(weight) if part is None else part.weight(weight)
                keep = torch.zeros_like(weight, dtype=torch.bool) if part is None else part.keep(weight)
                new, keep = self.comm(new.float()).to(new.dtype), self.comm(keep.byte()).bool()
            else:
                new, keep = self._prune(name, weight)
            self.pruned[name] = PrunedLayer.of(weight, new, keep)
            self.report()

    def scores(self, name: str, statistics: Statistics | GroupedStatistics | None) -> Tensor:
        """Scores the weight of a linear layer, whose block is in memory."""
        with prefix_errors(name):
            weight = weight_of(self.settings.layers[name])
            check_finite(weight, "the weight")
            return score_weight(self.criterion, weight, statistics)

    def _prune(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        with prefix_errors(name):
            criterion = Magnitude(self.criterion.compares) if name in self.by_magnitude else self.criterion
            return prune_weight(criterion, weight, self.statistics_of(name), self.sparsities[name], self.pattern)

    def statistics_of(self, name: str) -> Statistics | GroupedStatistics | None:
        """Returns the statistics of a layer's inputs; None if it has none, or is pruned."""
        return self.statistics.get(self._source.get(name, name))

    def report(self) -> None:
        """Reports the number of pruned layers."""
        if self.progress is not None:
            self.progress(len(self.pruned), len(self.sparsities))

    def close(self) -> None:
        """Prunes the experts at which no run has stopped, by magnitude."""
        others = {name: layer for name, layer in self.settings.layers.items() if name not in self.pruned}
        uncalled = {name: layer for name, layer in others.items() if isinstance(layer, ExpertLinear)}
        self.by_magnitude |= dict.fromkeys(uncalled, 0)
        self.finish(uncalled)

    def parameters(self, site: Site) -> dict[str, dict[str, Tensor]]:
        """Returns the new weights of a stop's layers, in memory layout."""
        new = {}
        for name, linear in site.linears.items():
            if name in self.pruned:
                weight = self.pruned[name].weight(weight_of(linear))
                new[name] = {"weight": to_layout(linear, weight)}
        return new


class GlobalPruningVisitor(PruningVisitor):
    """A visitor that compares all layers: scores find the threshold in two passes, then prune."""

    def __init__(self, *args: Any) -> None:  # noqa: ANN401 - the arguments of `PruningVisitor`
        super().__init__(*args)
        self._seen: dict[str, Statistics | GroupedStatistics | None] = {}

    def finish(self, linears: ModulesByName) -> None:
        """Keeps the statistics of linear layers."""
        self._seen |= {name: self.statistics_of(name) for name in linears}

    def resume(self) -> list[nn.Module]:
        """Restores nothing: the threshold depends on the scores of all layers."""
        return []

    def close(self) -> None:
        """Finds the threshold over all scores, and prunes by it."""
        seen = {name: linear for name, linear in self.settings.layers.items() if name in self._seen}
        sparsity = next(iter(self.sparsities.values()))
        count = pruned_count(sum(math.prod(size_of(linear)) for linear in seen.values()), sparsity)
        lowest = RemovalThreshold.of(lambda: map(self._scores, seen), count)
        for site in self.settings.blocks:
            for name in filter(seen.__contains__, site.linears):
                keep = lowest.keep(self._scores(name))
                weight = weight_of(seen[name])
                self.pruned[name] = PrunedLayer.of(weight, where_kept(weight, keep), keep)
            self.report()

    def _scores(self, name: str) -> Tensor:
        self.enter(self.settings.layers[name])
        return self.scores(name, self._seen[name])


def _version(tensor: Tensor) -> float:
    """Returns a number that changes with each in-place change; NaN in inference mode."""
    return math.nan if tensor.is_inference() else tensor._version
