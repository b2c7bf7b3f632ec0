"""How much is lost without a unit when the others make up for it: the importance that belongs to `Repair`.

"Second order derivatives for network pruning: Optimal Brain Surgeon" (Hassibi & Stork, 1993,
https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html), of structures as in "ZipLM:
Inference-Aware Structured Pruning of Language Models" (Kurtic, Frantar & Alistarh, 2023, https://arxiv.org/abs/2302.04089).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from billhook.arguments import annotated, number, whole
from billhook.engine.batches import Run
from billhook.engine.memory import memory_to_hold
from billhook.engine.passes import goes_by_blocks
from billhook.engine.state import resting
from billhook.engine.statistics import InputMoments
from billhook.engine.store import store_of
from billhook.engine.walk import blocks_of
from billhook.importance.activations import gram_of, table_of, watch
from billhook.importance.probes import check_read, reading
from billhook.importance.score import Importance, Sums
from billhook.linalg import cholesky_, damp_, float64_device
from billhook.units.units import Per, Units

Moments = dict[tuple[str, str], InputMoments]
"""(place, reader) -> the moments of what it reads."""


def moments_of(model: nn.Module, units: Mapping[str, Units], runs: Sequence[Run]) -> Moments:
    """Gathers the moments of what the readers of units read."""
    moments = Moments()

    def note(_: int, name: str, reader: str, inputs: Tensor, tokens: Tensor | None) -> None:
        _add(moments, (name, reader), inputs, tokens)

    watch(model, units, runs, note)
    return moments


def moments_over(model: nn.Module, units: Mapping[str, Units], groups: Sequence[Sequence[Run]]) -> Moments:
    """Gathers the moments of groups of runs apart, and adds them up in order, as where they are kept and merged."""
    moments = Moments()
    for runs in groups:
        for key, others in moments_of(model, units, runs).items():
            _merge(moments, key, others)
    return moments


def bytes_of(model: nn.Module, units: Mapping[str, Units]) -> int:
    """Returns how many bytes the moments of all readers take, with those of other batches to be added to them."""
    return sum(8 * len(one.index) ** 2 for one in units.values() for _ in reading(model, one))


def moments_in_turn(
    model: nn.Module, units: Mapping[str, Units], groups: Sequence[Sequence[Run]], use: Callable[[Moments], None]
) -> None:
    """Gathers the moments of one block after the other; those of each are used and dropped when all runs have passed it.

    Those of groups of runs are gathered apart and added up in order, as where they are kept and merged. See `watch_in_turn`.
    """
    group = [number for number, own in enumerate(groups) for _ in own]
    sums, latest, part = Moments(), Moments(), dict[tuple[str, str], int]()

    def note(run: int, name: str, reader: str, inputs: Tensor, tokens: Tensor | None) -> None:
        key = name, reader
        if part.setdefault(key, group[run]) != group[run]:
            part[key] = group[run]
            _merge(sums, key, latest.pop(key))
        _add(latest, key, inputs, tokens)

    def leave(passed: Collection[str]) -> None:
        done = [key for key in latest if key[1] in passed]
        for key in done:
            _merge(sums, key, latest.pop(key))
        use({key: sums.pop(key) for key in done})

    watch_in_turn(model, units, [run for own in groups for run in own], note, leave)


class CalledAgain(ValueError):
    """A reader is called after all runs had passed the blocks that it is in."""


def watch_in_turn(
    model: nn.Module,
    units: Mapping[str, Units],
    runs: Sequence[Run],
    note: Callable[..., None],
    leave: Callable[[Collection[str]], None],
) -> None:
    """Watches the readers of units as `watch` does, while all runs go through the blocks of a model side by side.

    Args:
        model: The model; in one without blocks, runs come one after the other.
        units: The units, by place.
        runs: The batches.
        note: See `watch`.
        leave: Called after each block, and at the end, with the names of all readers that all runs have passed; it may call them.

    Raises:
        CalledAgain: If a reader is called later; then all runs must be over before anything is made of what was noted.
    """
    readers = {reader: module for one in units.values() for reader, module in reading(model, one).items()}
    ahead = {block: set(block.modules()) for block in blocks_of(model)}
    passed, leaving = set[str](), False

    def see(run: int, name: str, reader: str, inputs: Tensor, tokens: Tensor | None) -> None:
        if leaving:
            return
        if reader in passed:
            raise CalledAgain(f"model: {reader} is called again later")
        note(run, name, reader, inputs, tokens)

    def go_on(block: nn.Module) -> None:
        nonlocal leaving
        if block not in ahead:  # it was left before
            return
        inside = ahead.pop(block)
        rest = set().union(*ahead.values())
        passed.update(reader for reader, module in readers.items() if module in inside - rest)
        leaving = True
        leave(passed)
        leaving = False

    watch(model, units, runs, see, go_on)
    leave(readers.keys())


@dataclass(eq=False)
class Again(Sums):
    """Sums that do not add up: with those of other batches they are found again, of all of them.

    Attributes:
        groups: The batches, as they came.
        find: Finds the sums of groups of batches.
    """

    groups: Sequence[Sequence[Run]]
    find: Callable[[Sequence[Sequence[Run]]], Sums]

    def merge(self, other: Sums) -> None:
        """Finds the sums of these batches and the others'."""
        assert isinstance(other, Again)
        self.groups = [*self.groups, *other.groups]
        found = self.find(self.groups)
        self.totals, self.counts = found.totals, found.counts


def _add(moments: Moments, key: tuple[str, str], inputs: Tensor, tokens: Tensor | None) -> None:
    if key not in moments:
        moments[key] = InputMoments(inputs.shape[-1], inputs.device)
    fits = tokens is not None and tokens.shape == inputs.shape[:-1]
    moments[key].add(inputs, tokens.to(inputs.device) if tokens is not None and fits else None)


def _merge(moments: Moments, key: tuple[str, str], others: InputMoments) -> None:
    if key in moments:
        moments[key].merge(others)
    else:
        moments[key] = others


@dataclass(frozen=True)
class OBS(Importance):
    """How far the output of the module that reads a unit moves without it, when the columns of all other units are refitted.

    The root of the mean over tokens of min |W x - W' x|^2 over all W' that do not read the unit, which is
    tr(W_u^T W_u ([H^-1]_uu)^-1), H = sum of x x^T: the optimal brain surgeon's saliency, of a structure as in ZipLM, equation 2.
    It needs no loss and no gradient. As with `Repair`, what one kind of text shows is not what all need: the batches should be of
    several, or of what the model writes itself, too (`Calibration([..., "generated"])`).

    Costs: a forward for each batch and pass; memory for a float32 matrix `[in_features, in_features]` of each reader of a pass,
    and one in float64 of one reader; the inverse of each. With several ranks, the mean of what each finds. Where more and more
    batches are taken (`Calibration(enough=...)`), there are twice as many matrices; with several passes each step begins again.
    With `passes=1`, where matrices would take more than a quarter of the free memory, and 2 GiB, there are those of one block at
    a time: all batches go through it before the next, in one pass, and each step begins again. So do those of a model that is
    streamed, or that is sharded, in a search by `Shrink`.

    Args:
        damping: Share of the mean of H's diagonal that is added to it.
        passes: In how many passes over the batches, each for its share of the readers: the more, the less memory.

    Raises:
        ValueError: If an argument is not legal; when it runs, if nothing reads the units alone.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "channel"), bh.OBS(), [model.dummy_inputs])
        >>> [len(own) for own in scores.values()]
        [384, 384, 384, 384]
    """

    in_turn: ClassVar[bool] = True
    damping: float = 0.01
    passes: int = 1

    def __post_init__(self) -> None:
        annotated(OBS, vars(self))
        number("damping", self.damping, above=0)
        whole("passes", self.passes)

    @property
    def adds_up(self) -> bool:
        """Tells whether moments are kept, which add up: in one pass."""
        return self.passes == 1

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches; see `Importance.sums`."""
        check_read(units, type(self).__name__)
        too_many = self.adds_up and store_of(model).holds_all and bytes_of(model, units) > memory_to_hold(_device(model))
        if too_many or goes_by_blocks(model, [run.visit for run in runs]):
            find = partial(self._in_turn, model, units, per)
            return Again(**vars(find([runs])), groups=[runs], find=find)
        found = partial(self._found, model, units, per)
        if self.adds_up:
            moments = moments_of(model, units, runs)
            return _Errors(**vars(found(moments)), moments=moments, find=found)
        sums, names = Sums.zero(units, per), list(units)
        for first in range(min(self.passes, len(names))):
            sums.merge(found(moments_of(model, {name: units[name] for name in names[first :: self.passes]}, runs)))
        return sums

    def _found(self, model: nn.Module, units: Mapping[str, Units], per: Per, moments: Moments) -> Sums:
        """Finds the errors that follow from moments."""
        sums = Sums.zero(units, per)
        self._add(sums, model, units, per, moments)
        return sums

    def _in_turn(self, model: nn.Module, units: Mapping[str, Units], per: Per, groups: Sequence[Sequence[Run]]) -> Sums:
        """Finds the errors block by block; those of all where a block is called again after others, in memory."""
        sums = Sums.zero(units, per)
        with resting(model):
            try:
                moments_in_turn(model, units, groups, partial(self._add, sums, model, units, per))
            except CalledAgain as error:
                store_of(model).check_can_hold_all(str(error))
                return self._found(model, units, per, moments_over(model, units, groups))
        return sums

    def _add(self, sums: Sums, model: nn.Module, units: Mapping[str, Units], per: Per, moments: Moments) -> None:
        """Adds the errors that follow from moments."""
        for (name, reader), seen in moments.items():
            table, there = table_of(units[name], per)
            store_of(model).load(model.get_submodule(reader))
            gram = gram_of(model.get_submodule(reader), table, there, seen.in_features)
            sums.add(name, errors_without(seen.products, gram, table, there, self.damping), int(seen.tokens))

    def of_mean(self, mean: Tensor) -> Tensor:
        """Returns the scores of a place; see `Importance.of_mean`."""
        return mean.clamp(min=0).sqrt()


def _device(model: nn.Module) -> torch.device:
    return next(chain(model.parameters(), model.buffers())).device


def errors_without(products: Tensor, gram: Tensor, table: Tensor, there: Tensor, damping: float) -> Tensor:
    """Returns tr(W_u^T W_u ([H^-1]_uu)^-1) of each unit u, H = X X^T + damping * mean(diag) I: float64, `[units]`.

    Args:
        products: X X^T, `[in_features, in_features]`.
        gram: W_u^T W_u, `[units, size, size]`, zero for positions that do not exist.
        table: The positions of each unit, `[units, size]`, int64.
        there: Which of them exist, as some units may have fewer: bool.
        damping: Share of the mean of the diagonal that is added to it.
    """
    h = products.to(float64_device(products.device), torch.float64, copy=True)
    factor, failed = cholesky_(damp_(h, damping))
    if failed:
        raise ValueError(f"damping={damping} is too small for inputs so alike, or they are NaN or infinite")
    inverse = torch.cholesky_inverse(factor, out=factor)
    table, there = table.to(h.device), there.to(h.device)
    both = there[:, :, None] & there[:, None, :]
    blocks = torch.where(both, inverse[table[:, :, None], table[:, None, :]], torch.eye(table.shape[1], device=h.device))
    lost: Tensor = (gram.to(h.device).double() * torch.linalg.inv(blocks)).sum((1, 2))
    return lost


@dataclass(eq=False)
class _Errors(Sums):
    """Errors, and the moments that they follow from: these add up, and errors do not."""

    moments: Moments
    find: Callable[[Moments], Sums]

    def merge(self, other: Sums) -> None:
        """Adds the moments of other batches, and finds the errors again."""
        assert isinstance(other, _Errors)
        for key, seen in other.moments.items():
            if key in self.moments:
                self.moments[key].merge(seen)
            else:
                self.moments[key] = seen
        found = self.find(self.moments)
        self.totals, self.counts = found.totals, found.counts
