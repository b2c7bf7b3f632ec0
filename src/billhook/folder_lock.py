"""A lock file next to a folder, so that only one process writes to it."""

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
except ImportError:  # Windows, where nothing keeps two runs apart
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """The lock of a folder, held until it is released or the process ends.

    The system takes a lock from a process that ends, so that a file which it left is no obstacle, on any host. A process that
    claims a folder again gets a claim that holds nothing. Folders above `target` that are missing are made, and removed by
    `release` unless there is something in them.

    Args:
        target: The folder that is written, resolved; it need not be there.

    Raises:
        ValueError: If another process holds the lock.
        OSError: If no file can be made beside the folder.
    """

    def __init__(self, target: Path) -> None:
        lock = target.with_name(f".{target.name}.lock")
        made = [parent for parent in target.parents if not parent.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _locked(lock, target)
        except OSError as error:
            _remove_empty(made)
            why = f"no file can be made in '{target.parent}' ({error.strerror})"
            refusal = type(error)(f"'{target}' cannot be written: {why}")
            refusal.errno = error.errno
            raise refusal from error
        except ValueError:
            _remove_empty(made)
            raise
        self._held = None if descriptor is None else weakref.finalize(self, _release, os.getpid(), lock, descriptor, made)

    @property
    def holds(self) -> bool:
        """True if this object holds the lock, and not an earlier one of the same process."""
        return self._held is not None and self._held.alive

    def release(self) -> None:
        """Releases the lock, if this object holds it."""
        if self._held is not None:
            self._held()


@contextmanager
def lock_folder(target: Path) -> Iterator[None]:
    """Locks a folder within a `with` block; see `FolderLock`."""
    claim = FolderLock(target)
    try:
        yield
    finally:
        claim.release()


def _locked(lock: Path, target: Path) -> int | None:
    """Returns the descriptor of the locked file; None if this process already holds the lock."""
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
                f"another run is writing to '{target}'{who}: wait until it has ended, or name another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
        os.close(descriptor)  # whoever held it has removed it in the meantime
    since = datetime.now().strftime("%Y-%m-%d %H:%M")
    with suppress(OSError):  # on a full disk the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
    return descriptor


def _holder(lock: Path) -> dict[str, object]:
    """Returns the process that holds a lock, as far as it is recorded."""
    with suppress(OSError, ValueError):
        record = json.loads(lock.read_text())
        return record if isinstance(record, dict) else {}
    return {}


def _release(process: int, lock: Path, descriptor: int, made: list[Path]) -> None:
    if os.getpid() != process:  # a fork has it too
        return
    with suppress(OSError):
        lock.unlink()  # while it is held, so that nobody else's goes
    os.close(descriptor)
    _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
