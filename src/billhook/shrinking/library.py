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
from billhook.engine.fingerprint import fingerprint, identity_of
from billhook.engine.lazy import Aside, computing_with
from billhook.engine.parts import put
from billhook.engine.shards import turns_of
from billhook.repairs.in_turn import Refitted, Values
from billhook.repairs.shared import in_shards

FORMAT = 3
MEASURED = "measured.json"
UNFITTED = " unfitted"
"""Behind the name of a variant: what reads its merged heads, before it is refitted."""
Weights = Mapping[str, Mapping[str, Tensor]]
"""New parameters, by linear and by their name in it."""


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
        self._weights: dict[tuple[str, int], Aside] = {}
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

    def add(self, place: str, kept: int, error: float, weights: Weights) -> None:
        """Adds the variant of a place that keeps so many units."""
        self.errors[place, kept] = error
        if self._folder is None:
            self._weights[place, kept] = resting(self.model, weights)
            return
        tensors = {f"{linear}/{part}": value.cpu() for linear, own in weights.items() for part, value in own.items()}
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

    def weights(self, place: str, kept: int) -> Aside:
        """Returns the parameters of a variant; none where a place keeps all, or has gone with its block."""
        if not kept:
            return zeros_of(self.model, self._writers.get(place, ()))
        place = self.instead.get((place, kept), place)
        if self._folder is None or (place, kept) not in self.errors:
            return self._weights.get((place, kept), Aside({}))
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in load_file(self._folder / f"{place}.{kept}.safetensors").items():
            linear, part = name.split("/")
            like = self.model.get_submodule(linear).get_parameter(part)
            found.setdefault(linear, {})[part] = value.to(like.device)
        return Aside.of(found)

    def forget(self) -> None:
        """Lets go of the variants that are in memory."""
        self._weights.clear()

    def assembled(self, kept: Mapping[str, int], change: Callable[[Aside], Aside] | None = None) -> AbstractContextManager[None]:
        """Puts variants in the places of the model until the end of a `with` block; what a place loses is multiplied by zero.

        Args:
            kept: By place, how many units it keeps; 0 of blocks that are gone, and of places in them.
            change: Changes their parameters before.
        """
        variants = Aside({})
        for place, number in kept.items():
            variants = self.weights(place, number).over(variants)
        return computing_with(self.model, change(variants) if change is not None else variants)


def resting(model: nn.Module, weights: Weights) -> Aside:
    """Returns parameters, by linear and by their name in it, that are here, or of which each rank has its shards, on the CPU."""
    turns, cpu = turns_of(model), torch.device("cpu")
    if turns is None or isinstance(weights, Aside):  # which rest
        return Aside.of(weights)
    own = {name: (model.get_submodule(name), parts) for name, parts in weights.items()}
    return Aside({n: {p: in_shards(turns, (m, p), value, cpu) for p, value in parts.items()} for n, (m, parts) in own.items()})


def as_values(model: PreTrainedModel, weights: Aside) -> Values:
    """Returns parameters by their names in the model: read when they are asked for where ranks share them."""
    reads = {f"{linear}.{part}": read for linear, own in weights.reads.items() for part, read in own.items()}
    return {name: read() for name, read in reads.items()} if turns_of(model) is None else Refitted(reads)


def zeros_of(model: PreTrainedModel, linears: Sequence[str]) -> Aside:
    """Returns the parameters, all zero, of linears, by linear and by their name in it."""
    parts = {name: model.get_submodule(name).named_parameters(recurse=False) for name in linears}
    return Aside({name: {part: partial(torch.zeros_like, value.data) for part, value in own} for name, own in parts.items()})


def key_of(model: PreTrainedModel, settings: object, scores: Mapping[str, Tensor], batches: Sequence[Any]) -> str:
    """Returns a name for all that decides a library: the model and its config, settings, scores and batches."""
    of_sources = [(source_of(batch), batch) for batch in batches]
    return fingerprint(FORMAT, identity_of(model), settings, scores, of_sources)[:16]


def _to_json(values: Mapping[tuple[str, int], float]) -> str:
    return json.dumps([[place, kept, value] for (place, kept), value in values.items()])


def _from_json(text: str) -> dict[tuple[str, int], float]:
    return {(place, kept): value for place, kept, value in json.loads(text)}
