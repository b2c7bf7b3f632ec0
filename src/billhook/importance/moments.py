"""Second moments of what modules read that read units: of all at once, or block by block."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from billhook.engine.batches import Run
from billhook.engine.passes import passing
from billhook.engine.statistics import InputMoments
from billhook.engine.store import store_of
from billhook.engine.walk import blocks_of
from billhook.importance.activations import watch
from billhook.importance.base import Sums
from billhook.importance.probes import reading
from billhook.units.units import Units

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
            raise CalledAgain(f"model: {reader} is called again later, and is streamed: score it in memory")
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


@torch.no_grad()
def comes_in_turn(model: nn.Module, runs: Sequence[Run]) -> bool:
    """Tells whether all runs can go through the blocks of a model side by side, as they come and go and are called one by one."""
    store = store_of(model)
    if not store.on_ranks or not store.alike or not runs:
        return store.in_files
    with passing(store, model) as passed:
        runs[0].visit()
    return passed.orderly


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
