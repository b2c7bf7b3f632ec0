"""Puts a folder in its place in one step: written as a draft, flushed to disk, renamed; also if the process is killed."""

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
"""The file that shows that billhook wrote a folder, and lists its files."""
LONGEST = 255 - len("..rehearsal.draft-01234567")
"""Bytes of a folder's name at most, as drafts beside it have longer ones."""


def check_name(folder: str | Path) -> None:
    """Refuses what no folder can be called, nor the drafts beside it."""
    longest = max(len(os.fsencode(part)) for part in ("", *Path(folder).parts))
    if "\0" in str(folder) or longest > LONGEST:
        wrong = "a zero byte" if "\0" in str(folder) else f"a name of {longest} bytes, more than {LONGEST},"
        raise ValueError(f"folder: {str(folder)[:80]!r} holds {wrong} which no folder can have: name another")


def check_target(folder: str | Path) -> None:
    """Refuses a folder to save to that holds anything that billhook did not write, or that cannot be replaced."""
    check_name(folder)
    path = Path(folder).resolve()
    if path.is_mount():
        raise ValueError(f"'{folder}' is a mount point, which cannot be replaced in one step: name a folder inside it")
    if occupied := next((p for p in path.parents if p.exists() and not p.is_dir()), None):
        raise ValueError(f"'{folder}' cannot be a folder: '{occupied}' is a file")
    aside = _draft_name(path, "old")
    if aside.is_symlink() or aside.is_file():
        raise ValueError(f"'{folder}' cannot be replaced in one step: '{aside}', where what stands there rests, is no folder")
    if aside.is_dir() and (foreign := _foreign(aside)):
        raise ValueError(f"'{folder}' cannot be replaced in one step: '{aside}' holds what billhook did not write ({foreign})")
    if path.exists() and (foreign := "a file" if not path.is_dir() else _foreign(path)):
        raise ValueError(f"'{folder}' holds something that billhook did not write ({foreign}): name another folder")


def check_not_source(source: str | Path, folder: str | Path) -> None:
    """Refuses a folder to save to that is the one which is read, or that holds it: it would be lost."""
    read, path = Path(source).resolve(), Path(folder).resolve()
    if read.is_dir() and path.exists() and any(path.samefile(own) for own in (read, *read.parents)):
        raise ValueError(f"'{folder}' is the folder of the model that is read, or holds it, and would be replaced: name another")


def replacement_note(folder: str | Path) -> str:
    """Says what a save to a folder that `check_target` has passed replaces, to follow its name; empty if nothing stands there."""
    record = Path(folder) / RECORD
    if not record.is_file():
        return ""
    return f" (replaces the billhook checkpoint of {datetime.fromtimestamp(record.stat().st_mtime):%Y-%m-%d %H:%M})"


def _foreign(folder: Path) -> str | None:
    names = {path.name for path in folder.iterdir()}
    if names and RECORD not in names:
        return f"{RECORD} is not there"
    try:
        record = json.loads((folder / RECORD).read_text()) if names else {}
        added = sorted(names - set(record.get("files", names)))
    except (ValueError, AttributeError, TypeError, RecursionError, OSError):
        return f"{RECORD} is not as billhook writes it"
    return ", ".join(added) or None


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder next to the target, and removes it afterwards; drafts of killed processes are removed first.

    The target must be claimed, or a draft of a process that lives would be removed.
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
    """Moves the draft, safely on disk, to the target; an older checkpoint there stays complete until the new one is in place."""
    mode = stat.S_IMODE(draft.stat().st_mode)
    for path in draft.rglob("*"):
        if path.is_file():
            path.chmod(mode & 0o666)  # as the umask has it, where safetensors writes 0600
        _flush(path)
    if target.is_dir():
        draft.chmod(stat.S_IMODE(target.stat().st_mode))
    _flush(draft)
    empty = target.is_dir() and not any(target.iterdir())
    try:
        if target.is_dir() and not empty:
            target.rename(_draft_name(target, "old"))
        draft.rename(target)  # over nothing or an empty folder: one step
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
    """Recovers from a move that was cut off: puts the older checkpoint back if no new one is in place, else removes it."""
    old = _draft_name(target, "old")
    if old.is_symlink() or not old.is_dir() or _foreign(old):
        return
    if target.is_dir() and any(target.iterdir()):
        with suppress(OSError):  # the next save removes it
            shutil.rmtree(old.rename(_draft_name(target)), ignore_errors=True)  # under a draft's name it is never put back
    elif not target.exists() or target.is_dir():
        old.rename(target)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_size(folder: Path) -> int:
    """Adds up the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
