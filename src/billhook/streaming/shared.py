"""Finds the tensors of a checkpoint that another model has in memory, so that they need not be there twice."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.streaming.files import Files

ELEMENTS = 2**22
"""Numbers that are read at once."""


def share(model: PreTrainedModel, other: PreTrainedModel, files: Files, keys: Collection[str]) -> list[str]:
    """Takes parameters from another model where it has, bit for bit, what files hold; returns the keys that are left to load.

    Those that are converted when they are loaded have other names in the files, and are left.

    Args:
        model: The model, on meta.
        other: The model in memory.
        files: The tensors of the checkpoint.
        keys: Names of tensors in the files.
    """
    own, theirs = (dict(one.named_parameters(remove_duplicate=False)) for one in (model, other))
    left = list[str]()
    for key in keys:
        mine, there = own.get(key), theirs.get(key)
        if mine is None or there is None or not mine.is_meta or not _holds(there, mine, files, key):
            left.append(key)
            continue
        shared = nn.Parameter(there.detach(), mine.requires_grad)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is mine:
                    module._parameters[name] = shared
    return left


def _holds(there: Tensor, mine: Tensor, files: Files, key: str) -> bool:
    """Tells whether a tensor in memory is what the files hold, in dtype, shape and every bit."""
    alike = there.dtype == mine.dtype and there.shape == mine.shape and there.dim() > 0
    if not alike or there.device.type != "cpu" or not there.is_contiguous():
        return False
    place, whole = 0, there.detach()
    for rows in files.rows(key, ELEMENTS):
        some = whole[place : place + len(rows)]
        if rows.dtype != some.dtype or rows.shape != some.shape or not torch.equal(_bits(rows), _bits(some)):
            return False
        place += len(rows)
    return place == len(whole)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
