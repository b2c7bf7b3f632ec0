"""Locks that allow only a single process to write to a folder."""

import json
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, without locks
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """Lock of a folder, until it is released or garbage-collected, or the process ends.

    The system releases the locks of a process that ends, so that a remaining lock file is harmless on any host. If a process
    locks a folder again, the second object holds no lock. Missing parent folders of `target` are created, and `release` removes
    them if they are empty.

    Args:
        target: The output folder, as a resolved path. It may be missing.

    Raises:
        ValueError: If another process has the lock.
        OSError: If no file can be created next to the folder.
    """

    def __init__(self, target: Path) -> None:
        lock = target.with_name(f".{target.name}.lock")
        created = [parent for parent in target.parents if not parent.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _locked(lock, target)
        except OSError as error:
            _remove_empty(created)
            problem = f"no file can be created in '{target.parent}' ({error.strerror})"
            explained = type(error)(f"'{target}' cannot be written: {problem}")
            explained.errno = error.errno
            raise explained from error
        except ValueError:
            _remove_empty(created)
            raise
        self._finalizer = None
        if descriptor is not None:
            self._finalizer = weakref.finalize(self, _release, os.getpid(), lock, descriptor, created)

    @property
    def holds(self) -> bool:
        """True if this object holds the lock, not an earlier object of the same process."""
        return self._finalizer is not None and self._finalizer.alive

    def release(self) -> None:
        """Releases the lock, if this object holds it."""
        if self._finalizer is not None:
            self._finalizer()


@contextmanager
def lock_folder(target: Path) -> Iterator[None]:
    """Locks a folder for this process within a `with` block; see `FolderLock`."""
    folder_lock = FolderLock(target)
    try:
        yield
    finally:
        folder_lock.release()


def _locked(lock: Path, target: Path) -> int | None:
    """Locks a file and returns its descriptor, or None if this process has the lock already."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(lock)
            os.close(descriptor)
            if (holder.get("process"), holder.get("host")) == (os.getpid(), socket.gethostname()):
                return None
            who = " (process {process} on {host}, since {since})".format(**holder) if len(holder) == 3 else ""
            raise ValueError(
                f"another run is writing to '{target}'{who}. Wait until it ends, or choose another folder."
            ) from None
        except OSError:  # a file system without locks
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
        os.close(descriptor)  # the previous holder has removed the file in the meantime
    since = datetime.now().strftime("%Y-%m-%d %H:%M")
    with suppress(OSError):  # on a full disk, the lock works without its record
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
    return descriptor


def _holder(lock: Path) -> dict[str, object]:
    """Returns the record of the process that has a lock, or nothing if it is not written yet."""
    with suppress(OSError, ValueError):
        record = json.loads(lock.read_text())
        return record if isinstance(record, dict) else {}
    return {}


def _release(process: int, lock: Path, descriptor: int, created: list[Path]) -> None:
    if os.getpid() != process:  # a forked process has the descriptor too
        return
    with suppress(OSError):
        lock.unlink()  # while locked, so that no other process loses its file
    os.close(descriptor)
    _remove_empty(created)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
