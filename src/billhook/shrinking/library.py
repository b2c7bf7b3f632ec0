"""Holds the variants of places: in memory, in a folder, from which an interrupted search goes on, or divided among ranks."""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.batches import source_of
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.parts import fingerprint, identity_of, put
from billhook.engine.store import store_of

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

    def assembled(
        self, kept: Mapping[str, int], change: Callable[[LazyTensors], LazyTensors] | None = None
    ) -> AbstractContextManager[None]:
        """Puts variants in the places of the model until the end of a `with` block; what a place loses is multiplied by zero.

        Args:
            kept: By place, how many units it keeps; 0 of blocks that are gone, and of places in them.
            change: Changes their parameters before.
        """
        variants = LazyTensors({})
        for place, number in kept.items():
            variants |= self.weights(place, number)
        return store_of(self.model).computing_with(change(variants) if change is not None else variants)


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
