"""Finds the hidden sizes that a model could have, what all else then costs, and gives the model one for a while."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.batches import Run
from billhook.engine.lazy import LazyTensors
from billhook.engine.sharding import whole
from billhook.engine.state import undisturbed
from billhook.engine.store import store_of
from billhook.importance.baselines import WeightNorm
from billhook.importance.score import Importance, score
from billhook.kv_heads.plan import UNCHANGED, starting
from billhook.linalg import in_float64
from billhook.model.figures import figure_of
from billhook.model.shape import unbuilt_shape
from billhook.model.surgery import change_in_turn, whole_way_back
from billhook.pruning.amount import RoundTo, rounded
from billhook.pruning.block_plan import without
from billhook.pruning.choice import ranked
from billhook.pruning.cuts import Cut, find_cut
from billhook.pruning.removal import divided, remove, tried
from billhook.pruning.target import Search
from billhook.shrinking.blocks import Block, Blocks
from billhook.shrinking.divergence import Divergence
from billhook.shrinking.levels import Place
from billhook.shrinking.variants import Library
from billhook.units.find import units_of
from billhook.units.units import Units


def energies(model: PreTrainedModel, stream: Units, runs: Sequence[Run]) -> dict[str, Tensor]:
    """Measures by norm the share of each channel in the mean square of its inputs, on average: float64, `[channels]`."""
    names = dict.fromkeys(member.name.rpartition(".")[0] for member in stream.members)
    norms = {name: model.get_submodule(name) for name in names}
    norms = {name: one for name, one in norms.items() if {tuple(p.shape) for p in one.parameters()} == {(stream.count(),)}}
    sums = {name: torch.zeros(stream.count(), dtype=torch.float64) for name in norms}

    def note(name: str, norm: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape[-1:] == sums[name].shape:
            given = args[0].detach().flatten(0, -2)
            given = in_float64(given)
            squares = (given - given.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else given).square()
            sums[name] += (squares / squares.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).sum(0).cpu()

    with ExitStack() as hooks, undisturbed(model):
        for name, norm in norms.items():
            hooks.callback(norm.register_forward_pre_hook(partial(note, name)).remove)
        for run in runs:
            run.visit()
    return {name: own / own.sum() for name, own in sums.items() if own.any()}


def scaled_norms(model: PreTrainedModel, shares: Mapping[str, Tensor], gone: Sequence[int]) -> dict[str, Tensor]:
    """Returns weights with which norms give what they did on average though they span fewer channels, in their sizes now.

    A norm divides by the root of a mean over channels, which is that of those that stay afterwards.
    """
    found: dict[str, Tensor] = {}
    for name, own in shares.items():
        stays = torch.ones_like(own)
        stays[list(gone)] = 0
        ratio = 1 / math.sqrt(max(float(own @ stays), 1e-6) * len(own) / float(stays.sum()))
        norm, weight = model.get_submodule(name), f"{name}.weight"
        store_of(model).load(norm)
        scale = partial(torch.div, other=ratio) if isinstance(norm, nn.LayerNorm) else divided(norm, ratio)
        if scale is not None and "weight" in norm._parameters:
            found[weight] = scale(norm.get_parameter("weight").detach())
    return found


HIDDEN = "hidden size"
"""The name by which choices say how many residual channels are kept."""
SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4)
"""The parts of the hidden size that may go."""
TARGETS = ("params", "bytes")
"""What a smaller hidden size saves."""


@dataclass(frozen=True)
class Width:
    """A hidden size, with what all else costs then.

    Attributes:
        kept: The number of residual channels.
        now: What is left of the target, with all else whole.
        places: The places that may keep less.
        blocks: The blocks that may go.
    """

    kept: int
    now: int
    places: list[Place]
    blocks: list[Block]


@dataclass(eq=False)
class Hidden:
    """The hidden sizes that a model could have.

    Attributes:
        search: The model, and its units.
        units: All units, the residual channels too.
        name: The name of the place of the residual channels.
        widths: What it could have, falling, below what it has.
        why: Why none may go; empty if some may.
        order: The residual channels in the order in which they go, once they are ranked.
    """

    search: Search
    units: dict[str, Units] = field(default_factory=dict)
    name: str = ""
    widths: list[Width] = field(default_factory=list)
    why: str = ""
    order: list[int] = field(default_factory=list)
    _energies: dict[str, Tensor] = field(default_factory=dict)
    _cuts: dict[int, Cut] = field(default_factory=dict)
    _last: tuple[int, Callable[[], None]] | None = None

    @property
    def count(self) -> int:
        """The hidden size as it is."""
        return self.units[self.name].count()

    def rank(self, importance: Importance, fitted: Sequence[Any], runs: Sequence[Run]) -> None:
        """Ranks residual channels, by the norms of their weights where the importance cannot."""
        if not self.widths:
            return
        own, model = {self.name: self.units[self.name]}, self.search.model
        try:
            scores = score(model, own, importance, fitted)
        except ValueError:
            scores = score(model, own, WeightNorm())
        self.order = ranked(own[self.name], scores[self.name])
        self._energies = energies(model, own[self.name], runs)

    def gone(self, kept: Mapping[str, int]) -> dict[str, list[int]]:
        """Returns the residual channels that go, by the name of their place."""
        number = kept.get(HIDDEN, 0)
        return {self.name: sorted(self.order[: self.count - number])} if number else {}

    def cut(self, kept: Mapping[str, int]) -> Cut:
        """Finds what is removed with the residual channels that go."""
        number = kept.get(HIDDEN, 0)
        if number not in self._cuts:
            self._cuts[number] = _cut(self.search, self.units, self.gone(kept))
        return self._cuts[number]

    def scales(self, kept: Mapping[str, int]) -> dict[str, Tensor]:
        """Returns the weights of norms that make up for how much less they span, in the sizes that they have."""
        gone = self.gone(kept)
        return scaled_norms(self.search.model, self._energies, gone[self.name]) if gone else {}

    @contextmanager
    def narrowed(self, kept: Mapping[str, int]) -> Iterator[None]:
        """Gives the model fewer residual channels until the end of a `with` block; its own parameters come back."""
        number, model = kept.get(HIDDEN, 0), self.search.model
        if not number:
            yield
            return
        back = whole_way_back(model)
        try:
            if self._last is not None and self._last[0] == number:
                self._last[1]()
            else:
                self._last, cut = None, self.cut(kept)
                scales = LazyTensors.of(self.scales(kept)).map(partial(_sliced, cut))
                remove(model, cut)
                change_in_turn(model, {name: starting(read, UNCHANGED) for name, read in scales.reads.items()})
                self._last = number, whole_way_back(model)
            yield
        finally:
            back()

    def forget(self) -> None:
        """Lets go of the narrow model."""
        self._last = None

    def damages(self, library: Library, divergence: Divergence, done: Callable[[], None]) -> dict[int, float]:
        """Returns what is lost at each size, measured at every other one, and in between on a straight line.

        Args:
            library: Where it is noted.
            divergence: Measures the model.
            done: Called after each size.
        """
        points = {self.count: 0.0} if self.widths else {}
        for width in self.widths[::-2]:
            if (HIDDEN, width.kept) not in library.measured:
                with self.narrowed({HIDDEN: width.kept}):
                    library.note(HIDDEN, width.kept, max(divergence.mean(), 0.0))
            points[width.kept] = library.measured[HIDDEN, width.kept]
            done()
        sizes = sorted(points)
        lost = [points[size] for size in sizes]
        return {width.kept: float(np.interp(width.kept, sizes, lost)) for width in self.widths}

    def sliced(self, weights: LazyTensors, kept: Mapping[str, int]) -> LazyTensors:
        """Returns values of parameters without what goes with residual channels."""
        return weights.map(partial(_sliced, self.cut(kept))) if kept.get(HIDDEN, 0) else weights

    def widened(self, small: LazyTensors, kept: Mapping[str, int]) -> LazyTensors:
        """Returns parameters in the sizes that they have, where those that stay have values of a narrow model's."""
        model, store = self.search.model, store_of(self.search.model)
        store.release()  # so that each is held by its shards
        wide = {name: store.held(model.get_parameter(name)) for name in small}  # those of now: a narrow model has others
        return small.map(partial(_wide, self.cut(kept), wide))


def _wide(cut: Cut, wide: Mapping[str, nn.Parameter], name: str, read: Callable[[], Tensor]) -> Tensor:
    """Returns a parameter of the wide model with the values of a narrow model's."""
    value, found = read(), whole(wide[name]).clone()
    stays = [torch.as_tensor(cut.cuts.get((name, dim), range(size))) for dim, size in enumerate(found.shape)]
    found[torch.meshgrid(*(one.to(found.device) for one in stays), indexing="ij")] = value.to(found.dtype)
    return found


def _sliced(cut: Cut, name: str, read: Callable[[], Tensor]) -> Tensor:
    """Returns a parameter without what is cut."""
    value = read()
    for dim in range(value.dim()):
        if (stays := cut.cuts.get((name, dim))) is not None:
            value = value.index_select(dim, torch.from_numpy(stays).to(value.device))
    return value


def find_hidden(search: Search, target: str, places: Sequence[Place], blocks: Blocks, uniform: bool) -> Hidden:
    """Finds the hidden sizes that a model could have; where layers stay alike, those that its config can say."""
    model = search.model
    if target not in TARGETS:
        return Hidden(search, why=f"it is left as it is for a budget of {'time' if target == 'latency' else target}")
    try:
        every = units_of(model, search.structure, [*search.amount.kinds, "residual"])
        names = [name for name, one in every.items() if one.kind == "residual"]
    except ValueError as error:
        return Hidden(search, why=str(error))
    if len(names) != 1:
        return Hidden(search, why=f"the model has {len(names)} streams")
    found, heads = Hidden(search, every, names[0]), [one.count() for one in every.values() if one.kind == "head"]
    step = math.lcm(1 if search.amount.round_to == "auto" else search.amount.round_to, *heads[:1])
    sizes = dict.fromkeys(_sizes(round(found.count * (1 - share)), found.count, step, search.amount.round_to) for share in SHARES)
    found.widths, refused = _tried(sizes, step, lambda kept: _width(found, target, kept, places, blocks, uniform))
    found.why = "" if found.widths else refused or f"{found.count} channels do not become fewer by a multiple of {step}"
    return found


def _tried(sizes: Iterable[Sequence[int]], step: int, width: Callable[[int], Width]) -> tuple[list[Width], str]:
    """Returns the first of each row of sizes that can be, falling, and why one could not; after that multiples of a step."""
    found, why, steps_alone = dict[int, Width](), "", False
    for several in sizes:
        for kept in several:
            if steps_alone and kept % step:
                continue
            try:
                found[kept] = found.get(kept) or width(kept)
                break
            except ValueError as error:
                why, steps_alone = why or str(error), steps_alone or kept % step > 0
    return [found[kept] for kept in sorted(found, reverse=True)], why


def _sizes(asked: int, count: int, step: int, round_to: RoundTo) -> tuple[int, ...]:
    """Returns hidden sizes that are tried in turn for one, as many classes take multiples of a step alone.

    >>> _sizes(504, 576, 9, "auto"), _sizes(504, 576, 576, 64), _sizes(56, 64, 8, "auto")
    ((512, 504), (), (56,))
    """
    plain = round(asked / step) * step
    near = (rounded(asked, count), rounded(asked, count, step=step)) if round_to == "auto" else ()
    return tuple(dict.fromkeys(size for size in (*near, plain) if size is not None and 0 < size < count))


def _width(hidden: Hidden, target: str, kept: int, places: Sequence[Place], blocks: Blocks, uniform: bool) -> Width:
    """Finds what all costs at a hidden size; refuses one with which the model does not run, or that its config cannot say."""
    search, gone = hidden.search, {hidden.name: list(range(kept, hidden.count))}
    cut = _cut(search, hidden.units, gone)
    smaller = tried(search.model, cut)
    if uniform and unbuilt_shape(smaller).tensors and not unbuilt_shape(search.model).tensors:
        raise ValueError(f"the config of a {type(search.model).__name__} cannot say that it is {kept} with all else as it is")
    now, like, costs = search.cost(cut, target), dict[object, Place](), dict[int, int]()
    narrow = list[Place]()
    for place in places:
        key = place.kind, place.count, place.each, place.pairs, place.query, len(place.names)
        if key not in like:
            like[key] = place.repriced(
                hidden.units, lambda own: now - search.cost(_cut(search, hidden.units, gone | own), target)
            )
        narrow.append(replace(place, each=like[key].each, query=like[key].query))
    for block in blocks.able:
        if block.cost not in costs:
            costs[block.cost] = now - int(figure_of(without(smaller, blocks.planned(smaller, [block])), target) or 0)
    return Width(kept, now, narrow, [replace(block, cost=costs[block.cost]) for block in blocks.able])


def _cut(search: Search, units: Mapping[str, Units], gone: Mapping[str, list[int]]) -> Cut:
    return find_cut(search.model, search.structure, units, gone)
