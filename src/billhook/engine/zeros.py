"""Counts zeros in a model, also in one whose blocks stay in their files."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from billhook.engine.files import FileStore
from billhook.engine.loader_internals import names_in_model
from billhook.engine.sharding import full_tensor
from billhook.engine.store import store_of

ELEMENTS = 2**24
"""Numbers that are read at once."""


def zeros_of(model: nn.Module) -> int | None:
    """Counts parameters that are zero; None if files of a model that is streamed would have to be fetched for it."""
    counts = zeros_by_name(model)
    return None if counts is None else sum(counts.values())


def zeros_by_name(model: nn.Module) -> dict[str, int] | None:
    """Counts zeros of each parameter, by name; None if files of a model that is streamed would have to be fetched for it."""
    store = store_of(model)
    if isinstance(store, FileStore):
        return _in_files(store) if store.files.are_local else None
    holders = ((name, store.holder(parameter)) for name, parameter in model.named_parameters())
    return _numbers({name: _zeros(parameter) for name, parameter in holders if not parameter.is_meta})


def _in_files(store: FileStore) -> dict[str, int]:
    """Counts zeros a few rows at a time; no block comes. What a checkpoint keeps as one tensor counts for its first name."""
    store.release()
    in_memory = {name: parameter for name, parameter in store.model.named_parameters() if not parameter.is_meta}
    counts = _numbers({name: _zeros(parameter) for name, parameter in in_memory.items()})
    parameters, names = dict(store.model.named_parameters(remove_duplicate=False)), dict[int, str]()
    for key, name in names_in_model(store.model, store.files).items():
        parameter = parameters.get(name)
        if parameter is None or not parameter.is_meta or names.setdefault(id(parameter), name) != name:
            continue  # a buffer, or it is in memory, or tied to one that has been counted
        rows = store.files.rows(key, ELEMENTS)
        counts[name] = counts.get(name, 0) + sum(int(_zeros(some.to(parameter.dtype))) for some in rows)
    return counts


def _numbers(counts: Mapping[str, Tensor]) -> dict[str, int]:
    """Reads counts, for all of which the host waits once."""
    if not counts:
        return {}
    device = next(iter(counts.values())).device
    return dict(zip(counts, torch.stack([count.to(device) for count in counts.values()]).tolist(), strict=True))


def _zeros(values: Tensor) -> Tensor:
    """Counts zeros; a sum of what equals zero would hold a number of 8 bytes for each."""
    if isinstance(values, DTensor):
        return full_tensor((values == 0).sum())
    return values.numel() - torch.count_nonzero(values)
