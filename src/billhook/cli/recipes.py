"""`billhook recipes`: the YAML files that come with billhook."""

import re
import textwrap
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from billhook.cli.misspelt import near

PREFIX = "recipe:"
PACKAGE = Path(__file__).parents[1]


def recipe_files() -> dict[str, Path]:
    """Returns the fragments of callbacks, and the bases to put them on, by name."""
    packed, clone = PACKAGE / "recipes", PACKAGE.parents[1]
    bases = [clone / "examples" / f"{name}.yaml" for name in ("base", "quickstart")]
    found = packed.glob("*.yaml") if packed.is_dir() else [*bases, *(clone / "callbacks").glob("*.yaml")]
    return {path.stem: path for path in sorted(found, key=lambda path: path.stem)}


def recipe_file(name: str) -> Path:
    """Returns the file of a recipe; refuses a name that there is not, and lists those there are."""
    files = recipe_files()
    if name not in files:
        raise ValueError(
            f"{PREFIX}{name} must be one of {', '.join(files)}; `billhook recipes` says what each is.{near(name, [*files])}"
        )
    return files[name]


def with_files(given: Sequence[str]) -> list[str]:
    """Puts the files of recipes in the place of `--config recipe:NAME` among the words of a command line.

    >>> with_files(["fit", "--config", "recipe:wanda"])[2].endswith("wanda.yaml")
    True
    """
    words, option = list[str](), ""
    for word in given:
        before, is_one, name = word.partition(PREFIX)
        named = bool(is_one) and (before == "--config=" or (not before and option in ("--config", "-c")))
        words.append(before + str(recipe_file(name)) if named else word)
        option = word
    return words


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
    for own, path in files.items():
        print(
            textwrap.fill(first_sentence(path.read_text()), 120, initial_indent=own.ljust(width), subsequent_indent=" " * width)
        )


def first_sentence(text: str) -> str:
    r"""Returns the first sentence of the comment at the beginning of a YAML file.

    >>> first_sentence("# Magnitude: the smallest\n# weights go. It needs no data.\ntrainer: {}")
    'Magnitude: the smallest weights go.'
    """
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines if not line.startswith(FOR_EDITORS))
    found = re.match(r".*?\.(?=\s|$)", comment)
    return found[0] if found else comment
