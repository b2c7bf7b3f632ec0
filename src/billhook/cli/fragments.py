"""Warns of config files that do not fit together: one drops what others gave, or none says which model is trained on what."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

NEEDED = ("model", "data")
"""What a base says: each is a class, or arguments of billhook's own, of which the first has the same name."""


def configs_in(words: Sequence[str]) -> list[str]:
    """Returns the files of `--config` on a command line, in order.

    >>> configs_in(["fit", "--config", "base.yaml", "--config=wanda.yaml", "--model.lr", "1"])
    ['base.yaml', 'wanda.yaml']
    """
    pairs = zip(["", *words], words, strict=False)
    return [
        word.removeprefix("--config=") for option, word in pairs if option in ("--config", "-c") or word.startswith("--config=")
    ]


def without_base(words: Sequence[str], named: Sequence[str]) -> list[str]:
    """Returns a warning where no file of a command line, and no option, says which model is trained, or on what.

    Args:
        words: The command line.
        named: The files as they were called, such as `recipe:wanda`.

    >>> without_base(["fit", "--config", "nowhere.yaml"], ["nowhere.yaml"])
    []
    """
    read = [_read(file) for file in configs_in(words)]
    files = [content for content in read if content is not None]
    missing = [part for part in NEEDED if not _chosen(part, words) and not any(_says(content, part) for content in files)]
    if not missing or not files or len(files) < len(read):
        return []
    one = f"{named[0]} is a fragment that says" if len(named) == 1 else f"{' and '.join(named)} are fragments that say"
    what, options = (" and ".join(way.format(part) for part in missing) for way in ("no {0}", "--{0}.{0}"))
    base = f"put a base before, as in `--config recipe:base --config {named[0]}`, or give {options}"
    return [f"{one} {what}, so that what comes with billhook is taken: {base}"]


def dropped_callbacks(files: Sequence[str]) -> list[str]:
    """Returns a warning for each file whose `callbacks:` replaces what files before it gave; `callbacks+:` would add to that."""
    given, warnings = list[str](), list[str]()
    for file in files:
        trainer = _trainer_of(file)
        own = trainer.get("callbacks")
        if "callbacks" in trainer and given:
            names = ", ".join(given)
            warnings.append(f"{file} drops {names}, which files before it gave: `callbacks+:` in the place of `callbacks:` adds")
        given = _names(own) if "callbacks" in trainer else given
        given += _names(trainer.get("callbacks+"))
    return warnings


def added(words: Sequence[str]) -> list[str]:
    """Returns the names of the callbacks that the files and options of a command line give, in order.

    >>> added(["fit", "--trainer.callbacks+=billhook.Export", "--trainer.callbacks+", "Report"])
    ['Export', 'Report']
    """
    names = list[str]()
    for before, word in zip(["", *words], words, strict=False):
        if found := configs_in([before, word] if before in ("--config", "-c") else [word]):
            trainer = _trainer_of(found[-1])
            names = _names(trainer["callbacks"]) if "callbacks" in trainer else names
            names += _names(trainer.get("callbacks+"))
        elif before == "--trainer.callbacks+" or word.startswith("--trainer.callbacks+="):
            names += _names(word.removeprefix("--trainer.callbacks+="))
    return names


def _chosen(part: str, words: Sequence[str]) -> bool:
    """Tells whether an option says which model or data."""
    return any(re.match(rf"--{part}(=|$|\.({part}|class_path|init_args)\b)", word) for word in words)


def _says(content: dict[str, Any], part: str) -> bool:
    """Tells whether a file says which model or data, and not only how it is used."""
    own = content.get(part)
    return isinstance(own, str) or (isinstance(own, dict) and not own.keys().isdisjoint((part, "class_path", "init_args")))


def _trainer_of(file: str) -> dict[str, Any]:
    trainer = (_read(file) or {}).get("trainer")
    return trainer if isinstance(trainer, dict) else {}


def _read(file: str) -> dict[str, Any] | None:
    """Reads a file; None where it is none or no mapping, which the parser says."""
    try:
        plain = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return plain if isinstance(plain, dict) else None


def _names(callbacks: object) -> list[str]:
    """Names callbacks by their classes."""
    every = callbacks if isinstance(callbacks, list) else [callbacks]
    paths = [str(one.get("class_path")) if isinstance(one, dict) else str(one) for one in every if one]
    return [path.rpartition(".")[2] for path in paths]
