"""Reaches parts of a model, whether it is in memory, or its blocks come and go: from files, or from the ranks that share them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

from billhook.engine.files import Stream, stream_of
from billhook.engine.shards import Turns, turns_of


def coming_of(model: nn.Module) -> Stream | Turns | None:
    """Returns what has a model's blocks come and go; None where all are there."""
    return stream_of(model) or turns_of(model)


def bring(model: nn.Module, module: nn.Module) -> None:
    """Has the block of a module in memory, if the model's blocks come and go."""
    if (coming := coming_of(model)) is not None:
        coming.bring(module)


def apart(model: nn.Module, add: Callable[[Tensor], Tensor] | None) -> AbstractContextManager[None]:
    """Lets ranks that share blocks bring what each needs, within, however often; `add` sums over ranks, in place."""
    turns = turns_of(model)
    return nullcontext() if turns is None else turns.apart(add)


def all_here(model: nn.Module) -> AbstractContextManager[None]:
    """Has all blocks of a model that ranks share in memory, within."""
    turns = turns_of(model)
    return nullcontext() if turns is None else turns.all_here()


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
    """Has the blocks of a model that come and go come as before it changed, if an error is raised within."""
    back = None if (coming := coming_of(model)) is None else coming.way_back()
    try:
        yield
    except BaseException:
        if back is not None:
            back()
        raise
