"""Finds the tokenizer or processor of a training run, for saving with the checkpoint."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from billhook.fit.lightning_internals import training_loaders
from billhook.model import Preprocessor, find_transformer, load_preprocessor

NAMES = ("processor", "tokenizer", "image_processor", "feature_extractor")
"""Attributes of data modules; properties may load on first access."""
DEPTH = 4  # search depth in a loader's `collate_fn` and dataset
SHORT = 16  # maximum length of a list to search


def find_preprocessors(trainer: Trainer, pl_module: LightningModule) -> list[Preprocessor]:
    """Returns the tokenizer or processor that created the batches, or else the base model's.

    Searches the data module, the module, and the loaders' `collate_fn` and dataset, in this order.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    named = []
    for name in NAMES:
        with suppress(ValueError, OSError):  # the data module cannot load it
            named.append(getattr(data, name, None))
    read = [getattr(loader, name, None) for loader in training_loaders(trainer) for name in ("collate_fn", "dataset")]
    for owners, depth in ((named, 0), ([data], 2), ([pl_module], 2), (read, DEPTH)):
        seen = set[int]()
        if preprocessors := [preprocessor for owner in owners for preprocessor in _find_in(owner, depth, seen)]:
            if processors := [item for item in preprocessors if isinstance(item, ProcessorMixin)]:
                return [processors[0]]
            tokenizers = [item for item in preprocessors if isinstance(item, PreTrainedTokenizerBase)]
            others = [item for item in preprocessors if not isinstance(item, PreTrainedTokenizerBase)]
            return tokenizers[:1] + others[:1]
    origin = find_transformer(pl_module).config.name_or_path
    with suppress(Exception):  # transformers raises many types
        return [load_preprocessor(str(origin))] if origin else []
    return []


def _find_in(owner: object, depth: int, seen: set[int]) -> Iterator[Preprocessor]:
    """Yields the preprocessors that an object or function refers to."""
    if isinstance(owner, Preprocessor):
        yield owner
    elif depth and id(owner) not in seen:
        seen.add(id(owner))
        for part in _references(owner):
            yield from _find_in(part, depth - 1, seen)


def _references(owner: object) -> Iterable[object]:
    """Returns an object's attributes, closure variables, arguments, and items."""
    if isinstance(owner, partial):
        return owner.func, *owner.args, *owner.keywords.values()
    if isinstance(owner, MethodType):
        return owner.__self__, owner.__func__
    if isinstance(owner, FunctionType):
        cells = dict(zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True))
        with suppress(ValueError):  # an empty cell
            cells = {name: cell.cell_contents for name, cell in cells.items()}
        return *cells.values(), *(owner.__globals__.get(name) for name in owner.__code__.co_names)
    if isinstance(owner, dict | list | tuple):
        return [] if len(owner) > SHORT else list(owner.values() if isinstance(owner, dict) else owner)
    of_torch = isinstance(owner, type | ModuleType | Tensor) or (
        isinstance(owner, nn.Module) and not isinstance(owner, LightningModule)
    )
    return [] if of_torch else list(getattr(owner, "__dict__", {}).values())
