"""Finds callbacks that a later config file drops without a word."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def configs_in(words: Sequence[str]) -> list[str]:
    """Returns the files of `--config` on a command line, in order.

    >>> configs_in(["fit", "--config", "base.yaml", "--config=wanda.yaml", "--model.lr", "1"])
    ['base.yaml', 'wanda.yaml']
    """
    after = [following for word, following in zip(words, words[1:], strict=False) if word in ("--config", "-c")]
    inside = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    return sorted([*after, *inside], key=lambda file: next(place for place, word in enumerate(words) if word.endswith(file)))


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


def _trainer_of(file: str) -> dict[str, Any]:
    """Reads a file's trainer; nothing where it cannot be read, which the parser says."""
    try:
        plain = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    trainer = plain.get("trainer") if isinstance(plain, dict) else None
    return trainer if isinstance(trainer, dict) else {}


def _names(callbacks: object) -> list[str]:
    """Names callbacks by their classes."""
    every = callbacks if isinstance(callbacks, list) else [callbacks]
    paths = [str(one.get("class_path")) if isinstance(one, dict) else str(one) for one in every if one]
    return [path.rpartition(".")[2] for path in paths]
