"""Files of the changed blocks of a streamed model, and hashes of work."""

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

RECORD = "record.json"
MARK = "billhook-parts.json"  # file that identifies a folder of parts; a folder without it is never changed
UNIMPORTANT = ("_name_or_path", "transformers_version", "architectures")
"""Config fields that do not affect computation. The name may be another path of the same folder."""


def fingerprint(*values: object) -> str:
    """Returns a hash of values, which depends on dtypes, shapes, names, and bytes of tensors.

    Meta tensors have no bytes. Mappings and sets are hashed in any order, and other objects by `repr`.

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


def identity_of(model: PreTrainedModel) -> str:
    """Returns a hash of a model's class, configs, tensors, and the installed versions.

    Only names, dtypes, and sizes of meta parameters are hashed, such as of a streamed model.
    """
    buffers = dict(model.named_buffers())  # also buffers that no file holds, such as rotary frequencies
    return fingerprint(versions(), type(model).__qualname__, _decisive(model.config), model.state_dict(), buffers)


def _decisive(config: PretrainedConfig) -> dict[str, object]:
    """Returns the config fields that affect computation, also of nested configs."""
    fields = {name: value for name, value in sorted(vars(config).items()) if name not in UNIMPORTANT}
    return {name: _decisive(value) if isinstance(value, PretrainedConfig) else value for name, value in fields.items()}


class Parts:
    """Writes changed blocks atomically, step by step, so that work can be resumed.

    A later process with the same steps finds the written blocks. If a step differs, its files and all later ones are removed.

    Args:
        out: The resolved folder of the future checkpoint. Blocks are written next to it, to `.OUT.parts`, which survives the
            process. From the first step until `remove`, no other process can write there.

    Raises:
        ValueError: If `.OUT.parts` exists and was not written by billhook.

    Attributes:
        step: Number of the current step. Files of later steps stay if it is set back.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._folder, self.step = out, out.with_name(f".{out.name}.parts"), 0
        self._claim: FolderLock | None = None
        self._done = dict[str, Any]()
        self._key = ""
        self._check_own()

    def begin(self, key: str) -> dict[str, Any]:
        """Starts the step with this key, and returns the finished blocks with their notes."""
        if self._claim is None or not self._claim.holds:
            self._claim = FolderLock(self._out)
        self._check_own()
        self.step, self._key = self.step + 1, key
        record = None
        with suppress(OSError, ValueError):
            record = json.loads((self._step_folder / RECORD).read_text())
        if not isinstance(record, dict) or record.get("key") != key:
            self._remove_steps(self.step)
            record = {"done": {}}
        self._done = dict(record["done"])
        return dict(self._done)

    def path(self, name: str) -> Path:
        """Returns the file of a block in this step."""
        return self._step_folder / f"{name}.safetensors"

    def keys(self, name: str) -> list[str]:
        """Returns the names of the tensors in the file of a block."""
        with safe_open(self.path(name), "pt", backend="pread") as opened:
            return list(opened.keys())

    def write(self, name: str, tensors: Mapping[str, Tensor], note: object) -> None:
        """Writes a block atomically, then records it as finished, with a note in plain data.

        Raises:
            OSError: If it cannot be written.
        """
        draft = self.path(name).with_suffix(".draft")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / MARK).exists():
                (self._folder / MARK).write_text(json.dumps({"parts of": self._out.name}))
            self._step_folder.mkdir(exist_ok=True)
            save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, draft, {"format": "pt"})
            replace_file(draft, self.path(name))
            self._done[name] = note  # after the tensors: a record names written blocks only
            draft.write_text(json.dumps({"key": self._key, "done": self._done}))
            replace_file(draft, self._step_folder / RECORD)
        except (OSError, SafetensorError) as error:
            draft.unlink(missing_ok=True)
            raise OSError(
                f"{name} cannot be written to '{self._step_folder}': {error}. {len(self._done)} blocks are finished. Run the "
                "same call again to continue after them."
            ) from error

    def remove(self) -> None:
        """Removes all files, and lets other processes write."""
        if (self._folder / MARK).is_file():
            with suppress(OSError):
                self._remove_steps(1)
                (self._folder / MARK).unlink()  # last: it identifies the folder if the process is killed
                self._folder.rmdir()
        self.step, self._done = 0, {}
        self.release()

    def release(self) -> None:
        """Lets other processes write until the next step."""
        if self._claim is not None:
            self._claim.release()

    def _remove_steps(self, first: int) -> None:
        """Removes a step and all later ones, the record of each first."""
        steps = [int(path.name) for path in self._folder.iterdir() if path.name.isdecimal()] if self._folder.exists() else []
        for step in sorted(steps, reverse=True):
            if step >= first:
                (self._folder / str(step) / RECORD).unlink(missing_ok=True)  # first: a record without files would be wrong
                shutil.rmtree(self._folder / str(step))

    def _check_own(self) -> None:
        is_empty = self._folder.is_dir() and not any(self._folder.iterdir())
        if self._folder.exists() and not (self._folder / MARK).is_file() and not is_empty:
            raise ValueError(
                f"'{self._folder}' is needed for changed blocks, but was not written by billhook (no {MARK}). Move it, or choose "
                f"another output folder than '{self._out.name}'."
            )

    @property
    def _step_folder(self) -> Path:
        return self._folder / str(self.step)


def replace_file(draft: Path, target: Path) -> None:
    """Replaces a file by a draft, after the draft is safely on disk."""
    with draft.open("r+b") as written:  # Windows flushes files for writers only
        os.fsync(written.fileno())  # a file system may rename before it writes the contents
    draft.replace(target)


def tensor_in(path: Path, key: str) -> Tensor:
    """Reads a tensor of a safetensors file."""
    with safe_open(path, "pt", backend="pread") as opened:
        tensor: Tensor = opened.get_tensor(key)
    return tensor
