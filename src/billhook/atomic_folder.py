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

RECORD = "billhook.json"  # file that marks a folder as written by billhook, and lists its files
LONGEST = 255 - len("..rehearsal.draft-01234567")
"""Maximum number of bytes of a folder name, because drafts next to it have longer names."""


def check_target(folder: str | Path) -> None:
    """Raises an error if an output folder is not a billhook checkpoint or cannot be replaced."""
    longest = max(len(os.fsencode(part)) for part in ("", *Path(folder).parts))
    if "\0" in str(folder) or longest > LONGEST:
        problem = "contains a zero byte" if "\0" in str(folder) else f"has a name of {longest} bytes, more than {LONGEST}"
        raise ValueError(f"folder: {str(folder)[:80]!r} {problem}. Choose another name.")
    path = Path(folder).resolve()
    if os.path.ismount(path):
        raise ValueError(f"'{folder}' is a mount point, which cannot be replaced. Use a folder inside it.")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"'{folder}' cannot be created, because '{parent}' is a file. Choose another folder.")
    foreign = "a file" if path.exists() else ""
    if path.is_dir():  # what shows that billhook did not write it
        names = {file.name for file in path.iterdir()}
        try:
            record = json.loads((path / RECORD).read_text()) if RECORD in names else {}
            added = sorted(names - set(record.get("files", names)))
            foreign = f"no {RECORD}" if names and RECORD not in names else ", ".join(added)
        except (ValueError, AttributeError, TypeError, RecursionError, OSError):
            foreign = f"{RECORD} is malformed"
    if foreign:
        raise ValueError(
            f"'{folder}' is not a billhook checkpoint ({foreign}) and will not be overwritten. Choose another folder."
        )


def check_not_source(source: str | Path, folder: str | Path) -> None:
    """Raises an error if the output folder is or contains the source folder."""
    source_path, path = Path(source).resolve(), Path(folder).resolve()
    if source_path.is_dir() and path.exists() and any(map(path.samefile, (source_path, *source_path.parents))):
        raise ValueError(f"'{folder}' is or contains the folder of the model, which would be lost. Choose another folder.")


def replacement_note(folder: str | Path) -> str:
    """Returns a note on the checkpoint that a save to a checked folder replaces, if any."""
    record = Path(folder) / RECORD
    if not record.is_file():
        return ""
    return f" (replaces the billhook checkpoint of {datetime.fromtimestamp(record.stat().st_mtime):%Y-%m-%d %H:%M})"


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder next to the target; removes it, and those of killed saves.

    The target must be locked, because drafts of other processes are removed too. A renamed older checkpoint stays while there is
    none at the target.
    """
    kinds = "draft|old" if (target / RECORD).exists() else "draft"
    left = re.compile(rf"\.{re.escape(target.name)}\.({kinds})-[0-9a-f]{{8}}")
    for path in list(target.parent.iterdir()):
        if left.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    draft = target.with_name(f".{target.name}.draft-{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def replace_folder(draft: Path, target: Path) -> None:
    """Flushes the draft to disk and moves it to the target.

    An existing target is renamed first, to `.NAME.old-` and the digits of the draft. It stays there if the process is killed
    between the renames.
    """
    mode = stat.S_IMODE(draft.stat().st_mode)
    for path in draft.rglob("*"):
        if path.is_file():
            path.chmod(mode & 0o666)  # by the umask, because safetensors writes 0600
        _flush(path)
    if target.is_dir():
        draft.chmod(stat.S_IMODE(target.stat().st_mode))
    _flush(draft)
    old = draft.with_name(draft.name.replace(".draft-", ".old-"))
    try:
        if target.is_dir():
            target.rename(old)
        draft.rename(target)
        try:
            _flush(target.parent)
        except OSError:
            target.rename(draft)
            raise
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
    with suppress(OSError):
        old.rename(draft)  # `draft_folder` removes it


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
