"""Reaches parts of a model, whether it is in memory or streamed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from billhook.streaming.stream import stream_of


def bring(model: nn.Module, module: nn.Module) -> None:
    """Has the block of a module in memory, if the model is streamed."""
    if (stream := stream_of(model)) is not None:
        stream.bring(module)


@contextmanager
def changing(model: nn.Module, module: nn.Module) -> Iterator[bool]:
    """Has the block of a module in memory, which changes; yields whether it was streamed."""
    stream = stream_of(model)
    block = None if stream is None else stream.bring(module)
    yield stream is not None
    if stream is not None and block is not None:
        stream.change(block)


@contextmanager
def following(model: nn.Module) -> Iterator[None]:
    """Has the blocks of a model, if it is streamed, come as before it changed, if an error is raised within."""
    back = None if (stream := stream_of(model)) is None else stream.way_back()
    try:
        yield
    except BaseException:
        if back is not None:
            back()
        raise
