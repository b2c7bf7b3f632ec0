"""The variants of each module: pruned to each level, with refitted consumer layers.

As in ZipLM (Kurtic, Frantar & Alistarh, 2023, https://arxiv.org/abs/2302.04089) and Týr-the-Pruner (Li et al., 2025,
https://arxiv.org/abs/2503.09657), every module is pruned to every level and refitted once, independently; a search then combines
them. All fits use the Gram matrices of the consumer layers' inputs in the dense model.
"""

import json
import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from billhook.engine import (
    LazyTensors,
    Run,
    by_parameter,
    evaluating_without_grad,
    fingerprint,
    identity_of,
    replace_file,
    source_of,
    store_of,
)
from billhook.importance.obs import watch_blockwise
from billhook.importance.score import make_run
from billhook.linalg import IndicesByModule, TensorDict, TensorsByName, float64_device
from billhook.model import ExpertLinear, holder_of, matrix_of, to_parameters
from billhook.pruning.block_plan import zero_weights
from billhook.pruning.cut import of_ranks
from billhook.pruning.target import RatioSearch
from billhook.repairs.least_squares import bias_shift, choose_ridge, error_without_refit, residual_error, solve_ridge
from billhook.repairs.repair import RepairConfig
from billhook.repairs.residuals import ResidualStatistics, check_tokens
from billhook.shrinking.divergence import Divergence
from billhook.shrinking.modules import PrunableModule, PrunableModules, any_removed, consumers_of, removed_units, units_by_name
from billhook.shrinking.scope import Progress
from billhook.units import UnitNumbers, UnitsByModule

FORMAT = 4
MEASURED = "measured.json"
ByVariant = dict[tuple[str, int], float]
"""Values by module and number of kept units."""


@dataclass(eq=False)
class VariantCache:
    """The variants of all modules of a model, which itself stays unchanged.

    Args:
        model: The model.
        folder: Folder for the variants, one file each; None keeps them in memory. If the model is sharded, each rank keeps its
            shards in CPU memory.
        writers: By name of each removable block, the linear layers that write its output, which are zero if it is removed.

    Attributes:
        errors: By module and number of kept units, E |W x - W' x|^2 on batches that W' was not fitted to, relative to E |W x|^2.
        measured: By module and number of kept units, the measured loss of the whole model.
    """

    model: PreTrainedModel
    folder: Path | None
    writers: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        folder = self.folder
        self.errors: ByVariant = {}
        self.measured: ByVariant = {}
        self._weights: dict[tuple[str, int], LazyTensors] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        damaged = []  # files of an earlier search that are removed and recomputed
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
            module, _, kept = file.stem.rpartition(".")
            if kept.isdecimal():
                self.errors.pop((module, int(kept)), None)
            file.unlink(missing_ok=True)
        if damaged:
            names = ", ".join(file.name for file in damaged[:3]) + (f" and {len(damaged) - 3} more" if damaged[3:] else "")
            warnings.warn(f"variant_cache: cannot read {names} in '{folder}'. What they held is recomputed.", stacklevel=2)

    def add(self, module: str, kept: int, error: float, weights: TensorsByName) -> None:
        """Adds a variant."""
        self.errors[module, kept] = error
        if self.folder is None:
            self._weights[module, kept] = store_of(self.model).stage(None, weights, device=torch.device("cpu"))
            return
        tensors = {name: value.cpu() for name, value in weights.items()}
        unfinished = self.folder / f"unfinished-{os.getpid()}"
        save_file(tensors, unfinished, {"errors": _to_json({(module, kept): error})})
        replace_file(unfinished, self.folder / f"{module}.{kept}.safetensors")

    def lost(self, module: str, kept: int, divergence: Divergence) -> float:
        """Returns the measured loss of a variant, or of removing a block (0), with all else dense.

        Args:
            module: Name of a module, or of a block.
            kept: Number of kept units.
            divergence: Measures the model.
        """
        if (module, kept) not in self.measured:
            with self.assembled({module: kept}):
                self.measured[module, kept] = max(divergence.mean(self.weights(module, kept)), 0.0)
            if self.folder is not None:
                unfinished = self.folder / f"unfinished-{os.getpid()}"
                unfinished.write_text(_to_json(self.measured))
                replace_file(unfinished, self.folder / MEASURED)
        return self.measured[module, kept]

    def weights(self, module: str, kept: int) -> LazyTensors:
        """Returns the parameters of a variant; empty if the module keeps all units."""
        if not kept:
            return zero_weights(self.model, self.writers.get(module, ()))
        if self.folder is None or (module, kept) not in self.errors:
            return self._weights.get((module, kept), LazyTensors({}))
        tensors = load_file(self.folder / f"{module}.{kept}.safetensors")
        return LazyTensors.of({name: value.to(self.model.get_parameter(name).device) for name, value in tensors.items()})

    def forget(self) -> None:
        """Drops the variants in memory."""
        self._weights.clear()

    def assembled(self, kept: Mapping[str, int]) -> AbstractContextManager[None]:
        """Runs the model with the given variants within a `with` block; removed units are zeroed.

        Args:
            kept: Number of kept units by module; 0 for removed blocks and the modules inside.
        """
        values = LazyTensors({})
        for module, number in kept.items():
            values |= self.weights(module, number)
        return store_of(self.model).computing_with(values)


def cache_key(model: PreTrainedModel, settings: object, scores: TensorsByName, batches: Sequence[Any]) -> str:
    """Returns a hash of model, config, settings, scores, and batches."""
    of_sources = [(source_of(batch), batch) for batch in batches]
    return fingerprint(FORMAT, identity_of(model), settings, scores, of_sources)[:16]


def _to_json(values: ByVariant) -> str:
    return json.dumps([[module, kept, value] for (module, kept), value in values.items()])


def _from_json(text: str) -> ByVariant:
    return {(module, kept): value for module, kept, value in json.loads(text)}


def fill_cache(
    cache: VariantCache,
    modules: PrunableModules,
    units: UnitsByModule,
    scores: TensorsByName,
    orders: IndicesByModule,
    runs: Sequence[Run],
    repair: RepairConfig | None,
    progress: Progress,
) -> None:
    """Prunes and refits each module at each of its levels, except for cached variants.

    All batches pass through the model once, side by side, and memory holds the Gram matrices of one block at a time. If a block
    turns out to be called again after others, the pass is repeated with the Gram matrices of all modules in memory.

    Args:
        cache: Receives the variants.
        modules: The modules.
        units: Their units.
        scores: Scores of the units; the lowest are removed.
        orders: Channels of each expert by rank, of modules whose scores are those of ranks. The model is within `expert_layers`.
        runs: Batches, at least two, some of which are held out.
        repair: Ridge penalties and held-out fraction of the refits; None keeps the old weights.
        progress: Counts the modules.
    """
    model, parts = cache.model, (repair or RepairConfig()).parts(len(runs))
    missing = {}
    for module in modules:
        levels = [kept for kept in module.levels if kept < module.count and (module.name, kept) not in cache.errors]
        if levels:
            missing[module] = levels
    waiting, watched = list(missing), units_by_name(missing, units)
    moments = {}  # by consumer layer, one for each part of the batches

    def note(run: int, _: str, linear: str, inputs: Tensor, tokens: Tensor | None) -> None:
        if linear not in moments:
            moments[linear] = [ResidualStatistics(1, inputs.shape[-1], inputs.device) for _ in range(2)]
        fits = tokens is not None and tokens.shape == inputs.shape[:-1]
        moments[linear][parts[run]].add(inputs, keep=tokens if fits else None)

    def make(passed: Collection[str]) -> None:
        for module in list(waiting):
            linears = consumers_of(module, units)
            if not set(linears) <= set(passed):
                continue
            waiting.remove(module)
            refits = {name: ConsumerRefit(model, name, moments.pop(name, ())) for name in linears}
            grid = module.grid()  # ridge penalties are chosen at the middle level
            middle = kept_inputs(module, units, removed_units(module, units, scores, grid[len(grid) // 2]), orders)
            for name, refit in refits.items():
                refit.choose(middle[name], repair.ridges if repair else ())
            total = max(sum(refit.total for refit in refits.values()), torch.finfo(torch.float64).tiny)
            for kept in missing[module]:
                error, weights = 0.0, TensorDict()
                for name, keep in kept_inputs(module, units, removed_units(module, units, scores, kept), orders).items():
                    of_layer, new = refits[name].refitted(keep)
                    error += of_layer
                    layer = refits[name].linear
                    if not isinstance(layer, ExpertLinear):
                        weights |= by_parameter({name: new})
                        continue
                    if (stack := layer.stacked(name)) not in weights:
                        weights[stack] = getattr(*holder_of(layer)).detach().clone()
                    layer.of_stack(weights[stack]).copy_(new["weight"])
                cache.add(module.name, kept, error / total, weights)
                del weights
            del refits  # before the Gram matrices of the next module exist
            progress.advance()

    def restart(_: str) -> None:
        moments.clear()
        waiting[:] = missing

    with evaluating_without_grad(model):
        watch_blockwise(model, watched, runs, note, make, restart)
        make({consumer for module in modules for consumer in consumers_of(module, units)})


def check_token_count(search: RatioSearch, modules: PrunableModules, batches: Sequence[Any]) -> None:
    """Raises an error if there are too few tokens for refits at the highest pruned level.

    Args:
        search: The model, its units, and their costs.
        modules: The modules that may keep fewer units.
        batches: All batches for fitting.
    """
    model, needed, units = search.model, tokens_needed(search, modules), units_by_name(modules, search.units)
    units = {name: layer for name, layer in units.items() if not layer.of_experts}
    if not needed:
        return
    with evaluating_without_grad(model):
        linears = {name: model.get_submodule(name) for name in needed}
        check_tokens(linears, needed, [make_run(model, units, batch) for batch in batches])


def tokens_needed(search: RatioSearch, modules: PrunableModules) -> dict[str, int]:
    """Returns the tokens that each consumer's refit needs: its inputs at the top level.

    Experts are left out, as their refits stay near the old weights if they receive few tokens.
    """
    needed = dict[str, int]()
    for module in modules:
        if any(search.units[name].of_experts for name in module.names):
            continue
        keeps = kept_inputs(module, search.units, any_removed(module, search.units, module.grid()[1]))
        needed |= {name: int(keep.sum()) for name, keep in keeps.items()}
    return needed


def kept_inputs(
    module: PrunableModule,
    units: UnitsByModule,
    removed: UnitNumbers,
    orders: IndicesByModule | None = None,
) -> TensorDict:
    """Returns a mask of the kept inputs of each consumer layer, bool, `[in_features]`."""
    kept = {}
    for name in module.names:
        by_expert = of_ranks(orders or {}, removed).get(name)
        for number, reader in enumerate(units[name].readers):
            lost = list(removed.get(name, ())) if by_expert is None else by_expert[number]
            kept[reader] = torch.from_numpy(~np.isin(units[name].index, lost))
    return kept


class ConsumerRefit:
    """Refits a consumer layer without some of its inputs.

    A matrix of an expert without tokens to fit to, or held-out tokens, keeps its weights.

    Args:
        model: The model.
        name: Name of the linear layer.
        parts: Gram matrices of its inputs: of the batches to fit to, and of those that are held out.
    """

    def __init__(self, model: PreTrainedModel, name: str, parts: Sequence[ResidualStatistics]) -> None:
        self.model, self.linear, self._ridge = model, model.get_submodule(name), math.inf
        tokens, is_expert = [float(part.tokens) for part in parts], isinstance(self.linear, ExpertLinear)
        if not is_expert and not sum(tokens):
            raise ValueError(f"batches: {name} received no non-padding token")
        bad = sum(int((~part.products.diagonal().isfinite()).sum()) for part in parts)
        if bad:
            raise ValueError(f"batches: {bad} input features of {name} are NaN or infinite")
        self._parts = () if is_expert and not all(tokens) else parts
        weight, bias = self._matrix()
        self._centred = bias is not None and not is_expert  # whose inputs are scaled by gates
        nothing = self._without(torch.zeros(weight.shape[1], dtype=torch.bool))
        self.total = float(error_without_refit(nothing, self._centred)) if nothing else 0.0

    def choose(self, keep: Tensor, ridges: Sequence[float]) -> None:
        """Chooses the ridge penalty of lowest held-out error; without choices, there is no refit."""
        if self._parts:
            self._ridge = choose_ridge(self._without(keep), self._centred, ridges)

    def refitted(self, keep: Tensor) -> tuple[float, TensorDict]:
        """Returns the held-out error E |W x - W' x|^2, and parameters fitted to all batches.

        If the layer has a bias, which corrects means, the error is about the means.
        """
        (weight, bias), error = self._matrix(), 0.0
        keep = keep.to(weight.device)
        new = torch.where(keep, weight.double(), 0)
        if parts := self._without(keep):
            *fit, held_out = parts
            error = float(residual_error(self._change(fit), fit, held_out, self._centred))
            change = self._change(parts)
            if bias is not None and self._centred and self._ridge < math.inf:
                bias = bias.double() + bias_shift(change, parts)
            new[:, keep] += change
        return error, to_parameters(self.linear, new, bias)

    def _without(self, keep: Tensor) -> list[ResidualStatistics]:
        """Returns the Gram matrices of the kept inputs by part."""
        weight, _ = self._matrix()
        return [part.after_removal(weight, keep.to(weight.device)) for part in self._parts]

    def _change(self, parts: Sequence[ResidualStatistics]) -> Tensor:
        """Returns the update of the weight; zero if the ridge penalty is too small for a solution."""
        change = solve_ridge(parts, self._centred, self._ridge)
        return torch.where(change.isnan().any(), 0, change)

    def _matrix(self) -> tuple[Tensor, Tensor | None]:
        """Returns the weight and bias on the device of the Gram matrices."""
        store_of(self.model).load(self.linear)
        weight, bias = matrix_of(self.linear)
        device = float64_device(weight.device)  # the CPU where the device has no float64
        return weight.to(device), None if bias is None else bias.to(device)
