"""Loads data with `datasets`: files, globs, folders, Hub names, and objects, by split."""

import sys
from collections.abc import Mapping, Sequence
from glob import escape, glob, has_magic
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from billhook.assets import text_files

SPLITS = ("train", "validation", "test")
FORMATS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
TIMEOUT = 10.0
"""Seconds to wait for the Hub to answer."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")

Data: TypeAlias = str | dict[str, str | list[str]]
"""`"tiny"`, `"mixed"`, a Hub name (`"name"` or `"name:config"`), a folder, a file, a glob, or files by split."""
if TYPE_CHECKING:
    import datasets

    Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
    Table: TypeAlias = datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict
    """Data that is already loaded."""
else:  # at run time, command lines read such arguments as file names,
    Rows = Table = Any  # and importing `datasets`, with pandas, takes a second


def is_table(data: object) -> TypeGuard["Table"]:
    """Returns True for an object of `datasets`; False without importing it if no code has."""
    if "datasets" not in sys.modules:
        return False
    import datasets

    return isinstance(data, datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict)


def check_data(data: object, name: str = "data") -> None:
    """Raises if `data` neither names nor holds data."""
    if is_table(data):
        return
    splits = [data] if isinstance(data, str) else list(data.values()) if isinstance(data, dict) else []
    names = [file for files in splits for file in (files if isinstance(files, list) else [files])]
    if not names or not all(isinstance(file, str) and file for file in names):
        raise ValueError(f"{name}={data!r} must be a name, a file, files by split, or an object of `datasets`.")


def load_splits(data: Data | Table, streaming: bool = False) -> dict[str, Rows]:
    """Loads the splits of `data`. Files without a split are `train`."""
    import datasets

    check_data(data)
    if is_table(data):
        return _loaded(data, streaming)
    if isinstance(files := _files_or_name(data), dict):
        kind = _one_kind(files)
        options = {"keep_linebreaks": True} if kind == "text" else {}
        # as `datasets` takes names for globs
        escaped = {split: [escape(name) for name in names] for split, names in files.items()}
        try:
            return dict(datasets.load_dataset(kind, data_files=escaped, streaming=streaming, **options))
        except Exception as error:
            names = list(chain.from_iterable(files.values()))
            for name in names:
                if Path(name).suffix.lower() in (*COMPRESSED, ".parquet"):
                    continue
                try:
                    with Path(name).open(encoding="utf-8") as lines:
                        for _ in lines:
                            pass
                except UnicodeDecodeError:
                    raise ValueError(f"data: the file '{name}' is not encoded as UTF-8. Save it as UTF-8.") from error
            plural = "s" * (len(names) > 1)
            raise _unreadable(f"the file{plural} {', '.join(map(repr, names))} cannot be read as {kind}", error) from error
    splits = dict(datasets.load_dataset(*files, streaming=streaming))
    if any(is_line_text(rows) for rows in splits.values()):
        splits = dict(datasets.load_dataset(*files, streaming=streaming, keep_linebreaks=True))
    return splits


def check_available(data: Data, name: str = "data") -> None:
    """Raises if files are missing or empty, or a folder or data set cannot be found."""
    check_data(data, name)
    if isinstance(files := _files_or_name(data, name), dict):
        _one_kind(files)
        return
    import datasets
    from datasets.naming import camelcase_to_snakecase

    source = files[0]
    owner, slash, dataset = source.rpartition("/")
    cached = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}{slash and '___'}{camelcase_to_snakecase(dataset)}"
    try:
        # a single request with a timeout, where `datasets` would retry six times
        if not (constants.HF_HUB_OFFLINE or source.count("/") > 1 or cached.is_dir() or Path(source).is_dir()):
            HfApi().dataset_info(source, timeout=TIMEOUT)
    except (HfHubHTTPError, HFValidationError):  # the Hub has answered, or the name is illegal; `datasets` reports the error
        pass
    except Exception as error:  # the client and its dependencies raise all kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}={source!r} is not an existing file or folder, and the Hub cannot be reached to look for a data set "
            f"({reason}). Check the path or your connection."
        ) from error
    try:
        datasets.load_dataset_builder(*files)
    except Exception as error:  # `datasets` raises all kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}={data!r} is not an existing file, folder, or readable data set: {reason}") from error


def _files_or_name(data: Data, argument: str = "data") -> dict[str, list[str]] | tuple[str, str | None]:
    """Returns files by split; for a folder or a data set, its name and config."""
    if isinstance(data, str) and (packaged := text_files(data)):
        return {split: [file] for split, file in packaged.items()}
    if isinstance(data, str) and not Path(data).is_dir() and (has_magic(data) or _kind(data) or Path(data).is_file()):
        data = {"train": data}
    if isinstance(data, dict):
        return {split: _files(split, names, argument) for split, names in data.items()}
    name, _, config = (data, "", "") if Path(data).is_dir() else data.partition(":")
    return name, config or None


def _loaded(data: Table, streaming: bool) -> dict[str, Rows]:
    """Returns splits with a document per row; a single table is the split `train`."""
    import datasets

    splits = dict(data) if isinstance(data, Mapping) else {"train": data}
    if not splits.keys() & set(SPLITS):
        raise ValueError(f"data: the splits are {', '.join(map(str, splits)) or 'none'}. One of {', '.join(SPLITS)} is required.")
    for split, rows in splits.items():
        plain = rows.with_format(None)
        plain._info = rows.info.copy()  # private: a shared info object would change the caller's table
        plain.info.builder_name = None  # lines of a text file have lost their line ends here, so rows are documents
        splits[split] = plain.to_iterable_dataset() if streaming and isinstance(plain, datasets.Dataset) else plain
    return splits


def is_line_text(rows: Rows) -> bool:
    """Returns True if rows are lines of a .txt file rather than documents."""
    return bool(rows.info.builder_name == "text")


def _unreadable(problem: str, error: Exception) -> ValueError:
    reason = str(error.__cause__ or error or type(error).__name__)
    if "at least one example" in reason:  # the message of `datasets` for a file without rows
        reason = "no row was found"
    return ValueError(f"data: {problem}, or hold no rows ({reason})")


def _kind(file: str) -> str | None:
    """Returns the format of a file by its extension, ignoring a compression extension."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _one_kind(files: Mapping[str, Sequence[str]]) -> str:
    kinds = {_kind(name) for names in files.values() for name in names}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        raise ValueError(f"data={files} must be files of one format, with the extension {', '.join(FORMATS)}.")
    return kind


def _files(split: str, names: str | list[str], argument: str) -> list[str]:
    """Returns the files of a split, sorted by name within each glob."""
    if split not in SPLITS:
        raise ValueError(f"{argument}: unknown split '{split}'. Use {', '.join(SPLITS)}.")
    files = []
    for name in [names] if isinstance(names, str) else names:
        is_glob = has_magic(name) and not Path(name).exists()
        matching = [file for file in sorted(glob(name, recursive=True)) if Path(file).is_file()] if is_glob else [name]
        if not matching:
            raise ValueError(f"{argument}: no file of the split '{split}' matches '{name}'.")
        files += matching
    for name in files:
        if not Path(name).is_file():
            raise ValueError(f"{argument}: the file '{name}' of the split '{split}' does not exist.")
        if Path(name).stat().st_size == 0:
            raise ValueError(f"{argument}: the file '{name}' of the split '{split}' is empty.")
    return files


def check_columns(rows: Rows, split: str, *columns: str) -> None:
    """Raises if a split has no rows, or lacks a column."""
    names = column_names(rows)
    for column in columns:
        if column not in names:
            raise ValueError(f"the split '{split}' has no column '{column}'. It has {', '.join(names) or 'no rows'}.")


def column_names(rows: Rows) -> list[str]:
    """Returns the column names; reads the first row of a stream that does not declare them.

    Raises:
        ValueError: If the stream cannot be read.
    """
    if rows.column_names:
        return list(rows.column_names)
    try:
        return list(next(iter(rows), {}))
    except Exception as error:
        raise _unreadable("the stream cannot be read", error) from error
