"""The variants of each place: cut to each level, with the linears that read it refitted, and what that loses.

As in ZipLM (Kurtic, Frantar & Alistarh, 2023, https://arxiv.org/abs/2302.04089) and Týr-the-Pruner (Li et al., 2025,
https://arxiv.org/abs/2503.09657), every level of every place is pruned and refitted once, on its own, and a search then puts them
together. All come from the second moments of what the linears read in the dense model.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.engine.batches import Run
from billhook.engine.lazy import by_parameter
from billhook.engine.state import undisturbed
from billhook.engine.store import store_of
from billhook.importance.activations import watch
from billhook.importance.obs import CalledAgain, watch_in_turn
from billhook.importance.score import run_of
from billhook.linalg import float64_device
from billhook.model.linears import as_it_lies, matrix_of
from billhook.pruning.target import Search
from billhook.repairs.least_squares import bias_shift, choose_ridge, error_left, errors_without, solve_ridge
from billhook.repairs.moments import Fold, OwedMoments, check_tokens, folds_of
from billhook.repairs.repair import Repair
from billhook.shrinking.levels import Place, any_gone
from billhook.shrinking.library import Library
from billhook.units.units import Units

Moments = dict[str, list[OwedMoments]]
"""By linear, the moments of its inputs of each part of the batches."""
Gone = Callable[[Place, int], Mapping[str, list[int]]]
"""Says which units go, by place, where one keeps so many."""


def fill_library(
    library: Library,
    places: Sequence[Place],
    levels: Mapping[str, Sequence[int]],
    units: Mapping[str, Units],
    gone: Gone,
    runs: Sequence[Run],
    repair: Repair | None,
    done: Callable[[], None],
) -> None:
    """Cuts and refits each place to each of its levels, except where a library holds that already.

    All batches go through the model once, side by side; memory holds the moments of one block at a time. Where a block is called
    again after others, which is only seen then, they go through it once more, and the moments of all places are held.

    Args:
        library: Where the variants go.
        places: The places.
        levels: By place, how many units to keep.
        units: Their units.
        gone: Which units go.
        runs: Batches, two at least; each source is held out in turn, or some batches where there is one source.
        repair: How linears are refitted, by its ridges and held-out share; None: not at all.
        done: Called after each place.
    """
    model, how = library.model, repair or Repair()
    missing = {p.name: [one for one in levels[p.name] if one < p.count and (p.name, one) not in library.errors] for p in places}
    places = [place for place in places if missing[place.name]]
    parts, held_out = how.parts([run.source for run in runs])
    own, waiting = {name: units[name] for place in places for name in place.names}, list(places)
    moments: Moments = {}

    def note(run: int, _: str, reader: str, inputs: Tensor, tokens: Tensor | None) -> None:
        if reader not in moments:
            moments[reader] = [OwedMoments(1, inputs.shape[-1], inputs.device) for _ in range(max(parts) + 1)]
        fits = tokens is not None and tokens.shape == inputs.shape[:-1]
        moments[reader][parts[run]].add(inputs, keep=tokens if fits else None)

    def make(passed: Collection[str]) -> None:
        for place in [one for one in waiting if all(name in passed for name in _linears(one, units))]:
            waiting.remove(place)
            readers = {name: Reader(model, name, moments.pop(name, ()), held_out) for name in _linears(place, units)}
            _add_variants(library, place, missing[place.name], units, gone, readers, how.ridges if repair else ())
            del readers  # before those of the next place are there
            done()

    with undisturbed(model):
        try:
            watch_in_turn(model, own, runs, note, make)
        except CalledAgain:
            moments.clear()
            waiting[:] = places
            watch(model, own, runs, note)
        make({name for place in waiting for name in _linears(place, units)})


def _add_variants(
    library: Library,
    place: Place,
    levels: Sequence[int],
    units: Mapping[str, Units],
    gone: Gone,
    readers: Mapping[str, "Reader"],
    ridges: Sequence[float],
) -> None:
    """Adds the variants of a place at some levels to a library."""
    at = {kept: keeping(place, units, gone(place, kept)) for kept in (_middle(place), *levels)}
    for name, keep in at[_middle(place)].items():
        readers[name].choose(keep, ridges)
    whole = max(sum(reader.whole for reader in readers.values()), torch.finfo(torch.float64).tiny)
    for kept in levels:
        found = {name: readers[name].refitted(keep) for name, keep in at[kept].items()}
        lost = sum(error for error, _ in found.values())
        library.add(place.name, kept, lost / whole, by_parameter({name: new for name, (_, new) in found.items()}))
        del found


def _middle(place: Place) -> int:
    """Returns the level that ridges are chosen at."""
    return place.levels()[len(place.levels()) // 2]


def check_enough(search: Search, places: Sequence[Place], batches: Sequence[Any]) -> None:
    """Refuses batches, as a repair would, with too few tokens for a refit of any place that is cut to its highest level.

    Args:
        search: The model, and its units.
        places: The places that may keep less.
        batches: All batches that something is fitted to.
    """
    model, units, needed = search.model, search.units, tokens_needed(search, places)
    own = {name: units[name] for place in places for name in place.names}
    with undisturbed(model):
        linears = {name: model.get_submodule(name) for name in needed}
        check_tokens(linears, needed, [run_of(model, own, batch) for batch in batches])


def tokens_needed(search: Search, places: Sequence[Place]) -> dict[str, int]:
    """Returns how many tokens the refit of each linear takes at most: as many as it has inputs at the highest level that cuts."""
    units = search.units
    highest = [keeping(place, units, any_gone(place, units, place.levels()[1])) for place in places if len(place.levels()) > 1]
    return {name: int(keep.sum()) for one in highest for name, keep in one.items()}


def keeping(place: Place, units: Mapping[str, Units], gone: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Returns by linear which of its inputs are kept, bool, `[in_features]`."""
    return {
        reader: torch.from_numpy(~np.isin(units[name].index, list(gone.get(name, ()))))
        for name in place.names
        for reader in units[name].readers
    }


class Reader:
    """A linear that reads units, with the second moments of its inputs; it is refitted to do without some.

    Args:
        model: The model.
        name: The linear's name.
        parts: The moments of its inputs, of each part of the batches.
        held_out: The parts that are held out in turn.
    """

    def __init__(self, model: PreTrainedModel, name: str, parts: Sequence[OwedMoments], held_out: Sequence[int]) -> None:
        _check(name, parts)
        self.model, self.linear, self._ridge = model, model.get_submodule(name), math.inf
        self._parts, self._held_out = parts, held_out
        weight, bias = self._matrix()
        self._centred = bias is not None
        _, folds = self._without(torch.zeros(weight.shape[1], dtype=torch.bool))
        self.whole = float(errors_without(folds, self._centred).sum())

    def choose(self, keep: Tensor, ridges: Sequence[float]) -> None:
        """Chooses the ridge that does best on what is held out; with none to choose from, it is not refitted."""
        _, folds = self._without(keep)
        self._ridge = choose_ridge(folds, self._centred, ridges)

    def refitted(self, keep: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Returns E |W x - W' x|^2 of what is held out, W' fitted to the rest, and parameters that are fitted to all batches.

        Where a bias makes up for means, the error is about those.
        """
        parts, folds = self._without(keep)
        error = float(sum(error_left(self._more(fit), fit, held_out, self._centred) for fit, held_out in folds))
        weight, bias = self._matrix()
        more = self._more(parts)
        if bias is not None and self._ridge < math.inf:
            bias = bias.double() + bias_shift(more, parts)
        new = torch.zeros_like(weight, dtype=torch.float64)
        new[:, keep.to(weight.device)] = more + weight[:, keep.to(weight.device)]
        return error, as_it_lies(self.linear, new, bias)

    def _without(self, keep: Tensor) -> tuple[list[OwedMoments], list[Fold]]:
        """Returns moments of the inputs that are kept, by part of the batches, and which of these are held out in turn."""
        weight, _ = self._matrix()
        parts = [part.without(weight, keep.to(weight.device)) for part in self._parts]
        return parts, folds_of(parts, self._held_out)

    def _more(self, parts: Sequence[OwedMoments]) -> Tensor:
        """Returns what is added to the weight; nothing, where the ridge is too small for a solution."""
        more = solve_ridge(parts, self._centred, self._ridge)
        return torch.where(more.isnan().any(), 0, more)

    def _matrix(self) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and the bias, where moments are, once the linear's block is there."""
        store_of(self.model).load(self.linear)
        weight, bias = matrix_of(self.linear)
        device = float64_device(weight.device)
        return weight.to(device), None if bias is None else bias.to(device)


def _linears(place: Place, units: Mapping[str, Units]) -> list[str]:
    return list(dict.fromkeys(reader for name in place.names for reader in units[name].readers))


def _check(name: str, parts: Sequence[OwedMoments]) -> None:
    """Refuses inputs that are not finite, and linears that have read nothing."""
    if not sum(float(part.tokens) for part in parts):
        raise ValueError(f"batches: {name} has read no token that counts")
    bad = sum(int((~part.products.diagonal().isfinite()).sum()) for part in parts)
    if bad:
        raise ValueError(f"{name}: NaN or infinite inputs in {bad} features")
