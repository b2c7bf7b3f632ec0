"""Locks that allow only a single process to write to a folder."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


class FolderLock:
    """Lock of a folder, until it is released or garbage-collected, or the process ends.

    The system releases the locks of a process that ends, so that a remaining lock file is harmless. A process may lock a folder
    several times, and has the lock until all are released. Missing parent folders of `target` are created, and `release` removes
    them if they are empty.

    Args:
        target: The output folder, as a resolved path. It may be missing.

    Raises:
        ValueError: If another process has the lock.
        OSError: If no file can be created next to the folder.
    """

    def __init__(self, target: Path) -> None:
        lock = FileLock(target.with_name(f".{target.name}.lock"), timeout=0, thread_local=False, is_singleton=True)
        created = [parent for parent in target.parents if not parent.exists()]
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ValueError(f"another run is writing to '{target}'. Wait until it ends, or choose another folder.") from None
        except OSError as error:
            _remove_empty(created)
            problem = f"no file can be created in '{target.parent}' ({error.strerror})"
            explained = type(error)(f"'{target}' cannot be written: {problem}")
            explained.errno = error.errno
            raise explained from error
        self._release = weakref.finalize(self, _release, lock, created)

    @property
    def holds(self) -> bool:
        """True until `release`."""
        return self._release.alive

    def release(self) -> None:
        """Releases the lock once."""
        self._release()


@contextmanager
def lock_folder(target: Path) -> Iterator[None]:
    """Locks a folder for this process within a `with` block; see `FolderLock`."""
    folder_lock = FolderLock(target)
    try:
        yield
    finally:
        folder_lock.release()


def _release(lock: FileLock, created: list[Path]) -> None:
    if lock.lock_counter == 1:
        with suppress(OSError):
            Path(lock.lock_file).unlink()  # while locked, so that no other process loses its file
    lock.release()
    _remove_empty(created)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
