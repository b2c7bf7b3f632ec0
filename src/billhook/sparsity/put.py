"""Puts pruned weights in the place of the old ones: all of them, in no more memory than some rows take."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from billhook.engine.state import fresh_casts
from billhook.sparsity.bits import count, unpacked
from billhook.sparsity.masks import CPU_BLOCK, DEVICE_BLOCK, WHOLE

Part = tuple[Tensor, np.ndarray, Tensor | None]
"""A weight in its own memory, `[out, in]` or of more dimensions, its keep-mask with 8 weights a byte, and new values of those
that are kept."""


@fresh_casts()
@torch.no_grad()
def put(parts: Sequence[Part]) -> None:
    """Zeroes what masks leave out of weights, and gives what they keep its new values, if there are any.

    No old value is held, so that nothing could be undone: what can be refused is refused before, and memory for the largest step
    is put by before the first, and used where memory ends meanwhile. An interrupt from the keyboard is raised when all rows have
    been put; some may be put twice, which is the same.

    Raises:
        MemoryError: Before anything has changed, if there is no memory for a step; or torch's own error.
    """
    left = [(rows, first, bits, values) for weight, bits, values in parts for rows, first in _taken_apart(weight)]
    reserve = _reserve(parts, [rows for rows, *_ in left])
    interrupt: KeyboardInterrupt | None = None
    while left:
        try:
            _put_some(*left[-1])
            left.pop()
        except KeyboardInterrupt as error:
            interrupt = error
        except (MemoryError, RuntimeError):  # which is what allocators of torch raise
            if not reserve:
                raise
            reserve.clear()
    if interrupt is not None:
        raise interrupt


def _put_some(rows: Tensor, first: int, bits: np.ndarray, values: Tensor | None) -> None:
    """Puts some rows of a weight, of which `first` is the number of the first weight in them."""
    keep = unpacked(bits[first // 8 :], rows.numel(), rows.device).view(rows.shape)
    if values is None:
        whole = WHOLE[rows.element_size()]
        rows.view(whole).mul_(keep.view(torch.uint8).to(whole))
        return
    before, kept = count(bits[: first // 8]), count(bits[first // 8 : -(-(first + rows.numel()) // 8)])
    some = values[before : before + kept].to(rows)
    rows.copy_(torch.zeros_like(rows).masked_scatter_(keep, some))


def _reserve(parts: Sequence[Part], rows: Sequence[Tensor]) -> list[object]:
    """Takes as much memory as a step does at most: for bits, for what they keep, and for new values and where they go."""
    taken: list[object] = [np.empty(max((len(bits) for _, bits, _ in parts), default=0), dtype=np.uint8)]
    for device in dict.fromkeys(one.device for one in rows):
        largest = max((one for one in rows if one.device == device), key=lambda one: one.nbytes)
        taken += [torch.empty(largest.numel(), dtype=torch.uint8, device=device) for _ in range(2)]
        taken += [torch.empty_like(largest) for _ in range(3)]
    return taken


def _taken_apart(weight: Tensor) -> list[tuple[Tensor, int]]:
    """Returns some rows at a time, whose bits fill whole bytes, each with the number of its first weight."""
    size = CPU_BLOCK if weight.device.type == "cpu" else DEVICE_BLOCK
    width = math.prod(weight.shape[1:])
    step = max(1, size // (8 * max(1, width))) * 8
    return [(weight[start : start + step], start * width) for start in range(0, len(weight), step)]
