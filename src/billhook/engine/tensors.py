"""The tensors in the safetensors files of a checkpoint: sizes are read from headers, values one at a time; nothing is mapped."""

import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
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

from billhook.engine.sharding import parameter_slots


class Source:
    """A folder, or a repository of a hub as it was at the commit from which its config has come.

    Args:
        name: A folder or a hub name.

    Attributes:
        commit: The commit; None of a folder.
    """

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, Path(name) if Path(name).is_dir() else None
        config = None if self.folder else try_to_load_from_cache(name, "config.json")
        self.commit = Path(config).parent.name if isinstance(config, str) else None

    def here(self, file: str) -> Path | None:
        """Returns where a file lies on this machine; None if it does not."""
        if self.folder is not None:
            return self.folder / file if (self.folder / file).is_file() else None
        path = try_to_load_from_cache(self.name, file, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def fetch(self, file: str) -> Path:
        """Returns where a file lies, once it is here as a whole."""
        return Path(cast(str, cached_file(self.name, file, revision=self.commit)))

    def has(self, file: str) -> bool:
        """Asks the hub whether there is such a file; of a folder, and where no hub is asked, that is known."""
        if self.folder is not None or constants.HF_HUB_OFFLINE:
            return self.here(file) is not None
        with self._asked(file):
            return HfApi().file_exists(self.name, file, revision=self.commit)

    def header(self, file: str) -> dict[str, tuple[str, list[int]]]:
        """Asks the hub for the dtype and the shape of each tensor in a file, by its first bytes."""
        with self._asked(file):
            tensors = HfApi().parse_safetensors_file_metadata(self.name, file, revision=self.commit).tensors
        return {name: (entry.dtype, entry.shape) for name, entry in tensors.items()}

    @contextmanager
    def _asked(self, file: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the client and what it is made of raise all kinds
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(f"the hub does not say what {file} holds: {first}") from error


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
CALLED = {dtype: name for name, dtype in DTYPES.items()}
FILE_PATTERN, LARGEST = "model{suffix}.safetensors", "50GB"
"""Of the files of a checkpoint, as `save_pretrained` has them by default."""
UNREADABLE = (OSError, SafetensorError, KeyError)


class TensorFiles:
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
        self.transposed = frozenset[str]()  # the names of those that are read transposed
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
    def are_local(self) -> bool:
        """True if none of the files must be fetched."""
        return all(self._here(file) is not None for file in set(self._files.values()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __copy__(self) -> "TensorFiles":
        other = object.__new__(TensorFiles)
        vars(other).update(vars(self))
        other._files, other._names = dict(self._files), dict(self._names)
        return other

    def move(self, names: Collection[str], path: Path, new: Collection[str]) -> None:
        """Has tensors stand in another file from now on, under their own or other names."""
        for name in names:
            del self._files[name]
            self._names.pop(name, None)
        self.transposed -= {*names, *new}
        self._files |= dict.fromkeys(new, str(path))
        self._paths[str(path)] = path

    def rename(self, names: Mapping[str, str], removed: Collection[str]) -> None:
        """Calls tensors otherwise than the files do, and forgets those that are gone."""
        files, names_in_files, transposed = dict[str, str](), dict[str, str](), set[str]()
        for name in self._files:
            if name in removed:
                continue
            new, in_file = names.get(name, name), self._names.get(name, name)
            files[new] = self._files[name]
            if in_file != new:
                names_in_files[new] = in_file
            if name in self.transposed:
                transposed.add(new)
        self._files, self._names, self.transposed = files, names_in_files, frozenset(transposed)

    def sizes(self) -> dict[str, Tensor]:
        """Returns all tensors on the meta device; only headers are read."""
        by_file, sizes = defaultdict[str, list[str]](list), dict[str, Tensor]()
        for name, file in self._files.items():
            by_file[file].append(name)
        for file, names in by_file.items():
            if self._here(file) is None:
                with self._readable():
                    header = self._source.header(file)
                    sizes |= {name: self._like(name, *header[self._names.get(name, name)]) for name in names}
            else:
                with self._open(file) as opened, self._readable():
                    for name in names:
                        entry = opened.get_slice(self._names.get(name, name))
                        sizes[name] = self._like(name, entry.get_dtype(), entry.get_shape())
        return sizes

    @contextmanager
    def slices(self, names: Collection[str]) -> Iterator[dict[str, Any]]:
        """Opens tensors, each of which `[...]` then reads."""
        with ExitStack() as stack:
            files, slices = dict[str, Any](), dict[str, Any]()
            for file in dict.fromkeys(self._files[name] for name in names):
                files[file] = stack.enter_context(self._open(file))
            with self._readable():
                for name in names:
                    entry = files[self._files[name]].get_slice(self._names.get(name, name))
                    slices[name] = entry if all(entry.get_shape()) else _empty(entry)  # safetensors reads none without elements
                    if name in self.transposed:
                        slices[name] = slices[name][...].T.contiguous()
            yield slices

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """Reads tensors as they are in the files."""
        with self.slices(names) as slices, self._readable():
            return {name: entry[...] for name, entry in slices.items()}

    def read_ahead(self, names: Collection[str]) -> None:
        """Has the system read tensors of files that are here into its pages, while this process goes on; Linux does."""
        paths = {file: path for file in {self._files[name] for name in names} if (path := self._here(file)) is not None}
        for file, path in paths.items() if hasattr(os, "posix_fadvise") else ():
            with suppress(OSError, ValueError, KeyError), path.open("rb") as opened:
                extents = _extents(opened)
                for first, last in (extents[self._names.get(name, name)] for name in names if self._files[name] == file):
                    if last > first:  # or all that follows would be read
                        os.posix_fadvise(opened.fileno(), first, last - first, os.POSIX_FADV_WILLNEED)

    def rows(self, name: str, elements: int) -> Iterator[Tensor]:
        """Reads a tensor a few rows at a time, so many elements at once; a slice of safetensors reads it as a whole each time."""
        with self.slices([name]) as slices, self._readable():
            entry = slices[name]
            shape = [] if isinstance(entry, Tensor) else entry.get_shape()
            step = max(1, elements * shape[0] // prod(shape)) if shape else 0
            if not shape or step >= shape[0]:
                yield entry[...]
                return
            # past safetensors, which reads the whole tensor for each slice
            with self._paths[self._files[name]].open("rb") as file:
                file.seek(_extents(file)[self._names.get(name, name)][0])
                for start in range(0, shape[0], step):
                    some = (min(step, shape[0] - start), *shape[1:])
                    read = torch.empty(some, dtype=DTYPES[entry.get_dtype()])
                    if file.readinto(read.view(-1).view(torch.uint8).numpy().data) < read.nbytes:
                        raise OSError(f"{name} ends before its last row")
                    yield read

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        with self._readable():
            path = self._here(file) or self._source.fetch(file)
            now = path.stat().st_size, path.stat().st_mtime_ns
            opened = safe_open(path, "pt", backend="pread")  # not mapped: pages of a map would count as memory of the process
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


def _extents(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """Returns where the bytes of each tensor begin and end in a safetensors file."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: (8 + size + first, 8 + size + last) for name, (first, last) in offsets.items()}


def renumbered(key: str, block: str, then: str) -> str:
    """Returns the name that a tensor of a block has in files when the block has another number.

    >>> renumbered("h.3.mlp.experts.3.up.weight", "transformer.h.3", "transformer.h.2")
    'h.2.mlp.experts.3.up.weight'
    """
    old, new = ([part for part in name.split(".") if part.isdigit()] for name in (block, then))
    parts = key.split(".")
    positions = [position for position, part in enumerate(parts) if part.isdigit()][: len(old)]
    if [parts[position] for position in positions] != old:
        raise ValueError(f"model: its files name a tensor of {block} {key}: remove blocks in memory, not streamed")
    for position, number in zip(positions, new, strict=True):
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


def add_to_file(folder: Path, sizes: Mapping[str, Tensor], parts: Iterable[Mapping[str, Tensor]]) -> None:
    """Adds tensors, some at a time, to a file that `save_pretrained` has written, as if it had written all of them.

    Args:
        folder: Where `model.safetensors` is; where that becomes too large there are several files then, and their index.
        sizes: What is added, on meta.
        parts: The values of all of them.
    """
    first = (folder / SAFE_WEIGHTS_NAME).rename(folder / "first.draft")
    with safe_open(first, "pt", backend="pread") as old, ExitStack() as stack:
        every = {name: _empty(old.get_slice(name), "meta") for name in old.keys()} | dict(sizes)  # noqa: SIM118 - no dict
        split = split_torch_state_dict_into_shards(every, filename_pattern=FILE_PATTERN, max_shard_size=LARGEST)
        extents = dict[str, tuple[BinaryIO, int]]()
        for file, names in split.filename_to_tensors.items():
            new = stack.enter_context((folder / file).open("wb"))
            extents |= {name: (new, start) for name, start in _begin(new, {name: every[name] for name in names}).items()}
        for part in chain(({name: old.get_tensor(name)} for name in old.keys()), parts):  # noqa: SIM118
            for name, tensor in part.items():
                opened, start = extents.pop(name)
                opened.seek(start)
                opened.write(_bits(tensor.detach().cpu().contiguous()).numpy().data)
    assert not extents, f"{', '.join(extents)} have no values"
    first.unlink()
    write_index(folder)


def _begin(file: BinaryIO, sizes: Mapping[str, Tensor]) -> dict[str, int]:
    """Writes the header of a safetensors file, as safetensors does, and returns where each tensor begins."""
    header, starts, end = dict[str, Any](__metadata__={"format": "pt"}), dict[str, int](), 0
    for name in sorted(sizes, key=lambda name: (-sizes[name].itemsize, name)):
        starts[name], size = end, sizes[name]
        end += size.nbytes
        header[name] = {"dtype": CALLED[size.dtype], "shape": list(size.shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: start + 8 + len(text) for name, start in starts.items()}


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


def _empty(entry: Any, device: str = "cpu") -> Tensor:  # noqa: ANN401 - a slice of safetensors
    return torch.empty(entry.get_shape(), dtype=DTYPES[entry.get_dtype()], device=device)


ELEMENTS = 2**22
"""Numbers that are read at once."""


def share_parameters(model: PreTrainedModel, other: PreTrainedModel, files: TensorFiles, keys: Collection[str]) -> list[str]:
    """Takes parameters from another model where it has, bit for bit, what files hold; returns the keys that are left to load.

    Those that are converted when they are loaded have other names in the files, and are left.

    Args:
        model: The model, on meta.
        other: The model in memory.
        files: The tensors of the checkpoint.
        keys: Names of tensors in the files.
    """
    on_meta, in_memory = (dict(either.named_parameters(remove_duplicate=False)) for either in (model, other))
    left = list[str]()
    for key in keys:
        empty, full = on_meta.get(key), in_memory.get(key)
        if empty is None or full is None or not empty.is_meta or not _holds(full, empty, files, key):
            left.append(key)
            continue
        shared = nn.Parameter(full.detach(), empty.requires_grad)
        for (module, name), parameter in list(parameter_slots(model)):
            if parameter is empty:
                module._parameters[name] = shared
    return left


def _holds(full: Tensor, empty: Tensor, files: TensorFiles, key: str) -> bool:
    """Tells whether a tensor in memory is what the files hold, in dtype, shape and every bit."""
    alike = full.dtype == empty.dtype and full.shape == empty.shape and full.dim() > 0
    alike = alike and full.untyped_storage().size() >= full.nbytes  # or it is away, as a shard of ranks
    if not alike or full.device.type != "cpu" or not full.is_contiguous():
        return False
    start, values = 0, full.detach()
    for rows in files.rows(key, ELEMENTS):
        ours = values[start : start + len(rows)]
        if rows.dtype != ours.dtype or rows.shape != ours.shape or not torch.equal(_bits(rows), _bits(ours)):
            return False
        start += len(rows)
    return start == len(values)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
