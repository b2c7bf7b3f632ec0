"""The candidates of each layer: pruned to each config, with the linears that read it refitted, and what that loses.

As in ZipLM (Kurtic, Frantar & Alistarh, 2023, https://arxiv.org/abs/2302.04089) and Týr-the-Pruner (Li et al., 2025,
https://arxiv.org/abs/2503.09657), every layer is pruned to every config and refitted once, on its own, and a search then puts
them together. All come from the second moments of what the linears read in the dense model.
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
from billhook.engine.parts import fingerprint, identity_of, replace_file
from billhook.engine.state import evaluating_without_grad
from billhook.engine.store import store_of
from billhook.importance.activations import watch
from billhook.importance.obs import RepeatedCall, watch_blockwise
from billhook.importance.score import make_run
from billhook.linalg import float64_device
from billhook.model.layers import matrix_of, to_parameters
from billhook.pruning.target import RatioSearch
from billhook.repairs.least_squares import bias_shift, choose_ridge, errors_without_refit, residual_error, solve_ridge
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import Fold, ResidualStatistics, check_tokens, make_folds
from billhook.shrinking.layers import Layer, any_removed, removed_units
from billhook.units.units import Units

FORMAT = 4
MEASURED = "measured.json"
UNFITTED = " unfitted"
"""Behind the name of a candidate: what reads its merged heads, before it is refitted."""


class CandidateCache:
    """The candidates of all layers of a model, which stays as it is.

    Args:
        model: The model.
        folder: Where they are kept, a file for each; None keeps them in memory. Of a model whose blocks ranks share, each keeps
            its shards of them, in the CPU's memory.
        writers: By the name of each block that may go, the linears that write its outputs, which are zero where it has.

    Attributes:
        errors: By layer and number of units kept, E |W x - W' x|^2 on batches that W' has not seen, as a share of E |W x|^2.
        measured: By layer and number of units kept, what the whole model loses, where it was measured.
        instead: By layer and number of units kept, the name of another candidate that takes the place of the layer's own.
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
            layer, _, kept = file.stem.rpartition(".")
            if kept.isdecimal():  # what belongs to a candidate of merged heads is made with it
                self.errors.pop((layer.removesuffix(UNFITTED), int(kept)), None)
            file.unlink(missing_ok=True)
        if damaged:
            names = ", ".join(file.name for file in damaged[:3]) + (f" and {len(damaged) - 3} more" if damaged[3:] else "")
            warnings.warn(f"library: {names} in '{folder}' cannot be read: what they held is made again", stacklevel=2)

    def add(self, layer: str, kept: int, error: float, weights: Mapping[str, Tensor]) -> None:
        """Adds the candidate of a layer that keeps so many units."""
        self.errors[layer, kept] = error
        if self._folder is None:
            self._weights[layer, kept] = resting(self.model, weights)
            return
        tensors = {name: value.cpu() for name, value in weights.items()}
        unfinished = self._folder / f"unfinished-{os.getpid()}"
        save_file(tensors, unfinished, {"errors": _to_json({(layer, kept): error})})
        replace_file(unfinished, self._folder / f"{layer}.{kept}.safetensors")

    def lost(self, layer: str, kept: int, measure: Callable[[Collection[str]], float]) -> float:
        """Returns what the whole model loses by a candidate, or without a block (0), all else dense; measures it once.

        Args:
            layer: The name of a layer, or of a block.
            kept: How many units it keeps.
            measure: Measures the model as it is then, given the names of the parameters that are not the dense model's.
        """
        if (layer, kept) not in self.measured:
            with self.assembled({layer: kept}):
                self.measured[layer, kept] = max(measure(self.weights(layer, kept)), 0.0)
            if self._folder is not None:
                unfinished = self._folder / f"unfinished-{os.getpid()}"
                unfinished.write_text(_to_json(self.measured))
                replace_file(unfinished, self._folder / MEASURED)
        return self.measured[layer, kept]

    def weights(self, layer: str, kept: int) -> LazyTensors:
        """Returns the parameters of a candidate; none where a layer keeps all, or has gone with its block."""
        if not kept:
            return zeroed(self.model, self._writers.get(layer, ()))
        layer = self.instead.get((layer, kept), layer)
        if self._folder is None or (layer, kept) not in self.errors:
            return self._weights.get((layer, kept), LazyTensors({}))
        tensors = load_file(self._folder / f"{layer}.{kept}.safetensors")
        return LazyTensors.of({name: value.to(self.model.get_parameter(name).device) for name, value in tensors.items()})

    def forget(self) -> None:
        """Lets go of the candidates that are in memory."""
        self._weights.clear()

    def assembled(self, kept: Mapping[str, int]) -> AbstractContextManager[None]:
        """Puts candidates in the layers of the model until the end of a `with` block; what a layer loses is multiplied by zero.

        Args:
            kept: By layer, how many units it keeps; 0 of blocks that are gone, and of layers in them.
        """
        values = LazyTensors({})
        for layer, number in kept.items():
            values |= self.weights(layer, number)
        return store_of(self.model).computing_with(values)


def resting(model: nn.Module, weights: Mapping[str, Tensor]) -> LazyTensors:
    """Returns new values of parameters, which are in memory, or of which each rank has its shards on the CPU."""
    if isinstance(weights, LazyTensors):  # which rest
        return weights
    return store_of(model).stage(None, weights, device=torch.device("cpu"))


def zeroed(model: PreTrainedModel, linears: Sequence[str]) -> LazyTensors:
    """Returns the parameters of linears, all zero; they take no memory until they are asked for."""
    values = by_parameter({name: dict(model.get_submodule(name).named_parameters(recurse=False)) for name in linears})
    return LazyTensors({name: partial(torch.zeros_like, value.data) for name, value in values.items()})


def key_of(model: PreTrainedModel, settings: object, scores: Mapping[str, Tensor], batches: Sequence[Any]) -> str:
    """Returns a name for all that decides what a cache holds: the model and its config, settings, scores and batches."""
    of_sources = [(source_of(batch), batch) for batch in batches]
    return fingerprint(FORMAT, identity_of(model), settings, scores, of_sources)[:16]


def _to_json(values: Mapping[tuple[str, int], float]) -> str:
    return json.dumps([[layer, kept, value] for (layer, kept), value in values.items()])


def _from_json(text: str) -> dict[tuple[str, int], float]:
    return {(layer, kept): value for layer, kept, value in json.loads(text)}


def fill_cache(
    cache: CandidateCache,
    layers: Sequence[Layer],
    units: Mapping[str, Units],
    scores: Mapping[str, Tensor],
    runs: Sequence[Run],
    repair: RepairConfig | None,
    done: Callable[[], None],
) -> None:
    """Cuts and refits each layer to each of its configs, except where a cache holds that already.

    All batches go through the model once, side by side; memory holds the moments of one block at a time. Where a block is called
    again after others, which is only seen then, they go through it once more, and the moments of all layers are held.

    Args:
        cache: Where the candidates go.
        layers: The layers.
        units: Their units.
        scores: The scores of these: the lowest go.
        runs: Batches, two at least; each source is held out in turn, or some batches where there is one source.
        repair: How linears are refitted, by its ridges and held-out share; None: not at all.
        done: Called after each layer.
    """
    model, how = cache.model, repair or RepairConfig()
    parts, held_out = how.parts([run.source for run in runs])
    missing = {layer: [n for n in layer.configs if n < layer.count and (layer.name, n) not in cache.errors] for layer in layers}
    waiting = [layer for layer in layers if missing[layer]]
    watched = {name: units[name] for layer in waiting for name in layer.names}
    moments: dict[str, list[ResidualStatistics]] = {}  # by linear, of each part of the batches

    def note(run: int, _: str, linear: str, inputs: Tensor, tokens: Tensor | None) -> None:
        if linear not in moments:
            moments[linear] = [ResidualStatistics(1, inputs.shape[-1], inputs.device) for _ in range(max(parts) + 1)]
        fits = tokens is not None and tokens.shape == inputs.shape[:-1]
        moments[linear][parts[run]].add(inputs, keep=tokens if fits else None)

    def make(passed: Collection[str]) -> None:
        for layer in list(waiting):
            linears = list(dict.fromkeys(reader for name in layer.names for reader in units[name].readers))
            if not all(name in passed for name in linears):
                continue
            waiting.remove(layer)
            readers = {name: Reader(model, name, moments.pop(name, ()), held_out) for name in linears}
            _add_candidates(cache, layer, missing[layer], units, scores, readers, how.ridges if repair else ())
            del readers  # before those of the next layer are there
            done()

    with evaluating_without_grad(model):
        try:
            watch_blockwise(model, watched, runs, note, make)
        except RepeatedCall:
            moments.clear()
            waiting[:] = [layer for layer in layers if missing[layer]]
            watch(model, watched, runs, note)
        make({reader for one in watched.values() for reader in one.readers})


def _add_candidates(
    cache: CandidateCache,
    layer: Layer,
    configs: Sequence[int],
    units: Mapping[str, Units],
    scores: Mapping[str, Tensor],
    readers: Mapping[str, "Reader"],
    ridges: Sequence[float],
) -> None:
    """Adds the candidates of a layer at some configs to a cache; ridges are chosen at the middle one of its grid."""
    grid = layer.grid()
    middle = keeping(layer, units, removed_units(layer, units, scores, grid[len(grid) // 2]))
    for name, keep in middle.items():
        readers[name].choose(keep, ridges)
    total = max(sum(reader.total for reader in readers.values()), torch.finfo(torch.float64).tiny)
    for kept in configs:
        keeps = keeping(layer, units, removed_units(layer, units, scores, kept))
        refitted = {name: readers[name].refitted(keep) for name, keep in keeps.items()}
        error = sum(error for error, _ in refitted.values())
        cache.add(layer.name, kept, error / total, by_parameter({name: new for name, (_, new) in refitted.items()}))
        del refitted


def check_enough(search: RatioSearch, layers: Sequence[Layer], batches: Sequence[Any]) -> None:
    """Refuses batches, as a repair would, with too few tokens for a refit of any layer that is cut to its largest config.

    Args:
        search: The model, and its units.
        layers: The layers that may keep less.
        batches: All batches that something is fitted to.
    """
    model, needed = search.model, tokens_needed(search, layers)
    units = {name: search.units[name] for layer in layers for name in layer.names}
    with evaluating_without_grad(model):
        linears = {name: model.get_submodule(name) for name in needed}
        check_tokens(linears, needed, [make_run(model, units, batch) for batch in batches])


def tokens_needed(search: RatioSearch, layers: Sequence[Layer]) -> dict[str, int]:
    """Returns how many tokens the refit of each linear takes at most: its inputs at the largest config that cuts."""
    needed = dict[str, int]()
    for layer in layers:
        keeps = keeping(layer, search.units, any_removed(layer, search.units, layer.grid()[1]))
        needed |= {name: int(keep.sum()) for name, keep in keeps.items()}
    return needed


def keeping(layer: Layer, units: Mapping[str, Units], removed: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Returns by linear which of its inputs are kept, bool, `[in_features]`."""
    return {
        reader: torch.from_numpy(~np.isin(units[name].index, list(removed.get(name, ()))))
        for name in layer.names
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

    def __init__(self, model: PreTrainedModel, name: str, parts: Sequence[ResidualStatistics], held_out: Sequence[int]) -> None:
        _check(name, parts)
        self.model, self.linear, self._ridge = model, model.get_submodule(name), math.inf
        self._parts, self._held_out = parts, held_out
        weight, bias = self._matrix()
        self._centred = bias is not None
        _, folds = self._without(torch.zeros(weight.shape[1], dtype=torch.bool))
        self.total = float(errors_without_refit(folds, self._centred).sum())

    def choose(self, keep: Tensor, ridges: Sequence[float]) -> None:
        """Chooses the ridge that does best on what is held out; with none to choose from, it is not refitted."""
        _, folds = self._without(keep)
        self._ridge = choose_ridge(folds, self._centred, ridges)

    def refitted(self, keep: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Returns E |W x - W' x|^2 of what is held out, W' fitted to the rest, and parameters that are fitted to all batches.

        Where a bias makes up for means, the error is about those.
        """
        parts, folds = self._without(keep)
        error = float(sum(residual_error(self._change(fit), fit, held_out, self._centred) for fit, held_out in folds))
        weight, bias = self._matrix()
        change = self._change(parts)
        if bias is not None and self._ridge < math.inf:
            bias = bias.double() + bias_shift(change, parts)
        keep = keep.to(weight.device)
        new = torch.zeros_like(weight, dtype=torch.float64)
        new[:, keep] = change + weight[:, keep]
        return error, to_parameters(self.linear, new, bias)

    def _without(self, keep: Tensor) -> tuple[list[ResidualStatistics], list[Fold]]:
        """Returns moments of the inputs that are kept, by part of the batches, and which of these are held out in turn."""
        weight, _ = self._matrix()
        parts = [part.after_removal(weight, keep.to(weight.device)) for part in self._parts]
        return parts, make_folds(parts, self._held_out)

    def _change(self, parts: Sequence[ResidualStatistics]) -> Tensor:
        """Returns what is added to the weight; nothing, where the ridge is too small for a solution."""
        change = solve_ridge(parts, self._centred, self._ridge)
        return torch.where(change.isnan().any(), 0, change)

    def _matrix(self) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and the bias, where moments are, once the linear's block is there."""
        store_of(self.model).load(self.linear)
        weight, bias = matrix_of(self.linear)
        device = float64_device(weight.device)  # the CPU where the device has no float64
        return weight.to(device), None if bias is None else bias.to(device)


def _check(name: str, parts: Sequence[ResidualStatistics]) -> None:
    """Refuses inputs that are not finite, and linears that have read nothing."""
    if not sum(float(part.tokens) for part in parts):
        raise ValueError(f"batches: {name} has read no token that counts")
    bad = sum(int((~part.products.diagonal().isfinite()).sum()) for part in parts)
    if bad:
        raise ValueError(f"{name}: NaN or infinite inputs in {bad} features")
