"""`billhook recipes`: packaged YAML configs, and warnings about their combination."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from billhook.cli.options import suggestion

PREFIX = "recipe:"
PACKAGE = Path(__file__).parents[1]


def recipes(name: str | None = None) -> None:
    """Lists the recipes for `billhook fit --config recipe:NAME`, or prints one of them.

    Recipes of callbacks need a base: `billhook fit --config recipe:base --config recipe:wanda --config recipe:export`. Save a
    printed recipe to a file to change it.

    Args:
        name: Recipe to print. Defaults to a list of all recipes.

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
    """Returns the files of all recipes by name: configs of callbacks, and bases."""
    packed, clone = PACKAGE / "recipes", PACKAGE.parents[1]
    bases = [clone / "examples" / f"{name}.yaml" for name in ("base", "quickstart")]
    paths = packed.glob("*.yaml") if packed.is_dir() else [*bases, *(clone / "callbacks").glob("*.yaml")]
    return {path.stem: path for path in sorted(paths, key=lambda path: path.stem)}


def recipe_file(name: str) -> Path:
    """Returns the file of a recipe, or raises if there is none."""
    files = recipe_files()
    if name not in files:
        hint = suggestion(name, [*files])
        raise ValueError(f"unknown recipe '{name}'.{hint} Recipes: {', '.join(files)}. `billhook recipes` describes them.")
    return files[name]


def first_sentence(text: str) -> str:
    r"""Returns the first sentence of a YAML file's leading comment.

    >>> first_sentence("# Magnitude: the smallest\n# weights go. It needs no data.\ntrainer: {}")
    'Magnitude: the smallest weights go.'
    """
    comment = re.match(r"(?:#.*\n?)*", text)[0].splitlines()  # type: ignore[index]  # this always matches
    words = " ".join(line.removeprefix("#").strip() for line in comment)
    return re.split(r"(?<=\.)\s", words, maxsplit=1)[0]


def resolve_recipes(words: Sequence[str]) -> list[str]:
    """Replaces `--config recipe:NAME` with the recipe's file in a command line.

    >>> resolve_recipes(["fit", "--config", "recipe:wanda"])[2].endswith("wanda.yaml")
    True
    """
    made = []
    for option, word in zip(["", *words], words, strict=False):
        start = "--config=" if word.startswith("--config=") else ""
        name = word.removeprefix(start)
        is_recipe = name.startswith(PREFIX) and (start or option in ("--config", "-c"))
        made.append(f"{start}{recipe_file(name.removeprefix(PREFIX))}" if is_recipe else word)
    return made


def config_files(words: Sequence[str]) -> list[str]:
    """Returns the files of `--config` in a command line, in order.

    >>> config_files(["fit", "--config", "base.yaml", "--config=wanda.yaml", "--model.lr", "1"])
    ['base.yaml', 'wanda.yaml']
    """
    pairs = zip(["", *words], words, strict=False)
    named = [word for option, word in pairs if option in ("--config", "-c") or word.startswith("--config=")]
    return [word.removeprefix("--config=") for word in named]


def config_warnings(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Returns warnings about configs that drop callbacks, or name no model or data.

    Args:
        words: The command line.
        names: The configs as the user wrote them, such as `recipe:wanda`.
    """
    configs = []
    for file in dict.fromkeys(config_files(words)):
        try:
            content = yaml.safe_load(Path(file).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            content = None
        if not isinstance(content, dict):  # the parser reports it
            return []
        configs.append((file, content))
    if not configs:
        return []
    warnings, callbacks, chosen = list[str](), list[str](), set[str]()
    for file, content in configs:
        trainer = content.get("trainer")
        trainer = trainer if isinstance(trainer, dict) else {}
        if "callbacks" in trainer and callbacks:
            dropped = ", ".join(callbacks)
            warnings.append(f"{file} drops the callbacks of earlier configs ({dropped}). To add to them, use `callbacks+:`.")
        callbacks = _class_names(trainer["callbacks"]) if "callbacks" in trainer else callbacks
        callbacks += _class_names(trainer.get("callbacks+"))
        for part in ("model", "data"):
            choice = content.get(part)
            if isinstance(choice, str) or (isinstance(choice, dict) and choice.keys() & {part, "class_path", "init_args"}):
                chosen.add(part)
    missing = []
    for part in ("model", "data"):
        option = rf"--{part}(=|$|\.({part}|class_path|init_args)\b)"
        if part not in chosen and not any(re.match(option, word) for word in words):
            missing.append(part)
    if missing:
        choose = "chooses" if len(names) == 1 else "choose"
        options = " and ".join(f"--{part}.{part}" for part in missing)
        warnings.append(
            f"{' and '.join(names)} {choose} no {' and no '.join(missing)}, so that the packaged default is used. Start with a "
            f"base, such as `--config recipe:base --config {names[0]}`, or pass {options}."
        )
    return warnings


def _class_names(callbacks: object) -> list[str]:
    names = []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if callback:
            path = callback.get("class_path") if isinstance(callback, dict) else callback
            names.append(str(path).rpartition(".")[2])
    return names
