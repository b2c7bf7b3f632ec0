"""Finds the YAML files that `--config recipe:NAME` takes: in the installed package, or in the clone that it is run from."""

from collections.abc import Sequence
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
