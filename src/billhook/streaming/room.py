"""Tells how much memory a streamed model needs."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from billhook.running.resident import resident
from billhook.streaming.stream import Stream, stream_of

COPIES = 3
"""How often a block is there at most: as it was, as it is now, and on its way to a file."""

WORK = 2**27
"""Bytes that libraries keep to compute in, and the allocator in pieces."""


def fits(model: PreTrainedModel, sums: int, refit: int, rests: int, memory: int) -> bool:
    """Tells whether all that may rest in files fits into the memory of the process beside all else.

    Args:
        model: The model; it is streamed.
        sums: Bytes of the largest statistics, with what is made of them, and of what runs compute at once.
        refit: Bytes that a linear is refitted in while its block stays as it is; 0 where none is.
        rests: Bytes of what may rest in files.
        memory: Bytes that the process may take.

    Raises:
        ValueError: If not even all else fits.
    """
    stream = stream_of(model)
    assert stream is not None, "the model is in memory"
    block = extent_of(stream).largest
    needed = (resident() or 0) + WORK + max(COPIES * block + sums, block + refit)
    if needed > memory:
        raise ValueError(f"memory={memory / 2**30:.2f} GiB: at least {needed / 2**30:.2f} GiB are needed for one block at a time")
    return needed + rests <= memory


@dataclass(frozen=True)
class Extent:
    """How much of a model comes and goes, and how much stays, in bytes of parameters.

    Attributes:
        blocks: How many blocks come and go.
        bytes: Of all blocks together.
        largest: Of the largest block.
        stays: Of what is in no block.
    """

    blocks: int
    bytes: int
    largest: int
    stays: int

    def text(self) -> str:
        """Says it in words."""
        blocks = f"{self.blocks} blocks of at most {self.largest / 1e6:,.1f} MB, one at a time"
        return f"{blocks}: {self.bytes / 1e6:,.1f} MB in all; {self.stays / 1e6:,.1f} MB stay in memory"


def extent_of(stream: Stream) -> Extent:
    """Finds how much of a model comes and goes."""
    sizes = [_bytes(block) for block in stream.blocks.values()]
    total = sum(sizes)
    return Extent(len(sizes), total, max(sizes, default=0), _bytes(stream.model) - total)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
