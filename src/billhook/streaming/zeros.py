"""Counts zeros in a model, also in one whose blocks stay in their files."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from billhook.model.transformers_internals import named_in
from billhook.running.sharded.shards import whole
from billhook.running.sharded.turns import turns_of
from billhook.streaming.stream import Stream, stream_of

ELEMENTS = 2**24
"""Numbers that are read at once."""


def zeros_of(model: nn.Module) -> int | None:
    """Counts parameters that are zero; None if files of a model that is streamed would have to be fetched for it."""
    if (stream := stream_of(model)) is not None:
        return zeros_in_files(stream)
    turns = turns_of(model)
    held = model.parameters() if turns is None else (turns.held(one) for one in model.parameters())
    return sum(_zeros(one) for one in held if not one.is_meta)


def zeros_in_files(stream: Stream) -> int | None:
    """Counts parameters that are zero, a few rows at a time; no block comes. None if files would have to be fetched for it."""
    if not stream.files.are_here:
        return None
    stream.leave()
    there, names = dict(stream.model.named_parameters(remove_duplicate=False)), dict[int, str]()
    count = sum(_zeros(one) for one in stream.model.parameters() if not one.is_meta)
    for key, own in named_in(stream.model, stream.files).items():
        parameter = there.get(own)
        if parameter is None or not parameter.is_meta or names.setdefault(id(parameter), own) != own:
            continue  # a buffer, or it is in memory, or tied to one that has been counted
        count += sum(_zeros(rows.to(parameter.dtype)) for rows in stream.files.rows(key, ELEMENTS))
    return count


def _zeros(values: Tensor) -> int:
    """Counts zeros; a sum of what equals zero would hold a number of 8 bytes for each."""
    if isinstance(values, DTensor):
        return int(whole((values == 0).sum()))
    return values.numel() - int(torch.count_nonzero(values))
