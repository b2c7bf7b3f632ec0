"""Shows one bar while a command reads or writes files."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

from billhook.bar import bar


@contextmanager
def files(what: str) -> Iterator[None]:
    """Shows one bar, and none of transformers' own, while files are read or written."""
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with bar(what):
            yield
    finally:
        if shows:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
