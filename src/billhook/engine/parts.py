"""Blocks that have changed, each in a file of its own beside the checkpoint they will be part of, and hashes of their work."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from billhook.folder_lock import FolderLock
from billhook.versions import versions


def fingerprint(*values: object) -> str:
    """Returns a hash of values and of what they hold: two differ if a tensor has another dtype, shape, name or byte.

    Tensors on the meta device have no bytes to tell. Mappings and sets count in any order. What is neither a tensor, an array nor
    a collection goes by its `repr`.

    >>> fingerprint({"ids": torch.zeros(2, 3)}) == fingerprint({"ids": torch.zeros(3, 2)})
    False
    """
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
        if isinstance(value, Tensor):
            digest.update(f"tensor {value.dtype} {list(value.shape)} ".encode())
            if not value.is_meta:
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"mapping {len(value)} ".encode())
            for key in sorted(value, key=str):
                add(str(key))
                add(value[key])
        elif isinstance(value, set | frozenset):
            add(sorted(map(repr, value)))
        elif isinstance(value, list | tuple):
            digest.update(f"list {len(value)} ".encode())
            for part in value:
                add(part)
        else:
            text = repr(value).encode()
            digest.update(f"{type(value).__name__} {len(text)} ".encode() + text)

    add(values)
    return digest.hexdigest()


UNIMPORTANT = ("_name_or_path", "transformers_version", "architectures")
"""Config fields by which no model computes; the name may be that of the same folder, written otherwise."""


def identity_of(model: PreTrainedModel) -> str:
    """Returns a hash of a model's class, configs, dtypes, sizes and values, and of the versions that compute with it.

    Of parameters on the meta device, such as those of a model that is streamed, names, dtypes and sizes alone are told.
    """
    buffers = dict(model.named_buffers())  # also those that no file holds, such as frequencies
    return fingerprint(versions(), type(model).__qualname__, _decisive(model.config), model.state_dict(), buffers)


def _decisive(config: PretrainedConfig) -> dict[str, object]:
    """Returns the fields of a config, and of those nested in it, that decide what a model computes."""
    fields = {name: value for name, value in sorted(vars(config).items()) if name not in UNIMPORTANT}
    return {name: _decisive(value) if isinstance(value, PretrainedConfig) else value for name, value in fields.items()}


RECORD = "record.json"
MARK = "billhook-parts.json"
"""The file by which a folder of parts is known: one without it is not touched."""


class Parts:
    """Writes blocks and what was done to them, step by step; a block is there as a whole or not at all, at every moment.

    A process that is killed leaves what it has written. Another one that begins the same steps finds it; where a step is another
    one, what stands there of it and of later ones is removed.

    Args:
        out: The folder, resolved, of the checkpoint that they will be part of. They are written beside it, into `.OUT.parts`,
            which outlives the process; from the first step until `remove` no other process writes there.

    Raises:
        ValueError: If `.OUT.parts` is there, and billhook did not write it.

    Attributes:
        step: The number of the step that is going on; set to an earlier one, what was written of later ones stays.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._folder, self.step = out, out.with_name(f".{out.name}.parts"), 0
        self._claim: FolderLock | None = None
        self._done = dict[str, Any]()
        self._key = ""
        self._check_own()

    def begin(self, key: str) -> dict[str, Any]:
        """Begins a step, which `key` tells from all others; returns the blocks that are done, with what was noted of each."""
        if self._claim is None or not self._claim.holds:
            self._claim = FolderLock(self._out)
        self._check_own()
        self.step, self._key = self.step + 1, key
        record: Any = None
        with suppress(OSError, ValueError):
            record = json.loads((self._place / RECORD).read_text())
        if not isinstance(record, dict) or record.get("key") != key:
            self._remove_steps(self.step)
            record = {"done": {}}
        self._done = dict(record["done"])
        return dict(self._done)

    def path(self, name: str) -> Path:
        """Returns the file of a block in this step."""
        return self._place / f"{name}.safetensors"

    def keys(self, name: str) -> list[str]:
        """Returns the names of the tensors in the file of a block."""
        with safe_open(self.path(name), "pt", backend="pread") as opened:
            return list(opened.keys())

    def write(self, name: str, tensors: Mapping[str, Tensor], note: object) -> None:
        """Writes a block, instead of an earlier one, and then that it is done, with a note in plain data."""
        draft = self.path(name).with_suffix(".draft")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / MARK).exists():
                (self._folder / MARK).write_text(json.dumps({"parts of": self._out.name}))
            self._place.mkdir(exist_ok=True)
            save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, draft, {"format": "pt"})
            replace_file(draft, self.path(name))
            self._done[name] = note  # after the tensors: what a process killed between them has recorded is there
            draft.write_text(json.dumps({"key": self._key, "done": self._done}))
            replace_file(draft, self._place / RECORD)
        except (OSError, SafetensorError) as error:
            draft.unlink(missing_ok=True)
            raise OSError(
                f"{name} cannot be written to '{self._place}': {error}; {len(self._done)} blocks are there, and the same call "
                "goes on after them"
            ) from error

    def remove(self) -> None:
        """Removes all that was written, and lets other processes write."""
        if (self._folder / MARK).is_file():
            with suppress(OSError):
                self._remove_steps(1)
                (self._folder / MARK).unlink()  # last: what a killed process leaves is known by it
                self._folder.rmdir()
        self.step, self._done = 0, {}
        self.release()

    def release(self) -> None:
        """Lets other processes write, until the next step begins."""
        if self._claim is not None:
            self._claim.release()

    def _remove_steps(self, first: int) -> None:
        """Removes a step and those after it, so that a process killed on the way leaves no record of files that are gone."""
        steps = [int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()] if self._folder.exists() else []
        for step in sorted(steps, reverse=True):
            if step >= first:
                (self._folder / str(step) / RECORD).unlink(missing_ok=True)  # first of all
                shutil.rmtree(self._folder / str(step))

    def _check_own(self) -> None:
        """Refuses a folder that billhook did not write."""
        if self._folder.exists() and not (self._folder / MARK).is_file() and not _is_empty(self._folder):
            raise ValueError(
                f"'{self._folder}', into which changed blocks are written, holds something that billhook did not write "
                f"({MARK} is not there): move it, or name another folder than '{self._out.name}'"
            )

    @property
    def _place(self) -> Path:
        return self._folder / str(self.step)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def replace_file(draft: Path, target: Path) -> None:
    """Puts a file in the place of another, when it is safely on disk."""
    with draft.open("rb") as written:
        os.fsync(written.fileno())  # a file system may rename before it writes what the file holds
    draft.replace(target)


def tensor_in(path: Path, key: str) -> Tensor:
    """Reads one tensor of the file of a block."""
    with safe_open(path, "pt", backend="pread") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor


def link_or_copy(path: Path, target: Path) -> None:
    """Gives a file a second name, or copies it where files have but one."""
    try:
        target.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, target)
