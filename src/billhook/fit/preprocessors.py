"""Finds the tokenizer or processor of a fit, which a checkpoint needs beside the weights."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType

import lightning.pytorch as pl
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from billhook.fit.lightning_internals import training_loaders
from billhook.model.find import find_transformer
from billhook.model.preprocessors import Preprocessor, load_preprocessor

NAMES = ("processor", "tokenizer", "image_processor", "feature_extractor")
"""Attributes of data modules, which may load what they hold when they are first asked."""
DEPTH = 4
"""How far a loader's `collate_fn` and data set are followed."""
SHORT = 16
"""The longest list that is looked through."""


def find_preprocessors(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Preprocessor]:
    """Finds what made the batches of text, images or sound, or else what lies beside the model that training started from.

    It is looked for in the data module, in the module, and in what the loaders collate and read with.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    named = list[object]()
    for name in NAMES:
        with suppress(ValueError, OSError):  # a data module that cannot load it
            named.append(getattr(data, name, None))
    read = [getattr(loader, name, None) for loader in training_loaders(trainer) for name in ("collate_fn", "dataset")]
    for owners, depth in ((named, 0), ([data], 2), ([pl_module], 2), (read, DEPTH)):
        seen = set[int]()
        if preprocessors := [preprocessor for owner in owners for preprocessor in _held(owner, depth, seen)]:
            return _one_of_each(preprocessors)
    origin = find_transformer(pl_module).config.name_or_path
    with suppress(Exception):  # transformers raises all kinds
        return [load_preprocessor(str(origin))] if origin else []
    return []


def _held(owner: object, depth: int, seen: set[int]) -> Iterator[Preprocessor]:
    """Yields the preprocessors that an object has, or a function makes use of."""
    if isinstance(owner, Preprocessor):
        yield owner
    elif depth and id(owner) not in seen:
        seen.add(id(owner))
        for part in _parts(owner):
            yield from _held(part, depth - 1, seen)


def _parts(owner: object) -> Iterable[object]:
    """Returns what an object refers to: its attributes, a function's variables, what is bound, partial, or in a short list."""
    if isinstance(owner, partial):
        return owner.func, *owner.args, *owner.keywords.values()
    if isinstance(owner, MethodType):
        return owner.__self__, owner.__func__
    if isinstance(owner, FunctionType):
        cells = dict(zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True))
        with suppress(ValueError):  # a cell that is empty still
            cells = {name: cell.cell_contents for name, cell in cells.items()}
        return *cells.values(), *(owner.__globals__.get(name) for name in owner.__code__.co_names)
    if isinstance(owner, dict | list | tuple):
        return [] if len(owner) > SHORT else list(owner.values() if isinstance(owner, dict) else owner)
    of_torch = isinstance(owner, type | ModuleType | Tensor) or (
        isinstance(owner, nn.Module) and not isinstance(owner, pl.LightningModule)
    )
    return [] if of_torch else list(getattr(owner, "__dict__", {}).values())


def _one_of_each(preprocessors: list[Preprocessor]) -> list[Preprocessor]:
    """Returns a processor, which holds the others, or else a tokenizer and one for images or sound."""
    for preprocessor in preprocessors:
        if isinstance(preprocessor, ProcessorMixin):
            return [preprocessor]
    text, others = list[Preprocessor](), list[Preprocessor]()
    for preprocessor in preprocessors:
        (text if isinstance(preprocessor, PreTrainedTokenizerBase) else others).append(preprocessor)
    return [*text[:1], *others[:1]]
