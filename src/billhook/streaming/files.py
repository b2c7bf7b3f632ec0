"""The tensors in the safetensors files of a checkpoint: sizes are read from headers, values one at a time; nothing is mapped."""

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Files:
    """Where the tensors of a checkpoint are, by their names in the files.

    Args:
        name: A folder or a hub name. Of a hub's, an index is fetched, and each file when something in it is asked for.

    Raises:
        ValueError: If there are no safetensors files, or they cannot be read.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._files = _files(name)
        self._paths = dict[str, Path]()
        self._seen = dict[Path, tuple[int, int]]()

    @property
    def state(self) -> list[tuple[str, int, int]]:
        """The files that have been read, with their sizes and the times of their last changes."""
        return [(str(path), *seen) for path, seen in self._seen.items()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def copy(self) -> "Files":
        """Returns where everything is now."""
        other = copy.copy(self)
        other._files = dict(self._files)
        return other

    def move(self, names: Collection[str], path: Path, new: Collection[str]) -> None:
        """Has tensors stand in another file from now on, under their own or other names."""
        for name in names:
            del self._files[name]
        self._files |= dict.fromkeys(new, str(path))
        self._paths[str(path)] = path

    def sizes(self) -> dict[str, Tensor]:
        """Returns all tensors on the meta device; only headers are read."""
        with self.slices(list(self._files)) as found:
            return {name: _like(self._name, name, one) for name, one in found.items()}

    @contextmanager
    def slices(self, names: Collection[str]) -> Iterator[dict[str, Any]]:
        """Opens tensors, each of which `[...]` then reads."""
        with ExitStack() as stack:
            opened = dict[str, Any]()
            for file in dict.fromkeys(self._files[name] for name in names):
                opened[file] = stack.enter_context(self._open(file))
            with self._readable():
                found = {name: opened[self._files[name]].get_slice(name) for name in names}
            yield {name: one if all(one.get_shape()) else _empty(one) for name, one in found.items()}

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Reads tensors as they are in the files."""
        with self.slices(names) as found, self._readable():
            return {name: one[...] for name, one in found.items()}

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        with self._readable():
            path = self._paths.get(file) or Path(cast(str, cached_file(self._name, file)))
            now = path.stat().st_size, path.stat().st_mtime_ns
            opened = safe_open(path, "pt", backend="pread")
        if self._seen.setdefault(path, now) != now:
            raise ValueError(f"'{path}' has changed since it was first read: begin again")
        self._paths[file] = path
        with opened:
            yield opened

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"'{self._name}': a safetensors file cannot be read: {error}") from error


def write_index(folder: Path) -> None:
    """Writes the index of the safetensors files in a folder, if there are several."""
    files = sorted(folder.glob("*.safetensors"))
    where, total = dict[str, str](), 0
    for file in files if len(files) > 1 else ():
        with safe_open(file, "pt", backend="pread") as opened:
            where |= dict.fromkeys(opened.keys(), file.name)
            total += sum(_like(str(folder), key, opened.get_slice(key)).nbytes for key in opened.keys())  # noqa: SIM118 - no dict
    if where:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _files(name: str) -> dict[str, str]:
    """Returns the file of each tensor, as an index says it, or the one file has them."""
    try:
        if (single := cached_file(name, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)) is not None:
            with safe_open(single, "pt", backend="pread") as opened:
                return dict.fromkeys(opened.keys(), SAFE_WEIGHTS_NAME)
        index: Mapping[str, Any] = json.loads(Path(cast(str, cached_file(name, SAFE_WEIGHTS_INDEX_NAME))).read_text())
        return {str(key): str(file) for key, file in index["weight_map"].items()}
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"'{name}': streaming needs safetensors files, and they cannot be read: {error}") from error


def _empty(found: Any) -> Tensor:  # noqa: ANN401 - a slice of safetensors, which reads none without elements
    return torch.empty(found.get_shape(), dtype=DTYPES[found.get_dtype()])


def _like(checkpoint: str, name: str, found: Any) -> Tensor:  # noqa: ANN401 - a slice of safetensors
    if isinstance(found, Tensor):
        return found.to("meta")
    kind = found.get_dtype()
    if kind not in DTYPES:
        raise ValueError(f"'{checkpoint}': {name} is of dtype {kind}, which is quantised or unknown: it cannot be streamed")
    return torch.empty(found.get_shape(), dtype=DTYPES[kind], device="meta")
