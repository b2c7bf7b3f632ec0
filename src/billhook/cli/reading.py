"""Shows one bar while a command reads or writes files, and none of others."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets

from billhook.bar import bar
from billhook.engine.loader_internals import without_bars


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
