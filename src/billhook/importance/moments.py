"""Second moments of what modules read that read units: of all at once, or block by block where these come and go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from billhook.importance.activations import watch
from billhook.importance.base import Sums
from billhook.importance.probes import reading
from billhook.running.batches import Run
from billhook.running.sharded.passes import passing
from billhook.running.sharded.turns import turns_of
from billhook.running.statistics import InputMoments
from billhook.running.undisturbed import resting
from billhook.streaming.stream import stream_of
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
    with resting(model):
        for runs in groups:
            for key, others in moments_of(model, units, runs).items():
                _merge(moments, key, others)
    return moments


def shares_of(model: nn.Module, units: Mapping[str, Units], most: int) -> list[dict[str, Units]]:
    """Divides places into shares whose moments take at most so many bytes, with those of other batches to be added to them."""
    shares, used = [dict[str, Units]()], 0
    for name, one in units.items():
        size = 8 * sum(len(one.index) ** 2 for _ in reading(model, one))
        if shares[-1] and used + size > most:
            shares.append({})
            used = 0
        shares[-1][name] = one
        used += size
    return shares


def moments_in_turn(
    model: nn.Module, units: Mapping[str, Units], groups: Sequence[Sequence[Run]], use: Callable[[Moments], None]
) -> None:
    """Gathers the moments of a model whose blocks come and go; those of each are used and dropped when all runs have passed it.

    Those of groups of runs are gathered apart and added up in order, as where they are kept and merged.
    """
    group = [number for number, own in enumerate(groups) for _ in own]
    sums, latest, part = Moments(), Moments(), dict[tuple[str, str], int]()
    left, using = set[tuple[str, str]](), False

    def note(run: int, name: str, reader: str, inputs: Tensor, tokens: Tensor | None) -> None:
        key = name, reader
        if using:  # it may call readers itself
            return
        if key in left:
            raise ValueError(f"model: {reader} is called again later, and is streamed: score it in memory")
        if part.setdefault(key, group[run]) != group[run]:
            part[key] = group[run]
            _merge(sums, key, latest.pop(key))
        _add(latest, key, inputs, tokens)

    def leave(block: nn.Module) -> None:
        nonlocal using
        inside = set(block.modules())
        done = [key for key in latest if model.get_submodule(key[1]) in inside]
        for key in done:
            _merge(sums, key, latest.pop(key))
        left.update(done)
        using = True
        use({key: sums.pop(key) for key in done})
        using = False

    watch(model, units, [run for own in groups for run in own], note, leave, turns_of(model))
    leave(model)  # with what is in no block


@torch.no_grad()
def comes_in_turn(model: nn.Module, runs: Sequence[Run]) -> bool:
    """Tells whether all runs can go through the blocks of a model side by side, as they come and go and are called one by one."""
    turns = turns_of(model)
    if turns is None or not turns.alike or not runs:
        return stream_of(model) is not None
    with passing(turns, model) as passed:
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
