"""Interrupted commands: a single writer per output folder, and notes on partial results."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from billhook.atomic_folder import RECORD, check_target
from billhook.folder_lock import lock_folder


class Terminated(KeyboardInterrupt):
    """A SIGTERM, which ends a command like Ctrl-C."""


def default_variant_cache(out: str) -> Path:
    """Returns the folder next to an output folder in which `shrink` caches variants."""
    target = Path(out).resolve()
    return target.with_name(f".{target.name}.variants")


def text_folder(out: str) -> Path:
    """Returns the folder that keeps self-generated text until the output is saved."""
    target = Path(out).resolve()
    return target.with_name(f".{target.name}.generated")


@contextmanager
def exclusive_output(options: Mapping[str, Any]) -> Iterator[None]:
    """Locks the output folder of a command, if it has one, within a `with` block.

    Raises:
        KeyboardInterrupt: With what was written, and how to continue. Other errors get a note on partial results.
    """
    out = options.get("out")
    if not isinstance(out, str):
        yield
        return
    check_target(out)
    target = Path(out).resolve()
    variant_cache = Path(options.get("variant_cache") or default_variant_cache(out))
    with lock_folder(target):
        before = _written_at(target)
        try:
            yield
        except KeyboardInterrupt as interrupt:
            written = f"{out} was written." if _written_at(target) != before else f"{out} was not written."
            resume = _partial_results(target, variant_cache) or "The same command starts from the beginning."
            raise KeyboardInterrupt(f"{written} {resume}") from interrupt
        except Exception as error:
            if note := _partial_results(target, variant_cache):
                vars(error).setdefault("__notes__", []).append(note)  # like `add_note`, which is new in Python 3.11
            raise


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM end a command like Ctrl-C within a `with` block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _written_at(target: Path) -> int | None:
    record = target / RECORD
    return record.stat().st_mtime_ns if record.is_file() else None


def _partial_results(target: Path, variant_cache: Path) -> str:
    """Returns a sentence on partial results from which the same command continues."""
    parts = target.with_name(f".{target.name}.parts")
    text = text_folder(str(target))
    for folder, files, name in ((parts, "*/*", "blocks"), (variant_cache, "*/*", "variants"), (text, "*", "self-generated text")):
        if next(folder.glob(f"{files}.safetensors"), None) is not None:
            return f"Run the same command again to continue after the finished {name} in {folder}."
    return ""
