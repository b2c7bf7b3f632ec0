"""Tensors in safetensors files: sizes from headers, values read on demand, not mapped."""

import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from huggingface_hub import HfApi, constants, split_torch_state_dict_into_shards, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from billhook.engine.trees import parameter_slots
from billhook.linalg import TensorDict, TensorsByName


class Source:
    """A checkpoint folder, or a Hub repository at the commit of its cached config.

    Args:
        name: A folder or a Hub name.

    Attributes:
        commit: The commit. None for a folder.
    """

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, Path(name) if Path(name).is_dir() else None
        config = None if self.folder else try_to_load_from_cache(name, "config.json")
        self.commit = Path(config).parent.name if isinstance(config, str) else None

    def local_path(self, file: str) -> Path | None:
        """Returns the local path of a file. None if it is not downloaded."""
        if self.folder is not None:
            return self.folder / file if (self.folder / file).is_file() else None
        path = try_to_load_from_cache(self.name, file, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def fetch(self, file: str) -> Path:
        """Downloads a file if needed, and returns its local path."""
        return Path(cast(str, cached_file(self.name, file, revision=self.commit)))

    def has(self, file: str) -> bool:
        """Returns whether a file exists, in the folder or on the Hub."""
        if self.folder is not None or constants.HF_HUB_OFFLINE:
            return self.local_path(file) is not None
        with self._hub_errors(file):
            return HfApi().file_exists(self.name, file, revision=self.commit)

    def header(self, file: str) -> dict[str, tuple[str, list[int]]]:
        """Requests the dtype and shape of each tensor in a file from the Hub."""
        with self._hub_errors(file):
            tensors = HfApi().parse_safetensors_file_metadata(self.name, file, revision=self.commit).tensors
        return {name: (entry.dtype, entry.shape) for name, entry in tensors.items()}

    @contextmanager
    def _hub_errors(self, file: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the client and what it is made of raise all kinds
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(f"the Hub request for {file} failed: {first}") from error


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FILE_PATTERN, LARGEST = "model{suffix}.safetensors", "50GB"
"""Name and size limit of checkpoint files, the defaults of `save_pretrained`."""
UNREADABLE = (OSError, SafetensorError, KeyError)
ELEMENTS = 2**22  # number of values that are read at once


@dataclass(frozen=True)
class _Stored:
    """Location of a tensor: its file, its name there, and the remaining positions."""

    file: str
    name: str
    kept: tuple[tuple[int, Tensor], ...] = ()


class TensorFiles:
    """The tensors of a checkpoint, by their names in the files.

    Args:
        name: A folder or a Hub name. From the Hub, only the index and headers are fetched until a value is needed.

    Raises:
        ValueError: If there are no safetensors files, or they cannot be read.
    """

    def __init__(self, name: str) -> None:
        self._name, self._source = name, Source(name)
        self._stored = {name: _Stored(file, name) for name, file in _files(self._source).items()}
        self._paths = dict[str, Path]()
        self._seen = dict[Path, tuple[int, int]]()

    @property
    def state(self) -> list[tuple[str | int, ...]]:
        """The files that have been read, with sizes and modification times, or the commit.

        The status time (ctime) detects a replacement with the same size and modification time, as by `rsync -t`.
        """
        if self._source.commit is not None:
            return [(self._name, self._source.commit)]
        return [(str(path), *seen, path.stat().st_ctime_ns) for path, seen in self._seen.items()]

    @property
    def are_local(self) -> bool:
        """True if no file must be downloaded."""
        return all(self._here(file) is not None for file in {stored.file for stored in self._stored.values()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def move(self, names: Collection[str], path: Path, new: Collection[str]) -> None:
        """Reads tensors from another file from now on, under the same or new names."""
        self.rename({}, names)
        self._stored |= {name: _Stored(str(path), name) for name in new}
        self._paths[str(path)] = path

    def rename(self, names: Mapping[str, str], removed: Collection[str]) -> None:
        """Renames tensors relative to the files, and drops removed ones."""
        # another dictionary, because copies of these files share the old one
        self._stored = {names.get(name, name): stored for name, stored in self._stored.items() if name not in removed}

    def select(self, name: str, dim: int, positions: Tensor) -> None:
        """Leaves out all other positions of a tensor from now on."""
        stored = self._stored[name]
        self._stored = self._stored | {name: replace(stored, kept=(*stored.kept, (dim, positions)))}

    def sizes(self) -> TensorDict:
        """Returns all tensors on the meta device. Only headers are read."""
        by_file, sizes = defaultdict(list), TensorDict()
        for name, stored in self._stored.items():
            by_file[stored.file].append(name)
        for file, names in by_file.items():
            if self._here(file) is None:
                with self._readable():
                    header = self._source.header(file)
                    sizes |= {name: self._like(name, *header[self._stored[name].name]) for name in names}
            else:
                with self._open(file) as opened, self._readable():
                    for name in names:
                        entry = opened.get_slice(self._stored[name].name)
                        sizes[name] = self._like(name, entry.get_dtype(), entry.get_shape())
        return sizes

    @contextmanager
    def slices(self, names: Collection[str]) -> Iterator[dict[str, Any]]:
        """Opens slices of tensors, which `[...]` reads."""
        with ExitStack() as stack:
            stored_as, slices = {name: self._stored[name] for name in names}, {}
            files = dict.fromkeys(stored.file for stored in stored_as.values())
            opened = {file: stack.enter_context(self._open(file)) for file in files}
            with self._readable():
                for name, stored in stored_as.items():
                    entry = opened[stored.file].get_slice(stored.name)
                    slices[name] = entry if all(entry.get_shape()) else _empty(entry)  # safetensors cannot read empty tensors
                    for dim, positions in stored.kept:
                        slices[name] = slices[name][...].index_select(dim, positions)
            yield slices

    def read(self, names: Collection[str]) -> TensorDict:
        """Reads tensors as they are in the files."""
        with self.slices(names) as slices, self._readable():
            return {name: entry[...] for name, entry in slices.items()}

    def read_ahead(self, names: Collection[str]) -> None:
        """Prefetches tensors of local files into the page cache (Linux)."""
        wanted = [self._stored[name] for name in names] if hasattr(os, "posix_fadvise") else []
        for file in {stored.file for stored in wanted}:
            path = self._here(file)
            if path is None:
                continue
            with suppress(OSError, ValueError, KeyError), path.open("rb") as opened:
                extents = _extents(opened)
                for first, last in (extents[stored.name] for stored in wanted if stored.file == file):
                    if last > first:  # length 0 would read to the end
                        os.posix_fadvise(opened.fileno(), first, last - first, os.POSIX_FADV_WILLNEED)

    def rows(self, name: str, elements: int) -> Iterator[Tensor]:
        """Reads a tensor a few rows at a time, up to a number of elements.

        Raises:
            OSError: If the file is too short.
        """
        with self.slices([name]) as slices, self._readable():
            entry = slices[name]
            shape = [] if isinstance(entry, Tensor) else entry.get_shape()
            step = max(1, elements * shape[0] // prod(shape)) if shape else 0
            if not shape or step >= shape[0]:
                yield entry[...]
                return
            # not by safetensors, which reads the full tensor for each slice
            stored = self._stored[name]
            with self._paths[stored.file].open("rb") as file:
                file.seek(_extents(file)[stored.name][0])
                for start in range(0, shape[0], step):
                    read = torch.empty((min(step, shape[0] - start), *shape[1:]), dtype=DTYPES[entry.get_dtype()])
                    if file.readinto(read.view(-1).view(torch.uint8).numpy().data) < read.nbytes:
                        raise OSError(f"{name} ends before its last row")
                    yield read

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        with self._readable():
            path = self._here(file) or self._source.fetch(file)
            now = path.stat().st_size, path.stat().st_mtime_ns
            opened = safe_open(path, "pt", backend="pread")  # not mapped: mapped pages count as memory of the process
        if self._seen.setdefault(path, now) != now:
            raise ValueError(f"'{path}' has changed since it was first read. Load the model again.")
        self._paths[file] = path
        with opened:
            yield opened

    def _here(self, file: str) -> Path | None:
        return self._paths.get(file) or self._source.local_path(file)

    def _like(self, name: str, kind: str, shape: Sequence[int]) -> Tensor:
        if kind not in DTYPES:
            raise ValueError(f"'{self._name}': {name} has dtype {kind}, which is quantized or unknown and cannot be streamed.")
        return torch.empty(tuple(shape), dtype=DTYPES[kind], device="meta")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            raise ValueError(f"'{self._name}': a safetensors file cannot be read: {error}") from error


def _extents(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Returns the byte range of each tensor in a safetensors file."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + size + first, 8 + size + last) for name, (first, last) in offsets.items()}


def renumbered(key: str, block: str, new_block: str) -> str:
    """Returns the file name of a tensor after its block was renumbered.

    Raises:
        ValueError: If the files number blocks in another way.

    >>> renumbered("h.3.mlp.experts.3.up.weight", "transformer.h.3", "transformer.h.2")
    'h.2.mlp.experts.3.up.weight'
    """
    parts, old = key.split("."), list(filter(str.isdigit, block.split(".")))
    positions = [position for position, part in enumerate(parts) if part.isdigit()][: len(old)]
    if [parts[position] for position in positions] != old:
        raise ValueError(
            f"model: its files do not number blocks as the model does ({key} in {block}). Load it in memory to remove blocks."
        )
    for position, number in zip(positions, filter(str.isdigit, new_block.split(".")), strict=True):
        parts[position] = number
    return ".".join(parts)


def write_index(folder: Path) -> None:
    """Writes the index of the safetensors files in a folder, if there are several."""
    files = sorted(folder.glob("*.safetensors"))
    where, total = dict[str, str](), 0
    for file in files if len(files) > 1 else ():
        with safe_open(file, "pt", backend="pread") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - no dict
        where |= dict.fromkeys(slices, file.name)
        total += sum(_empty(entry, "meta").nbytes for entry in slices.values())
    if where:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def add_to_file(folder: Path, sizes: TensorsByName, parts: Iterable[TensorsByName]) -> None:
    """Adds tensors incrementally to a file of `save_pretrained`, as if it had saved all.

    Args:
        folder: The folder of `model.safetensors`, which is split into several files and an index if it becomes too large.
        sizes: The new tensors on meta.
        parts: The values of the new tensors, some at a time.
    """
    first = (folder / SAFE_WEIGHTS_NAME).rename(folder / "first.draft")
    with safe_open(first, "pt", backend="pread") as old, ExitStack() as stack:
        all_sizes = {name: _empty(old.get_slice(name), "meta") for name in old.keys()} | dict(sizes)  # noqa: SIM118 - no dict
        split = split_torch_state_dict_into_shards(all_sizes, filename_pattern=FILE_PATTERN, max_shard_size=LARGEST)
        extents = {}
        for file, names in split.filename_to_tensors.items():
            header, starts, end = dict[str, Any](__metadata__={"format": "pt"}), {}, 0
            for name in sorted(names, key=lambda name: (-all_sizes[name].itemsize, name)):
                starts[name], size = end, all_sizes[name]
                end += size.nbytes
                header[name] = {"dtype": DTYPE_NAMES[size.dtype], "shape": list(size.shape), "data_offsets": [starts[name], end]}
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            new = stack.enter_context((folder / file).open("wb"))
            new.write(len(text).to_bytes(8, "little") + text)
            for name, start in starts.items():
                extents[name] = (new, start + 8 + len(text))
        for part in chain(({name: old.get_tensor(name)} for name in old.keys()), parts):  # noqa: SIM118
            for name, tensor in part.items():
                opened, start = extents.pop(name)
                opened.seek(start)
                opened.write(_bits(tensor.detach().cpu().contiguous()).numpy().data)
    assert not extents, f"no values for {', '.join(extents)}"
    first.unlink()
    write_index(folder)


def _files(source: Source) -> dict[str, str]:
    """Returns the file of each tensor, from an index or a single file."""
    try:
        if (single := source.local_path(SAFE_WEIGHTS_NAME)) is not None:
            with safe_open(single, "pt", backend="pread") as opened:
                return dict.fromkeys(opened.keys(), SAFE_WEIGHTS_NAME)
        if source.has(SAFE_WEIGHTS_NAME):
            return dict.fromkeys(source.header(SAFE_WEIGHTS_NAME), SAFE_WEIGHTS_NAME)
        index = json.loads(source.fetch(SAFE_WEIGHTS_INDEX_NAME).read_text())
        return {str(key): str(file) for key, file in index["weight_map"].items()}
    except (*UNREADABLE, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"'{source.name}': streaming requires safetensors files, which cannot be read: {error}") from error


def _empty(entry: Any, device: str = "cpu") -> Tensor:  # noqa: ANN401 - a slice of safetensors
    return torch.empty(entry.get_shape(), dtype=DTYPES[entry.get_dtype()], device=device)


def share_parameters(model: PreTrainedModel, other: PreTrainedModel, files: TensorFiles, keys: Collection[str]) -> list[str]:
    """Shares bitwise identical parameters with another model; returns the remaining keys.

    Tensors that are converted on loading have other names in the files, and remain.

    Args:
        model: The model, on meta.
        other: The model in memory.
        files: The tensors of the checkpoint.
        keys: Names of tensors in the files.
    """
    on_meta, in_memory = (dict(either.named_parameters(remove_duplicate=False)) for either in (model, other))
    remaining = []
    for key in keys:
        empty, full = on_meta.get(key), in_memory.get(key)
        if empty is None or full is None or not empty.is_meta or not _equals_file(full, empty, files, key):
            remaining.append(key)
            continue
        shared = nn.Parameter(full.detach(), empty.requires_grad)
        for (module, name), parameter in list(parameter_slots(model)):
            if parameter is empty:
                module._parameters[name] = shared
    return remaining


def _equals_file(full: Tensor, empty: Tensor, files: TensorFiles, key: str) -> bool:
    """Returns whether a tensor equals the files in dtype, shape, and every bit."""
    same = full.dtype == empty.dtype and full.shape == empty.shape and full.dim() > 0
    same = same and full.untyped_storage().size() >= full.nbytes  # freed memory of a sharded parameter
    if not same or full.device.type != "cpu" or not full.is_contiguous():
        return False
    start, values = 0, full.detach()
    for rows in files.rows(key, ELEMENTS):
        in_memory = values[start : start + len(rows)]
        if rows.dtype != in_memory.dtype or rows.shape != in_memory.shape or not torch.equal(_bits(rows), _bits(in_memory)):
            return False
        start += len(rows)
    return start == len(values)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
