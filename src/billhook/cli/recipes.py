"""`billhook recipes`: the YAML files that come with billhook."""

import re
import textwrap
from itertools import takewhile

from billhook.cli.packaged import PREFIX, recipe_file, recipe_files

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
