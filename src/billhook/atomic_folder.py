"""Atomic writes of folders: a draft is written, flushed to disk, and renamed atomically."""

import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

RECORD = "billhook.json"
"""File that marks a folder as written by billhook, and lists its files."""
LONGEST = 255 - len("..rehearsal.draft-01234567")
"""Maximum number of bytes of a folder name, because drafts next to it have longer names."""


def check_name(folder: str | Path) -> None:
    """Raises an error for a name that is illegal for a folder or its drafts."""
    longest = max(len(os.fsencode(part)) for part in ("", *Path(folder).parts))
    if "\0" in str(folder) or longest > LONGEST:
        problem = "contains a zero byte" if "\0" in str(folder) else f"has a name of {longest} bytes, more than {LONGEST}"
        raise ValueError(f"folder: {str(folder)[:80]!r} {problem}. Choose another name.")


def check_target(folder: str | Path) -> None:
    """Raises an error if an output folder is not a billhook checkpoint or cannot be replaced."""
    check_name(folder)
    path = Path(folder).resolve()
    if os.path.ismount(path):
        raise ValueError(f"'{folder}' is a mount point, which cannot be replaced. Use a folder inside it.")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"'{folder}' cannot be created, because '{parent}' is a file. Choose another folder.")
    backup = _draft_name(path, "old")
    if backup.is_symlink() or backup.is_file():
        raise ValueError(f"'{folder}' cannot be replaced, because its backup '{backup}' is not a folder. Move that file.")
    foreign = _foreign(backup) if backup.is_dir() else None
    if foreign:
        raise ValueError(f"'{folder}' cannot be replaced, because '{backup}' was not written by billhook ({foreign}). Move it.")
    foreign = _foreign(path) if path.is_dir() else "a file" if path.exists() else None
    if foreign:
        raise ValueError(
            f"'{folder}' is not a billhook checkpoint ({foreign}) and will not be overwritten. Choose another folder."
        )


def check_not_source(source: str | Path, folder: str | Path) -> None:
    """Raises an error if the output folder is or contains the source folder."""
    source_path, path = Path(source).resolve(), Path(folder).resolve()
    folders = (source_path, *source_path.parents)
    if source_path.is_dir() and path.exists() and any(map(path.samefile, folders)):
        raise ValueError(f"'{folder}' is or contains the folder of the model, which would be lost. Choose another folder.")


def replacement_note(folder: str | Path) -> str:
    """Returns a note on the checkpoint that a save to a checked folder replaces, if any."""
    record = Path(folder) / RECORD
    if not record.is_file():
        return ""
    return f" (replaces the billhook checkpoint of {datetime.fromtimestamp(record.stat().st_mtime):%Y-%m-%d %H:%M})"


def _foreign(folder: Path) -> str | None:
    """Returns the sign that billhook did not write a folder, or None."""
    names = {path.name for path in folder.iterdir()}
    if names and RECORD not in names:
        return f"no {RECORD}"
    try:
        record = json.loads((folder / RECORD).read_text()) if names else {}
        added = sorted(names - set(record.get("files", names)))
    except (ValueError, AttributeError, TypeError, RecursionError, OSError):
        return f"{RECORD} is malformed"
    return ", ".join(added) or None


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder next to the target, and removes it and older drafts.

    The target must be locked, because drafts of other processes are removed too.
    """
    drafts = re.compile(rf"\.{re.escape(target.name)}\.draft-[0-9a-f]{{8}}")
    for path in list(target.parent.iterdir()):
        if drafts.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    draft = _draft_name(target)
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draft_name(target: Path, suffix: str | None = None) -> Path:
    return target.with_name(f".{target.name}.draft-{suffix or secrets.token_hex(4)}")


def replace_folder(draft: Path, target: Path) -> None:
    """Flushes the draft to disk and moves it to the target atomically."""
    mode = stat.S_IMODE(draft.stat().st_mode)
    for path in draft.rglob("*"):
        if path.is_file():
            path.chmod(mode & 0o666)  # by the umask, because safetensors writes 0600
        _flush(path)
    if target.is_dir():
        draft.chmod(stat.S_IMODE(target.stat().st_mode))
    _flush(draft)
    empty = target.is_dir() and not any(target.iterdir())
    try:
        if target.is_dir() and not empty:
            target.rename(_draft_name(target, "old"))
        draft.rename(target)  # atomic, because the target is missing or empty
        try:
            _flush(target.parent)
        except OSError:
            target.rename(draft)
            if empty:
                target.mkdir()
            raise
    finally:
        recover_folder(target)


def recover_folder(target: Path) -> None:
    """Completes an interrupted move: restores the old checkpoint, or removes it if replaced."""
    old = _draft_name(target, "old")
    if old.is_symlink() or not old.is_dir() or _foreign(old):
        return
    if target.is_dir() and any(target.iterdir()):
        with suppress(OSError):  # the next save removes it
            shutil.rmtree(old.rename(_draft_name(target)), ignore_errors=True)  # under the name of a draft it is never restored
    elif not target.exists() or target.is_dir():
        old.rename(target)


def _flush(path: Path) -> None:
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows flushes files for writers only
    except PermissionError:
        if is_folder:  # Windows does not open folders
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_size(folder: Path) -> int:
    """Returns the total size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
