"""Sources of text that a calibration reads: names of files and data sets, or objects of `datasets`, and what each is called."""

from collections.abc import Collection, Mapping, Sequence
from glob import has_magic
from itertools import chain, count
from pathlib import Path
from typing import TypeAlias

from billhook.calibration.generated import NAME as GENERATED
from billhook.calibration.reading import Table, check_data, is_table

Source: TypeAlias = str | dict[str, str | list[str]]
"""`"generated"`, `"tiny"`, a file, a glob of files, a folder, a hub name, or files by split."""
Sources: TypeAlias = Source | Table | Sequence[Source | Table]
"""One or several, in Python also objects of `datasets`."""
SHOWN = 4
"""How many files of one split a source is named after, at most."""


def named(sources: Sources, taken: Collection[str] = ()) -> dict[str, Source | Table]:
    """Returns sources by name: of a file its stem, of an object the name of its data set, numbered where another has it.

    Args:
        sources: One or several.
        taken: Names that no object is given.

    Raises:
        ValueError: If there is none, one cannot be read or is a stream, or two have a name in common.
    """
    given = list(sources) if isinstance(sources, Sequence) and not isinstance(sources, str) else [sources]
    for source in given:
        _check(source)
    found = dict[str, Source | Table]()
    for source in given:
        name = _of_object(source, {*found, *taken}) if is_table(source) else _of_files(source)
        if name == GENERATED and source != GENERATED:
            raise ValueError(f"sources: '{source}' has the name of what the model writes, '{GENERATED}': rename it")
        if name in found or any(one is source for one in found.values()):
            raise ValueError(f"sources={sources!r} must be one or more, each once: '{name}' is there twice")
        found[name] = source
    if not found:
        raise ValueError(f"sources={sources!r} must be one or more, each once")
    return found


def _check(source: object) -> None:
    """Refuses what names no text and holds none, or none that rows can be drawn of."""
    check_data(source, "sources")
    if not is_table(source):
        return
    import datasets

    if isinstance(source, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise ValueError(
            f"sources: rows are drawn of all that there are, and of a stream ({type(source).__name__}) nobody knows them: give a "
            "part of it, such as datasets.Dataset.from_list(list(stream.take(1000)))"
        )
    if isinstance(source, datasets.DatasetDict) and "train" not in source:
        splits = ", ".join(map(str, source)) or "none"
        raise ValueError(f"sources: calibration needs a split 'train', and the DatasetDict has {splits}")


def _of_files(source: Source) -> str:
    """Names a source; files by split after those of `train`, a glob as it is written."""
    if isinstance(source, dict):
        files = source.get("train") or next(iter(source.values()), "")
        names = [_of_files(file) for file in ([files] if isinstance(files, str) else files)]
        shown = names if len(names) <= SHOWN else [*names[: SHOWN - 1], f"{len(names) - SHOWN + 1} more"]
        return " + ".join(shown)
    return Path(source).stem if Path(source).suffix and not has_magic(source) else source


def _of_object(source: Table, taken: Collection[str]) -> str:
    """Names an object after the data set that it was loaded from, if it has a name of its own."""
    info = (source["train"] if isinstance(source, Mapping) else source).info
    own = info.dataset_name if info.dataset_name != info.builder_name else None  # which is "json" of files
    name = own or "dataset"
    return next(one for one in chain([name], (f"{name} {n}" for n in count(2))) if one not in {*taken, GENERATED})
