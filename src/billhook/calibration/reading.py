"""Reads data with `datasets`: files, globs, folders, hub names and objects, by split."""

import sys
from collections.abc import Mapping, Sequence
from glob import escape, glob, has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from billhook.assets import text_files

SPLITS = ("train", "validation", "test")
FORMATS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
TIMEOUT = 10.0
"""Seconds that the Hub may take to say whether it has a data set."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")

Data: TypeAlias = str | dict[str, str | list[str]]
"""`"tiny"`, a hub name (`"name"` or `"name:config"`), a folder, a file or a glob of files, or files by split."""
if TYPE_CHECKING:
    import datasets

    Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
    Table: TypeAlias = datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict
    """Data that is loaded already."""
else:  # where an argument may be an object of a class, a command line gives it what stands in the file that is named
    Rows = Table = Any  # and `datasets`, with pandas, takes a second to import


def is_table(data: object) -> TypeGuard["Table"]:
    """Tells whether something is an object of `datasets`; as long as nobody has imported that, nothing is."""
    if "datasets" not in sys.modules:
        return False
    import datasets

    return isinstance(data, datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | datasets.IterableDatasetDict)


def check_data(data: object, name: str = "data") -> None:
    """Refuses what names no data and holds none."""
    if is_table(data):
        return
    files = [data] if isinstance(data, str) else list(data.values()) if isinstance(data, dict) else []
    names = [file for of_split in files for file in (of_split if isinstance(of_split, list) else [of_split])]
    if not names or not all(isinstance(file, str) and file for file in names):
        raise ValueError(f"{name}={data!r} must be a name, a file, files by split, or an object of `datasets`")


def load_splits(data: Data | Table, streaming: bool = False) -> dict[str, Rows]:
    """Loads the splits of `data` with `datasets`: a folder may be a hub data set, and files alone are the split `train`."""
    import datasets

    check_data(data)
    if is_table(data):
        return _loaded(data, streaming)
    if data == "tiny":
        return _read("parquet", {split: [file] for split, file in text_files().items()}, streaming)
    if isinstance(files := _files_or_name(data), dict):
        return _read(_one_kind(files), files, streaming)
    splits = dict(datasets.load_dataset(*files, streaming=streaming))
    if any(is_line_text(rows) for rows in splits.values()):
        splits = dict(datasets.load_dataset(*files, streaming=streaming, keep_linebreaks=True))
    return splits


def check_available(data: Data, name: str = "data") -> None:
    """Refuses files that are not there or empty, and a folder or a data set that cannot be found; no rows are read."""
    check_data(data, name)
    if data == "tiny":
        return
    if isinstance(files := _files_or_name(data, name), dict):
        _one_kind(files)
        return
    import datasets

    if not Path(files[0]).is_dir():
        _ask_hub(files[0], name)
    try:
        datasets.load_dataset_builder(*files)
    except Exception as error:  # `datasets` raises all kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}={data!r} is no file here, and no folder or data set that can be read: {first}") from error


def _ask_hub(data: str, argument: str) -> None:
    """Refuses a data set that was never read if the Hub cannot be asked; it is asked once, where `datasets` asks six times."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, slash, name = data.rpartition("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}{slash and '___'}{camelcase_to_snakecase(name)}"
    if constants.HF_HUB_OFFLINE or data.count("/") > 1 or folder.is_dir():
        return
    try:
        HfApi().dataset_info(data, timeout=TIMEOUT)
    except (HfHubHTTPError, HFValidationError):  # the Hub has answered, or is not to be asked; `datasets` says what
        return
    except Exception as error:  # the client and what it is made of raise all kinds
        raise ValueError(
            f"{argument}={data!r} is no file or folder here, and the Hub cannot be asked for a data set of that name "
            f"({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
        ) from error


def _files_or_name(data: Data, argument: str = "data") -> dict[str, list[str]] | tuple[str, str | None]:
    """Returns files by split; or, of a folder or a data set, its name and its config."""
    if isinstance(data, str) and not Path(data).is_dir() and (has_magic(data) or _kind(data) or Path(data).is_file()):
        data = {"train": data}
    if isinstance(data, dict):
        return {split: _files(split, names, argument) for split, names in data.items()}
    name, _, config = (data, "", "") if Path(data).is_dir() else data.partition(":")
    return name, config or None


def _loaded(data: Table, streaming: bool) -> dict[str, Rows]:
    """Returns the splits of an object, each row of it a document; one table alone is the split `train`."""
    import datasets

    splits = dict(data) if isinstance(data, Mapping) else {"train": data}
    if not splits.keys() & set(SPLITS):
        raise ValueError(f"data: the splits are {', '.join(map(str, splits)) or 'none'}; one of {', '.join(SPLITS)} is needed")
    for split, rows in splits.items():
        plain = rows.with_format(None)
        plain._info = rows.info.copy()  # private: of the same info a change would show in the caller's table
        plain.info.builder_name = None  # where it came from lines of text, they have lost their ends
        splits[split] = plain.to_iterable_dataset() if streaming and isinstance(plain, datasets.Dataset) else plain
    return splits


def is_line_text(rows: Rows) -> bool:
    """Says whether a row is a line of a .txt file, not a document."""
    return bool(rows.info.builder_name == "text")


def _read(kind: str, files: Mapping[str, Sequence[str]], streaming: bool) -> dict[str, Rows]:
    import datasets

    options = {"keep_linebreaks": True} if kind == "text" else {}
    escaped = {split: [escape(name) for name in names] for split, names in files.items()}  # as `datasets` takes names for globs
    try:
        return dict(datasets.load_dataset(kind, data_files=escaped, streaming=streaming, **options))
    except Exception as error:
        names = [name for of_split in files.values() for name in of_split]
        if (wrong := next((name for name in names if not _is_utf8(name)), None)) is not None:
            raise ValueError(f"data: the file '{wrong}' is not encoded as UTF-8: save it as UTF-8") from error
        listed = ", ".join(f"'{name}'" for name in names)
        raise _unreadable(f"{'the file' if len(names) == 1 else 'the files'} {listed} cannot be read as {kind}", error) from error


def _is_utf8(file: str) -> bool:
    """Tells whether a file that is text as it lies there is encoded as UTF-8."""
    if Path(file).suffix.lower() in (*COMPRESSED, ".parquet"):
        return True
    try:
        with Path(file).open(encoding="utf-8") as lines:
            for _ in lines:
                pass
    except UnicodeDecodeError:
        return False
    return True


def _unreadable(what: str, error: Exception) -> ValueError:
    reason = str(error.__cause__ or error or type(error).__name__)
    if "at least one example" in reason:  # what `datasets` says of a file without rows
        reason = "no row was found"
    return ValueError(f"data: {what}, or hold no rows ({reason})")


def _kind(file: str) -> str | None:
    """Returns the format of a file by its ending; one more ending may name its compression."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _one_kind(files: Mapping[str, Sequence[str]]) -> str:
    kinds = {_kind(name) for names in files.values() for name in names}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        raise ValueError(f"data: files of one kind, ending in one of {', '.join(FORMATS)}, are needed; got {files}")
    return kind


def _files(split: str, names: str | list[str], argument: str) -> list[str]:
    """Returns the files of a split, those of a glob in the order of their names."""
    if split not in SPLITS:
        raise ValueError(f"{argument}: unknown split '{split}'; a split is one of {', '.join(SPLITS)}")
    files = list[str]()
    for name in [names] if isinstance(names, str) else names:
        is_glob = has_magic(name) and not Path(name).exists()
        matching = [file for file in sorted(glob(name, recursive=True)) if Path(file).is_file()] if is_glob else [name]
        if not matching:
            raise ValueError(f"{argument}: no file of the split '{split}' matches '{name}'")
        files += matching
    for name in files:
        if not Path(name).is_file():
            raise ValueError(f"{argument}: the file '{name}' of the split '{split}' does not exist")
        if Path(name).stat().st_size == 0:
            raise ValueError(f"{argument}: the file '{name}' of the split '{split}' is empty")
    return files


def check_columns(rows: Rows, split: str, *columns: str) -> None:
    """Refuses a split without one of the columns, or without any row."""
    names = column_names(rows)
    for column in columns:
        if column not in names:
            raise ValueError(f"the split '{split}' has no column '{column}'; it has {', '.join(names) or 'no rows'}")


def column_names(rows: Rows) -> list[str]:
    """Returns the columns; reads the first row of a stream that does not know them."""
    if rows.column_names:
        return list(rows.column_names)
    try:
        return list(next(iter(rows), {}))
    except Exception as error:
        raise _unreadable("the stream cannot be read", error) from error
