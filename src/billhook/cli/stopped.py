"""A command that writes a folder: it has the folder for itself, and says what stays there and beside it if it is stopped."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from billhook.atomic_folder import RECORD, check_target
from billhook.folder_lock import lock_folder


class Stopped(KeyboardInterrupt):
    """An interrupt of a command that writes a folder: it says what stays, and how to go on."""


class Terminated(KeyboardInterrupt):
    """A SIGTERM, which ends a command as Ctrl-C does."""


def library_beside(out: str) -> Path:
    """Returns the folder beside an output in which `shrink` keeps what it has made until the output is saved."""
    target = Path(out).resolve()
    return target.with_name(f".{target.name}.library")


@contextmanager
def written_alone(options: Mapping[str, Any]) -> Iterator[None]:
    """Keeps other runs from the folder that a command writes, if its options name one; refuses one that cannot be written.

    Raises:
        Stopped: In the place of an interrupt, to say what stays. Other errors get a note where there is something to go on with.
    """
    out = options.get("out")
    if not isinstance(out, str):
        yield
        return
    check_target(out)
    target = Path(out).resolve()
    library = Path(options.get("library") or library_beside(out))
    with lock_folder(target):
        before = _written(target)
        try:
            yield
        except KeyboardInterrupt as interrupt:
            stays = f"{out} is written" if _written(target) != before else f"nothing was written to {out}"
            raise Stopped(f"{stays}; {_goes_on(target, library) or 'the same command begins afresh'}") from interrupt
        except Exception as error:
            if rest := _goes_on(target, library):
                vars(error).setdefault("__notes__", []).append(rest)  # as `add_note`, which Python has from 3.11 on
            raise


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Has SIGTERM end a command as Ctrl-C does, within."""
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


def _written(target: Path) -> int | None:
    """Returns when a checkpoint was written to a folder; None if there is none."""
    record = target / RECORD
    return record.stat().st_mtime_ns if record.is_file() else None


def _goes_on(target: Path, library: Path) -> str:
    """Says what there is that the same command goes on with, if it is called again."""
    parts = target.with_name(f".{target.name}.parts")
    if next(parts.glob("*/*.safetensors"), None) is not None:
        return f"the same command goes on after the blocks that are done, which are in {parts}"
    if next(library.glob("*/*.safetensors"), None) is not None:
        return f"the same command goes on with the variants that are done, which are in {library}"
    return ""
