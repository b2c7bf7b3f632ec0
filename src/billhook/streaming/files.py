"""The tensors in the safetensors files of a checkpoint: sizes are read from headers, values one at a time; nothing is mapped."""

import copy
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from billhook.streaming.source import Source

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
UNREADABLE = (OSError, SafetensorError, KeyError)


class Files:
    """Where the tensors of a checkpoint are, by their names in the files.

    Args:
        name: A folder or a hub name. Of a hub's, an index and headers are fetched, and each file when a value in it is asked for.

    Raises:
        ValueError: If there are no safetensors files, or they cannot be read.
    """

    def __init__(self, name: str) -> None:
        self._name, self._source = name, Source(name)
        self._files = _files(self._source)
        self._names = dict[str, str]()  # the names in the files of those that are called otherwise
        self._paths = dict[str, Path]()
        self._seen = dict[Path, tuple[int, int]]()

    @property
    def state(self) -> list[tuple[str | int, ...]]:
        """The files that have been read, with their sizes and the times of their last changes, or the commit of a hub's.

        One that is replaced by another of the same size and time, as `rsync -t` does, has another time of its status (ctime).
        """
        if self._source.commit is not None:
            return [(self._name, self._source.commit)]
        return [(str(path), *seen, path.stat().st_ctime_ns) for path, seen in self._seen.items()]

    @property
    def are_here(self) -> bool:
        """True if none of the files must be fetched."""
        return all(self._here(file) is not None for file in set(self._files.values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def copy(self) -> "Files":
        """Returns where everything is now."""
        other = copy.copy(self)
        other._files, other._names = dict(self._files), dict(self._names)
        return other

    def move(self, names: Collection[str], path: Path, new: Collection[str]) -> None:
        """Has tensors stand in another file from now on, under their own or other names."""
        for name in names:
            del self._files[name]
            self._names.pop(name, None)
        self._files |= dict.fromkeys(new, str(path))
        self._paths[str(path)] = path

    def rename(self, names: Mapping[str, str], gone: Collection[str]) -> None:
        """Calls tensors otherwise than the files do, and forgets those that are gone."""
        own = {name: self._names.get(name, name) for name in self._files}
        then = {name: names.get(name, name) for name in self._files if name not in gone}
        self._files = {new: self._files[name] for name, new in then.items()}
        self._names = {new: own[name] for name, new in then.items() if own[name] != new}

    def sizes(self) -> dict[str, Tensor]:
        """Returns all tensors on the meta device; only headers are read."""
        of, found = defaultdict[str, list[str]](list), dict[str, Tensor]()
        for name, file in self._files.items():
            of[file].append(name)
        for file, names in of.items():
            if self._here(file) is None:
                with self._readable():
                    header = self._source.header(file)
                    found |= {name: self._like(name, *header[self._names.get(name, name)]) for name in names}
            else:
                with self._open(file) as opened, self._readable():
                    slices = {name: opened.get_slice(self._names.get(name, name)) for name in names}
                found |= {name: self._like(name, one.get_dtype(), one.get_shape()) for name, one in slices.items()}
        return found

    @contextmanager
    def slices(self, names: Collection[str]) -> Iterator[dict[str, Any]]:
        """Opens tensors, each of which `[...]` then reads."""
        with ExitStack() as stack:
            opened = dict[str, Any]()
            for file in dict.fromkeys(self._files[name] for name in names):
                opened[file] = stack.enter_context(self._open(file))
            with self._readable():
                found = {name: opened[self._files[name]].get_slice(self._names.get(name, name)) for name in names}
            yield {name: one if all(one.get_shape()) else _empty(one) for name, one in found.items()}

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Reads tensors as they are in the files."""
        with self.slices(names) as found, self._readable():
            return {name: one[...] for name, one in found.items()}

    def rows(self, name: str, elements: int) -> Iterator[Tensor]:
        """Reads a tensor a few rows at a time, so many elements at once; a slice of safetensors reads it as a whole each time."""
        with self.slices([name]) as found, self._readable():
            shape, kind = ([1], None) if isinstance(found[name], Tensor) else (found[name].get_shape(), found[name].get_dtype())
            step = max(1, elements * shape[0] // prod(shape)) if shape else 1
            if kind is None or not shape or step >= shape[0]:
                yield found[name][...]
                return
            with self._paths[self._files[name]].open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                file.seek(8 + size + json.loads(file.read(size))[self._names.get(name, name)]["data_offsets"][0])
                for start in range(0, shape[0], step):
                    some = (min(step, shape[0] - start), *shape[1:])
                    read = torch.empty(some, dtype=DTYPES[kind])
                    if file.readinto(read.view(-1).view(torch.uint8).numpy().data) < read.nbytes:
                        raise OSError(f"{name} ends before its last row")
                    yield read

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        with self._readable():
            path = self._here(file) or self._source.fetch(file)
            now = path.stat().st_size, path.stat().st_mtime_ns
            opened = safe_open(path, "pt", backend="pread")
        if self._seen.setdefault(path, now) != now:
            raise ValueError(f"'{path}' has changed since it was first read: begin again")
        self._paths[file] = path
        with opened:
            yield opened

    def _here(self, file: str) -> Path | None:
        return self._paths.get(file) or self._source.here(file)

    def _like(self, name: str, kind: str, shape: Sequence[int]) -> Tensor:
        if kind not in DTYPES:
            raise ValueError(f"'{self._name}': {name} is of dtype {kind}, which is quantised or unknown: it cannot be streamed")
        return torch.empty(tuple(shape), dtype=DTYPES[kind], device="meta")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            raise ValueError(f"'{self._name}': a safetensors file cannot be read: {error}") from error


def renumbered(key: str, block: str, then: str) -> str:
    """Returns the name that a tensor of a block has in files when the block has another number.

    >>> renumbered("h.3.mlp.experts.3.up.weight", "transformer.h.3", "transformer.h.2")
    'h.2.mlp.experts.3.up.weight'
    """
    old, new = ([part for part in name.split(".") if part.isdigit()] for name in (block, then))
    parts = key.split(".")
    places = [place for place, part in enumerate(parts) if part.isdigit()][: len(old)]
    if [parts[place] for place in places] != old:
        raise ValueError(f"model: its files name a tensor of {block} {key}: remove blocks in memory, not streamed")
    for place, number in zip(places, new, strict=True):
        parts[place] = number
    return ".".join(parts)


def write_index(folder: Path) -> None:
    """Writes the index of the safetensors files in a folder, if there are several."""
    files = sorted(folder.glob("*.safetensors"))
    where, total = dict[str, str](), 0
    for file in files if len(files) > 1 else ():
        with safe_open(file, "pt", backend="pread") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - no dict
        where |= dict.fromkeys(slices, file.name)
        total += sum(_empty(one, "meta").nbytes for one in slices.values())
    if where:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _files(source: Source) -> dict[str, str]:
    """Returns the file of each tensor, as an index says it, or the one file has them."""
    try:
        if (single := source.here(SAFE_WEIGHTS_NAME)) is not None:
            with safe_open(single, "pt", backend="pread") as opened:
                return dict.fromkeys(opened.keys(), SAFE_WEIGHTS_NAME)
        if source.has(SAFE_WEIGHTS_NAME):
            return dict.fromkeys(source.header(SAFE_WEIGHTS_NAME), SAFE_WEIGHTS_NAME)
        index: Mapping[str, Any] = json.loads(source.fetch(SAFE_WEIGHTS_INDEX_NAME).read_text())
        return {str(key): str(file) for key, file in index["weight_map"].items()}
    except (*UNREADABLE, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"'{source.name}': streaming needs safetensors files, and they cannot be read: {error}") from error


def _empty(found: Any, device: str = "cpu") -> Tensor:  # noqa: ANN401 - a slice of safetensors, which reads none without elements
    return torch.empty(found.get_shape(), dtype=DTYPES[found.get_dtype()], device=device)
