"""Shows one bar while a command reads or writes files, or over the blocks of a streamed model, and none of others."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from torch import nn

from billhook.bar import Told, bar
from billhook.engine.loader_internals import without_bars
from billhook.engine.memory import resident
from billhook.engine.store import store_of


@contextmanager
def files(what: str) -> Iterator[None]:
    """Shows one bar, and none of transformers' own, while files are read or written."""
    with without_bars(), bar(what):
        yield


@contextmanager
def without_others_bars() -> Iterator[None]:
    """Has `datasets` and transformers show no bars of their own within."""
    shows = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with without_bars():
            yield
    finally:
        if shows:
            datasets.enable_progress_bars()


@contextmanager
def over(model: nn.Module, what: str, of: str) -> Iterator[Told]:
    """Shows a bar over what a pass over a model tells; of a model that is streamed, over its blocks.

    Args:
        model: The model.
        what: What is done, as in "pruning".
        of: What is counted where the model is in memory, as in "linears".

    Yields:
        A function to call with how much is done, and of how much.
    """
    if (store := store_of(model)).holds_all:
        with bar(what, of) as told:
            yield told
        return
    with bar(what, "blocks", peak) as told, store.watched(told):
        yield lambda done, total: None


def peak() -> str:
    """Says how much memory the process has taken at most; nothing where no system counts it."""
    most = resident("VmHWM")
    return "" if most is None else f"peak {most / 2**30:.1f} GiB"
