"""Hashes of what work is made from, by which a later process tells whether what an earlier one left is of the same work."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from billhook.versions import versions


def fingerprint(*values: object) -> str:
    """Returns a hash of values and of what they hold: two differ if a tensor has another dtype, shape, name or byte.

    Tensors on the meta device have no bytes to tell. What is neither a tensor nor a collection goes by its `repr`.

    >>> fingerprint({"ids": torch.zeros(2, 3)}) == fingerprint({"ids": torch.zeros(3, 2)})
    False
    """
    found = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            found.update(f"tensor {value.dtype} {list(value.shape)} ".encode())
            if not value.is_meta:
                found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            found.update(f"mapping {len(value)} ".encode())
            for key, part in value.items():
                add(str(key))
                add(part)
        elif isinstance(value, set | frozenset):
            add(sorted(map(repr, value)))
        elif isinstance(value, list | tuple):
            found.update(f"list {len(value)} ".encode())
            for part in value:
                add(part)
        else:
            told = repr(value).encode()
            found.update(f"{type(value).__name__} {len(told)} ".encode() + told)

    add(values)
    return found.hexdigest()


UNIMPORTANT = ("_name_or_path", "transformers_version", "architectures")
"""Config fields by which no model computes; the name may be that of the same folder, written otherwise."""


def identity_of(model: PreTrainedModel) -> str:
    """Returns a hash of a model's class, configs, dtypes, sizes and values, and of the versions that compute with it.

    Of parameters on the meta device, such as those of a model that is streamed, names, dtypes and sizes alone are told.
    """
    buffers = dict(model.named_buffers())  # also those that no file holds, such as frequencies
    return fingerprint(versions(), type(model).__qualname__, _decisive(model.config), model.state_dict(), buffers)


def _decisive(config: PretrainedConfig) -> dict[str, object]:
    """Returns the fields of a config, and of those nested in it, that decide what a model computes."""
    fields = {name: value for name, value in sorted(vars(config).items()) if name not in UNIMPORTANT}
    return {name: _decisive(value) if isinstance(value, PretrainedConfig) else value for name, value in fields.items()}
