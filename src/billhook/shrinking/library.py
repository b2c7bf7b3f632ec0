"""Holds the variants of places, in memory or in a folder, from which an interrupted search goes on."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from billhook.running.batches import source_of
from billhook.running.replaced import replaced
from billhook.running.trees import tree_leaves

FORMAT = 2
Weights = dict[str, dict[str, Tensor]]
"""New parameters, by linear and by their name in it."""


class Library:
    """The variants of all places of a model, which stays as it is.

    Args:
        model: The model.
        folder: Where they are kept, a file for each; None keeps them in memory.
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
        self._weights: dict[tuple[str, int], Weights] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob("*.safetensors"):
                with safe_open(file, "pt") as stored:
                    self.errors |= _from_json(stored.metadata()["errors"])
            if (file := folder / "measured.json").exists():
                self.measured = _from_json(file.read_text())

    def add(self, place: str, kept: int, error: float, weights: Weights) -> None:
        """Adds the variant of a place that keeps so many units."""
        self.errors[place, kept] = error
        if self._folder is None:
            self._weights[place, kept] = weights
            return
        tensors = {f"{linear}/{part}": value.cpu() for linear, own in weights.items() for part, value in own.items()}
        unfinished = self._folder / "unfinished"
        save_file(tensors, unfinished, {"errors": _to_json({(place, kept): error})})
        unfinished.replace(self._folder / f"{place}.{kept}.safetensors")

    def note(self, place: str, kept: int, damage: float) -> None:
        """Notes the damage of a variant."""
        self.measured[place, kept] = damage
        if self._folder is not None:
            unfinished = self._folder / "unfinished"
            unfinished.write_text(_to_json(self.measured))
            unfinished.replace(self._folder / "measured.json")

    def weights(self, place: str, kept: int) -> Weights:
        """Returns the parameters of a variant; none where a place keeps all, or has gone with its block."""
        if not kept:
            return zeros_of(self.model, self._writers.get(place, ()))
        place = self.instead.get((place, kept), place)
        if self._folder is None or (place, kept) not in self.errors:
            return self._weights.get((place, kept), {})
        found: Weights = {}
        for name, value in load_file(self._folder / f"{place}.{kept}.safetensors").items():
            linear, part = name.split("/")
            like = self.model.get_submodule(linear).get_parameter(part)
            found.setdefault(linear, {})[part] = value.to(like.device)
        return found

    def assembled(
        self, kept: Mapping[str, int], change: Callable[[Weights], Weights] | None = None
    ) -> AbstractContextManager[None]:
        """Puts variants in the places of the model until the end of a `with` block; what a place loses is multiplied by zero.

        Args:
            kept: By place, how many units it keeps; 0 of blocks that are gone, and of places in them.
            change: Changes their parameters before.
        """
        variants = {name: own for place, number in kept.items() for name, own in self.weights(place, number).items()}
        new = change(variants) if change is not None else variants
        return replaced({self.model.get_submodule(name): own for name, own in new.items()})


def zeros_of(model: PreTrainedModel, linears: Sequence[str]) -> Weights:
    """Returns the parameters, all zero, of linears, by linear and by their name in it."""
    parts = {name: model.get_submodule(name).named_parameters(recurse=False) for name in linears}
    return {name: {part: torch.zeros_like(value.data) for part, value in own} for name, own in parts.items()}


def key_of(model: PreTrainedModel, settings: object, scores: Mapping[str, Tensor], batches: Sequence[Any]) -> str:
    """Returns a name for all that decides a library: the model's weights, settings, scores and batches."""
    found = sha256(json.dumps([FORMAT, type(model).__name__, settings], default=str).encode())
    sources = [(str(number) + source_of(batch), batch) for number, batch in enumerate(batches)]
    named = {**model.state_dict(), **scores}.items()
    leaves = [(name, leaf) for name, batch in sources for leaf in tree_leaves(dict(batch) if isinstance(batch, dict) else batch)]
    for name, value in [*named, *leaves]:
        found.update(name.encode())
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {list(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()[:16]


def _to_json(values: Mapping[tuple[str, int], float]) -> str:
    return json.dumps([[place, kept, value] for (place, kept), value in values.items()])


def _from_json(text: str) -> dict[tuple[str, int], float]:
    return {(place, kept): value for place, kept, value in json.loads(text)}
