"""Tells how much memory a streamed model needs."""

from torch import nn
from transformers import PreTrainedModel

from billhook.running.resident import resident
from billhook.streaming.stream import Stream, stream_of

COPIES = 3
"""How often a block is there at most: as it was, as it is now, and on its way to a file."""


def fits(model: PreTrainedModel, tokens: int, moments: int, memory: int) -> bool:
    """Tells whether what blocks hand on, of so many tokens, fits into the memory of the process beside all else.

    Args:
        model: The model; it is streamed.
        tokens: In all runs together.
        moments: Bytes of the largest statistics, with what is made of them.
        memory: Bytes that the process may take.

    Raises:
        ValueError: If not even all else fits.
    """
    stream = stream_of(model)
    assert stream is not None, "the model is in memory"
    needed = (resident() or 0) + COPIES * _largest(stream) + moments
    if needed > memory:
        raise ValueError(f"memory={memory / 2**30:.2f} GiB: at least {needed / 2**30:.2f} GiB are needed for one block at a time")
    width: int = model.config.get_text_config().hidden_size
    return needed + 2 * tokens * width * model.dtype.itemsize <= memory  # what goes into a block, and what comes out


def _largest(stream: Stream) -> int:
    """Returns the bytes of the largest block."""
    return max((_bytes(block) for block in stream.blocks.values()), default=0)


def _bytes(block: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())
