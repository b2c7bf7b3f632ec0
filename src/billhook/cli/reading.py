"""Shows one bar while a command reads or writes files."""

from collections.abc import Iterator
from contextlib import contextmanager

from billhook.bar import bar
from billhook.model.transformers_internals import without_bars


@contextmanager
def files(what: str) -> Iterator[None]:
    """Shows one bar, and none of transformers' own, while files are read or written."""
    with without_bars(), bar(what):
        yield
