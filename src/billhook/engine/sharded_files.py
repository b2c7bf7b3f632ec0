"""Sharded checkpoints of `torch.distributed.checkpoint`, read in a single process."""

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
    """A tensor without memory, whose values are read whenever it is used.

    Results are plain tensors, so `load_state_dict` holds at most one tensor in memory beside the module.
    """

    read: Callable[[], Tensor]

    @staticmethod
    def of(
        size: Sequence[int], dtype: torch.dtype, read: Callable[[], Tensor], device: torch.device | None = None
    ) -> "DeferredTensor":
        """Creates a tensor that counts as on a device (default: CPU), where it is read to.

        Args:
            size: The size.
            dtype: The dtype.
            read: Reads the values.
            device: The device.
        """
        unread: DeferredTensor = wrapper_tensor(DeferredTensor, size, dtype, device or torch.device("cpu"))
        unread.read = read
        return unread

    def on(self, device: torch.device) -> "DeferredTensor":
        """Returns the same tensor for another device."""
        return DeferredTensor.of(self.shape, self.dtype, self.read, device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        with as_plain():  # otherwise torch would wrap results in this class
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Runs an operation on the values that are read."""
        plain, named = tree_map_only(DeferredTensor, lambda unread: unread.read().to(unread.device), (args, kwargs or {}))
        return func(*plain, **named)


DESCRIBED, TENSORS = "meta.pt", "state_dict"
"""Lightning's file for everything but tensors, and the prefix of the model's tensors in the other files."""
PLAIN = {
    "torch.distributed.checkpoint.metadata": vars(metadata),
    **dict.fromkeys(("pathlib", "pathlib._local"), {"PosixPath": Path, "WindowsPath": Path, "Path": Path}),  # of Python 3.13
    "torch": {"Size": torch.Size} | {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
}
"""Public classes in the metadata of a sharded checkpoint, by module."""


def is_sharded_checkpoint(path: Path) -> bool:
    """Returns whether a path is a sharded checkpoint of `ModelParallelStrategy`."""
    return (path / DESCRIBED).is_file()


def read_non_tensors(folder: Path) -> dict[str, Any]:
    """Reads everything in a sharded checkpoint but its tensors."""
    checkpoint: dict[str, Any] = torch.load(folder / DESCRIBED, map_location="cpu", weights_only=True)
    return checkpoint


def read_sharded(folder: Path) -> dict[str, Any]:
    """Reads a sharded checkpoint without optimizer states, like a single file.

    Its tensors stay in the folder, and are read whenever they are used.

    Raises:
        ValueError: If its metadata has unknown classes, files outside of the folder, or more values than its files.
        RuntimeError: If this torch lacks the classes of the metadata.
    """
    reader = _Reader(folder)
    listed = {name: entry for name, entry in reader.listed.state_dict_metadata.items() if name.startswith(f"{TENSORS}.")}
    for name, entry in listed.items():
        if not isinstance(entry, metadata.TensorStorageMetadata):
            raise ValueError(f"'{folder}': {name[:80]} in its metadata is not a tensor.")
    for storage in (reader.listed.storage_data or {}).values():
        if Path(storage.relative_path).name != storage.relative_path:
            raise ValueError(f"'{folder}': its metadata names a file outside of the folder: {storage.relative_path[:80]}")
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    listed_bytes = sum(prod(entry.size) * entry.properties.dtype.itemsize for entry in listed.values())
    if listed_bytes > file_bytes:
        raise ValueError(f"'{folder}': its metadata lists {listed_bytes} bytes of weights, but its files have {file_bytes}.")
    tensors = {
        name.removeprefix(f"{TENSORS}."): DeferredTensor.of(entry.size, entry.properties.dtype, partial(_read, reader, name))
        for name, entry in listed.items()
    }
    return read_non_tensors(folder) | {TENSORS: tensors}


def write_sharded(folder: Path, checkpoint: Mapping[str, Any], first: bool) -> None:
    """Writes a sharded checkpoint. All ranks call it together, and each writes its shards.

    Args:
        folder: The folder.
        checkpoint: A checkpoint with a state dict, as `read_sharded` returns it.
        first: Whether this rank writes the non-tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save({TENSORS: checkpoint[TENSORS]}, checkpoint_id=folder)
    if first:
        torch.save({key: value for key, value in checkpoint.items() if key != TENSORS}, folder / DESCRIBED)


def _read(reader: "_Reader", name: str) -> Tensor:
    """Assembles a tensor from its shards."""
    entry = reader.listed.state_dict_metadata[name]
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        load({name: tensor}, storage_reader=reader, no_dist=True)  # this process reads without the ranks that wrote it
    return tensor


class _Reader(filesystem.FileSystemReader):
    """A checkpoint reader whose metadata is read as plain data."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / ".metadata").open("rb") as file:
            try:
                self.listed = _Plain(file).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError) as error:
                raise ValueError(f"'{folder}' has no valid metadata of torch.distributed.checkpoint: {error}") from error
        if not isinstance(self.listed, metadata.Metadata):
            raise ValueError(f"'{folder}' has no valid metadata of torch.distributed.checkpoint.")

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:  # noqa: ANN401 - any arguments of torch
        listed: metadata.Metadata = self.listed
        if listed.storage_meta is None:
            listed.storage_meta = metadata.StorageMeta()
        return listed


class _Plain(pickle.Unpickler):
    """An unpickler for checkpoint metadata, which raises on any other class."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        part = (PLAIN | metadata_classes()).get(module, {}).get(name)
        known = module != metadata.__name__ or (isinstance(part, type) and part.__module__ == module)
        if part is None or not known:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed"[:160])
        return part
