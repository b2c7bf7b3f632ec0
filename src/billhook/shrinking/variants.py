"""The variants of each place: cut to each level, with the linears that read it refitted, and what that loses.

As in ZipLM (Kurtic, Frantar & Alistarh, 2023, https://arxiv.org/abs/2302.04089) and Týr-the-Pruner (Li et al., 2025,
https://arxiv.org/abs/2503.09657), every level of every place is pruned and refitted once, on its own, and a search then puts them
together. All come from the second moments of what the linears read in the dense model.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.batches import Run, source_of
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.parts import fingerprint, identity_of, put
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
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.levels import Place, any_gone
from billhook.units.units import Units

FORMAT = 4
MEASURED = "measured.json"
UNFITTED = " unfitted"
"""Behind the name of a variant: what reads its merged heads, before it is refitted."""


class Library:
    """The variants of all places of a model, which stays as it is.

    Args:
        model: The model.
        folder: Where they are kept, a file for each; None keeps them in memory. Of a model whose blocks ranks share, each keeps
            its shards of them, in the CPU's memory.
        writers: By the name of each block that may go, the linears that write its outputs, which are zero where it has.

    Attributes:
        errors: By place and number of units kept, E |W x - W' x|^2 on batches that W' has not seen, as a share of E |W x|^2.
        measured: By place and number of units kept, the damage to the whole model, where it was measured.
        instead: By place and number of units kept, the name under which a variant is held that takes the place of its own.
    """

    def __init__(
        self, model: PreTrainedModel, folder: Path | None = None, writers: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self.model, self._folder, self._writers = model, folder, writers or {}
        self.errors: dict[tuple[str, int], float] = {}
        self.measured: dict[tuple[str, int], float] = {}
        self.instead: dict[tuple[str, int], str] = {}
        self._weights: dict[tuple[str, int], LazyTensors] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._read(folder)

    def _read(self, folder: Path) -> None:
        """Reads what an earlier search has left; damaged files are removed, and what they held is made again."""
        damaged = list[Path]()
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as stored:
                    self.errors |= _from_json(stored.metadata()["errors"])
            except (SafetensorError, OSError, ValueError, TypeError, KeyError):
                damaged.append(file)
        if (file := folder / MEASURED).exists():
            try:
                self.measured = _from_json(file.read_text())
            except (OSError, ValueError, TypeError):
                damaged.append(file)
        for file in damaged:
            place, _, kept = file.stem.rpartition(".")
            if kept.isdecimal():  # what belongs to a variant of merged heads is made with it
                self.errors.pop((place.removesuffix(UNFITTED), int(kept)), None)
            file.unlink(missing_ok=True)
        if damaged:
            names = ", ".join(file.name for file in damaged[:3]) + (f" and {len(damaged) - 3} more" if damaged[3:] else "")
            warnings.warn(f"library: {names} in '{folder}' cannot be read: what they held is made again", stacklevel=2)

    def add(self, place: str, kept: int, error: float, weights: Mapping[str, Tensor]) -> None:
        """Adds the variant of a place that keeps so many units."""
        self.errors[place, kept] = error
        if self._folder is None:
            self._weights[place, kept] = resting(self.model, weights)
            return
        tensors = {name: value.cpu() for name, value in weights.items()}
        unfinished = self._folder / f"unfinished-{os.getpid()}"
        save_file(tensors, unfinished, {"errors": _to_json({(place, kept): error})})
        put(unfinished, self._folder / f"{place}.{kept}.safetensors")

    def note(self, place: str, kept: int, damage: float) -> None:
        """Notes the damage of a variant."""
        self.measured[place, kept] = damage
        if self._folder is not None:
            unfinished = self._folder / f"unfinished-{os.getpid()}"
            unfinished.write_text(_to_json(self.measured))
            put(unfinished, self._folder / MEASURED)

    def weights(self, place: str, kept: int) -> LazyTensors:
        """Returns the parameters of a variant; none where a place keeps all, or has gone with its block."""
        if not kept:
            return zeros_of(self.model, self._writers.get(place, ()))
        place = self.instead.get((place, kept), place)
        if self._folder is None or (place, kept) not in self.errors:
            return self._weights.get((place, kept), LazyTensors({}))
        values = dict[str, Tensor]()
        for name, value in load_file(self._folder / f"{place}.{kept}.safetensors").items():
            values[name] = value.to(self.model.get_parameter(name).device)
        return LazyTensors.of(values)

    def forget(self) -> None:
        """Lets go of the variants that are in memory."""
        self._weights.clear()

    def assembled(self, kept: Mapping[str, int]) -> AbstractContextManager[None]:
        """Puts variants in the places of the model until the end of a `with` block; what a place loses is multiplied by zero.

        Args:
            kept: By place, how many units it keeps; 0 of blocks that are gone, and of places in them.
        """
        variants = LazyTensors({})
        for place, number in kept.items():
            variants |= self.weights(place, number)
        return store_of(self.model).computing_with(variants)


def resting(model: nn.Module, weights: Mapping[str, Tensor]) -> LazyTensors:
    """Returns new values of parameters, which are in memory, or of which each rank has its shards on the CPU."""
    if isinstance(weights, LazyTensors):  # which rest
        return weights
    return store_of(model).stage(None, weights, device=torch.device("cpu"))


def zeros_of(model: PreTrainedModel, linears: Sequence[str]) -> LazyTensors:
    """Returns the parameters of linears, all zero; they take no memory until they are asked for."""
    own = by_parameter({name: dict(model.get_submodule(name).named_parameters(recurse=False)) for name in linears})
    return LazyTensors({name: partial(torch.zeros_like, value.data) for name, value in own.items()})


def key_of(model: PreTrainedModel, settings: object, scores: Mapping[str, Tensor], batches: Sequence[Any]) -> str:
    """Returns a name for all that decides a library: the model and its config, settings, scores and batches."""
    of_sources = [(source_of(batch), batch) for batch in batches]
    return fingerprint(FORMAT, identity_of(model), settings, scores, of_sources)[:16]


def _to_json(values: Mapping[tuple[str, int], float]) -> str:
    return json.dumps([[place, kept, value] for (place, kept), value in values.items()])


def _from_json(text: str) -> dict[tuple[str, int], float]:
    return {(place, kept): value for place, kept, value in json.loads(text)}


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
    repair: RepairConfig | None,
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
    model, how = library.model, repair or RepairConfig()
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
