"""Puts pruned weights in the place of the old ones: all of them, in no more memory than some rows take."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from billhook.sparsity.masks import CPU_BLOCK, DEVICE_BLOCK, WHOLE

Part = tuple[Tensor, np.ndarray, Tensor | None]
"""A weight `[out, in]` in its own memory, its keep-mask with 8 weights a byte, and new values of those that are kept."""


@torch.no_grad()
def put(parts: Sequence[Part]) -> None:
    """Zeroes what masks leave out of weights, and gives what they keep its new values, if there are any.

    No old value is held, so that nothing could be undone: what can be refused is refused before. An interrupt from the keyboard
    is raised when all rows have been put; some may be put twice, which is the same.
    """
    left = [(rows, first, bits, values) for weight, bits, values in parts for rows, first in _taken_apart(weight)]
    interrupt: KeyboardInterrupt | None = None
    while left:
        try:
            rows, first, bits, values = left[-1]
            keep = torch.from_numpy(np.unpackbits(bits[first // 8 :], count=rows.numel())).view(rows.shape).to(rows.device)
            if values is None:
                whole = WHOLE[rows.element_size()]
                rows.view(whole).mul_(keep.to(whole))
            else:
                before, kept = int(np.bitwise_count(bits[: first // 8]).sum()), int(keep.count_nonzero())
                some = values[before : before + kept].to(rows)
                rows.copy_(torch.zeros_like(rows).masked_scatter_(keep.view(torch.bool), some))
            left.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _taken_apart(weight: Tensor) -> list[tuple[Tensor, int]]:
    """Returns some rows at a time, whose bits fill whole bytes, each with the number of its first weight."""
    size = CPU_BLOCK if weight.device.type == "cpu" else DEVICE_BLOCK
    step = max(1, size // (8 * max(1, weight.shape[1]))) * 8
    return [(weight[start : start + step], start * weight.shape[1]) for start in range(0, len(weight), step)]
