"""Folders of shards, as `torch.distributed.checkpoint` writes them: read where there are no ranks, a tensor at a time."""

import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from billhook.engine.fsdp import as_plain, metadata_classes, wrapper_tensor
from billhook.engine.trees import tree_map_only


class DeferredTensor(Tensor):
    """A tensor of known size that takes no memory: whatever computes with it, or copies it, is given what `read` returns.

    What comes out is a plain tensor, so that `load_state_dict` holds one of these in memory at a time, beside the module.
    """

    read: Callable[[], Tensor]

    @staticmethod
    def of(
        size: Sequence[int], dtype: torch.dtype, read: Callable[[], Tensor], device: torch.device | None = None
    ) -> "DeferredTensor":
        """Makes one that counts as on a device, by default the CPU, where it is put as soon as it has been read."""
        unread: DeferredTensor = wrapper_tensor(DeferredTensor, size, dtype, device or torch.device("cpu"))
        unread.read = read
        return unread

    def on(self, device: torch.device) -> "DeferredTensor":
        """Returns the same, for another device."""
        return DeferredTensor.of(self.shape, self.dtype, self.read, device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        with as_plain():  # or torch would make what comes out one of this class again
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Computes with what is read."""
        plain, named = tree_map_only(DeferredTensor, lambda unread: unread.read().to(unread.device), (args, kwargs or {}))
        return func(*plain, **named)


DESCRIBED, TENSORS = "meta.pt", "state_dict"
"""The file in which Lightning keeps all but tensors, and the name under which the model's tensors are in the other files."""
PLAIN = {
    "torch.distributed.checkpoint.metadata": vars(metadata),
    **dict.fromkeys(("pathlib", "pathlib._local"), {"PosixPath": Path, "WindowsPath": Path, "Path": Path}),  # of Python 3.13
    "torch": {"Size": torch.Size} | {name: one for name, one in vars(torch).items() if isinstance(one, torch.dtype)},
}
"""What torch's list of the tensors in a folder is made of, beside what only has private names."""


def is_sharded_checkpoint(path: Path) -> bool:
    """Tells whether a path is a sharded checkpoint, as Lightning writes it under `ModelParallelStrategy`."""
    return (path / DESCRIBED).is_file()


def read_non_tensors(folder: Path) -> dict[str, Any]:
    """Reads all of a sharded checkpoint but its tensors."""
    checkpoint: dict[str, Any] = torch.load(folder / DESCRIBED, map_location="cpu", weights_only=True)
    return checkpoint


def read_sharded(folder: Path) -> dict[str, Any]:
    """Reads a sharded checkpoint without what optimizers keep, as if it was one file.

    Its tensors stay in the folder: each is read, and put together, whenever something computes with it.

    Raises:
        ValueError: If it lists what torch does not, files elsewhere, or more numbers than its files hold.
        RuntimeError: If this torch lacks what such a list is made of.
    """
    reader = _Reader(folder)
    listed = {name: entry for name, entry in reader.listed.state_dict_metadata.items() if name.startswith(f"{TENSORS}.")}
    _check(folder, reader.listed, listed)
    tensors = {
        name.removeprefix(f"{TENSORS}."): DeferredTensor.of(entry.size, entry.properties.dtype, partial(_read, reader, name))
        for name, entry in listed.items()
    }
    return read_non_tensors(folder) | {TENSORS: tensors}


def write_sharded(folder: Path, checkpoint: Mapping[str, Any], first: bool) -> None:
    """Writes a sharded checkpoint; all ranks call it together, and each writes its shards.

    Args:
        folder: The folder.
        checkpoint: Its tensors are in a state dict, as `read_sharded` returns it.
        first: Whether this is the rank that writes all else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save({TENSORS: checkpoint[TENSORS]}, checkpoint_id=folder)
    if first:
        torch.save({key: value for key, value in checkpoint.items() if key != TENSORS}, folder / DESCRIBED)


def _read(reader: "_Reader", name: str) -> Tensor:
    """Puts a tensor together."""
    entry: Any = reader.listed.state_dict_metadata[name]
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        load({name: tensor}, storage_reader=reader, no_dist=True)  # ranks that have gone wrote it; this process reads alone
    return tensor


def _check(folder: Path, listed: metadata.Metadata, tensors: Mapping[str, Any]) -> None:
    if odd := next((name for name, entry in tensors.items() if not isinstance(entry, metadata.TensorStorageMetadata)), None):
        raise ValueError(f"'{folder}' lists {odd[:80]}, which is no tensor")
    for entry in (listed.storage_data or {}).values():
        if Path(entry.relative_path).name != entry.relative_path:
            raise ValueError(f"'{folder}' lists a file elsewhere: {entry.relative_path[:80]}")
    there = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    said = sum(prod(entry.size) * entry.properties.dtype.itemsize for entry in tensors.values())
    if said > there:
        raise ValueError(f"'{folder}' lists {said} bytes of weights, and its files have {there}")


class _Reader(filesystem.FileSystemReader):
    """Reads files of a folder, by a list that is read as data."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / ".metadata").open("rb") as file:
            try:
                self.listed = _Plain(file).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError) as error:
                raise ValueError(f"'{folder}' has no list of its tensors as torch writes it: {error}") from error
        if not isinstance(self.listed, metadata.Metadata):
            raise ValueError(f"'{folder}' has no list of its tensors as torch writes it")

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:  # noqa: ANN401 - what torch calls it with
        """Returns the list."""
        listed: metadata.Metadata = self.listed
        if listed.storage_meta is None:
            listed.storage_meta = metadata.StorageMeta()
        return listed


class _Plain(pickle.Unpickler):
    """Reads torch's list of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """Returns what the list is made of; refuses all else."""
        part = (PLAIN | metadata_classes()).get(module, {}).get(name)
        known = module != metadata.__name__ or (isinstance(part, type) and part.__module__ == module)
        if part is None or not known:
            raise pickle.UnpicklingError(f"it names {module}.{name}"[:160])
        return part
