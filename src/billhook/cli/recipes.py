"""`billhook recipes`: the YAML files that come with billhook, and warnings of files that do not fit together."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from billhook.cli.options import near

PREFIX = "recipe:"
PACKAGE = Path(__file__).parents[1]
FOR_EDITORS = "# yaml-language-server:"
"""How the line begins that names the schema of a file."""


def recipes(name: str | None = None) -> None:
    """Lists the configs that `billhook fit --config recipe:NAME` takes, or prints one, to be changed in a file of your own.

    Those of callbacks go on a base: `billhook fit --config recipe:base --config recipe:wanda --config recipe:export`.

    Args:
        name: A recipe to print; by default all are listed, each with what it is.

    Raises:
        ValueError: If there is no such recipe.
    """
    if name is not None:
        print(recipe_file(name.removeprefix(PREFIX)).read_text(), end="")
        return
    files = recipe_files()
    width = max(map(len, files)) + 2
    for recipe, path in files.items():
        about = first_sentence(path.read_text())
        print(textwrap.fill(about, 120, initial_indent=recipe.ljust(width), subsequent_indent=" " * width))


def recipe_files() -> dict[str, Path]:
    """Returns the fragments of callbacks, and the bases to put them on, by name."""
    packed, clone = PACKAGE / "recipes", PACKAGE.parents[1]
    bases = [clone / "examples" / f"{name}.yaml" for name in ("base", "quickstart")]
    paths = packed.glob("*.yaml") if packed.is_dir() else [*bases, *(clone / "callbacks").glob("*.yaml")]
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}


def recipe_file(name: str) -> Path:
    """Returns the file of a recipe; refuses a name that there is not, and lists those there are."""
    files = recipe_files()
    if name not in files:
        what = f"`billhook recipes` says what each is.{near(name, [*files])}"
        raise ValueError(f"{PREFIX}{name} must be one of {', '.join(files)}; {what}")
    return files[name]


def first_sentence(text: str) -> str:
    r"""Returns the first sentence of the comment at the beginning of a YAML file.

    >>> first_sentence("# Magnitude: the smallest\n# weights go. It needs no data.\ntrainer: {}")
    'Magnitude: the smallest weights go.'
    """
    comment = re.match(r"(?:#.*\n?)*", text)[0].splitlines()  # type: ignore[index]  # this always matches
    words = " ".join(line.removeprefix("#").strip() for line in comment if not line.startswith(FOR_EDITORS))
    return re.split(r"(?<=\.)\s", words, maxsplit=1)[0]


def with_files(words: Sequence[str]) -> list[str]:
    """Puts the files of recipes in the place of `--config recipe:NAME` among the words of a command line.

    >>> with_files(["fit", "--config", "recipe:wanda"])[2].endswith("wanda.yaml")
    True
    """
    made = list[str]()
    for option, word in zip(["", *words], words, strict=False):
        start = "--config=" if word.startswith("--config=") else ""
        name = word.removeprefix(start)
        is_recipe = name.startswith(PREFIX) and (start or option in ("--config", "-c"))
        made.append(f"{start}{recipe_file(name.removeprefix(PREFIX))}" if is_recipe else word)
    return made


def configs_in(words: Sequence[str]) -> list[str]:
    """Returns the files of `--config` on a command line, in order.

    >>> configs_in(["fit", "--config", "base.yaml", "--config=wanda.yaml", "--model.lr", "1"])
    ['base.yaml', 'wanda.yaml']
    """
    pairs = zip(["", *words], words, strict=False)
    return [
        word.removeprefix("--config=") for option, word in pairs if option in ("--config", "-c") or word.startswith("--config=")
    ]


def warnings_of(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns warnings of files that drop the callbacks of those before them, and of files that choose no model or no data.

    Args:
        words: The command line.
        names: Its files as they were called, such as `recipe:wanda`.
    """
    files = [(file, content) for file in configs_in(words) if (content := _read(file)) is not None]
    if not files or len(files) < len(configs_in(words)):  # the parser says what is wrong with the others
        return []
    warnings, callbacks, chosen = list[str](), list[str](), set[str]()
    for file, content in files:
        trainer = content.get("trainer")
        trainer = trainer if isinstance(trainer, dict) else {}
        if "callbacks" in trainer and callbacks:
            dropped = ", ".join(callbacks)
            warnings.append(
                f"{file} drops {dropped}, which files before it gave: `callbacks+:` in the place of `callbacks:` adds"
            )
        callbacks = _class_names(trainer["callbacks"]) if "callbacks" in trainer else callbacks
        callbacks += _class_names(trainer.get("callbacks+"))
        for part in ("model", "data"):
            choice = content.get(part)
            if isinstance(choice, str) or (isinstance(choice, dict) and choice.keys() & {part, "class_path", "init_args"}):
                chosen.add(part)
    for part in ("model", "data"):
        if any(re.match(rf"--{part}(=|$|\.({part}|class_path|init_args)\b)", word) for word in words):
            chosen.add(part)
    missing = [part for part in ("model", "data") if part not in chosen]
    if missing:
        are = "is a fragment that says" if len(names) == 1 else "are fragments that say"
        what, options = (" and ".join(way.format(part) for part in missing) for way in ("no {0}", "--{0}.{0}"))
        base = f"put a base before, as in `--config recipe:base --config {names[0]}`, or give {options}"
        warnings.append(f"{' and '.join(names)} {are} {what}, so that what comes with billhook is taken: {base}")
    return warnings


def _read(file: str) -> dict[str, Any] | None:
    """Reads a file; None where it is none or no mapping."""
    try:
        plain = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return plain if isinstance(plain, dict) else None


def _class_names(callbacks: object) -> list[str]:
    every = callbacks if isinstance(callbacks, list) else [callbacks]
    paths = [str(one.get("class_path")) if isinstance(one, dict) else str(one) for one in every if one]
    return [path.rpartition(".")[2] for path in paths]
