"""Fills in what pages of the manual show of the code: the commands with their options, and the YAML fragments; lists its pages.

A page says where by a line `<!-- made by hooks.py: commands -->`. The text is that of the docstrings that `--help` prints.
"""

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from itertools import groupby
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import griffe

from billhook.cli.options import COMMANDS, Command, command_of

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: object) -> str:
    """Fills in a page, as MkDocs asks for it."""
    return re.sub(r"<!-- made by hooks.py: (\w+) -->", lambda found: MADE[found[1]](), markdown)


def on_post_build(config: Mapping[str, Any], **_: object) -> None:
    """Writes `llms.txt` beside the pages, as MkDocs asks for it."""
    Path(config["site_dir"], "llms.txt").write_text(llms(config["nav"], Path(config["docs_dir"]), config["site_description"]))


def llms(nav: Sequence[Any], folder: Path, about: str) -> str:
    """Lists the pages with their first sentences for language models that read the manual, as llmstxt.org describes."""
    lines = ["# billhook", "", f"> {about}", *_sections_of(nav, folder)]
    return "\n".join([*lines, ""])


def _sections_of(nav: Sequence[Any], folder: Path) -> list[str]:
    """Returns the lines of the pages, each group under the name of the innermost section of the menu that has it."""
    lines = []
    for entry in nav:
        (section, pages), *_ = entry.items() if isinstance(entry, dict) else [("", [entry])]
        if any(isinstance(page, dict) for page in pages):
            lines += _sections_of(pages, folder)
        else:
            lines += ["", f"## {section}", ""] if section else [""]
            lines += [_listed(folder / page, page) for page in pages]
    return lines


def _listed(path: Path, page: str) -> str:
    title, _, text = path.read_text().partition("\n")
    parts = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).split("\n\n")
    prose = next((part for part in map(str.strip, parts) if re.match(r"[\w*`]", part)), "")
    sentence = re.split(r"(?<=\.)\s", " ".join(prose.replace("**", "").split()).removeprefix("Answer. "), maxsplit=1)[0]
    return f"- [{title.removeprefix('# ')}]({page}): {sentence.removesuffix(':')}"


def commands() -> str:
    """Returns how each command is called, its manual and its own options, and where those are that it shares."""
    return "\n\n".join(_command(name) for name in COMMANDS)


def shared() -> str:
    """Returns the options that several commands take, one table for each dataclass that holds them."""
    return "\n\n".join(_group(owner) for owner in _shared())


def base() -> str:
    """Returns the YAML that fragments are put on."""
    return f'```yaml title="examples/base.yaml"\n{(ROOT / "examples" / "base.yaml").read_text()}```'


def fragments() -> str:
    """Returns each YAML fragment, under its name."""
    return "\n\n".join(_fragment(path) for path in sorted((ROOT / "callbacks").glob("*.yaml")))


MADE: dict[str, Callable[[], str]] = {"commands": commands, "shared": shared, "base": base, "fragments": fragments}


def _command(name: str) -> str:
    command = command_of(name)
    given = [one for one in inspect.signature(command).parameters.values() if one.name not in _dataclasses(command)]
    needed, chosen = [one for one in given if one.default is one.empty], [one for one in given if one.default is not one.empty]
    words = " ".join(one.name.upper() + (" ..." if _type(one.annotation).startswith("list") else "") for one in needed)
    about = _about(command)
    rows = [_row(one.name.upper(), one.annotation, MISSING, about) for one in needed]
    rows += [_row(f"--{one.name}", one.annotation, one.default, about) for one in chosen]
    own = [owner for owner in _owners(command) if owner not in _shared()]
    rows += [row for owner in own for row in _rows(owner)]
    links = [f"[{one.__name__}](#{one.__name__.lower()})" for one in _owners(command) if one in _shared()]
    also = f"\n\nShared options: {', '.join(links)}." if links else ""
    return f"### {name}\n\n```\nbillhook {name} {words} [options]\n```\n\n{_prose(command)}\n\n{_table(rows)}{also}"


def _group(owner: type) -> str:
    takers = ", ".join(f"[`{name}`](#{name})" for name in COMMANDS if owner in _owners(command_of(name)))
    return f"### {owner.__name__}\n\n{_prose(owner)}\n\nCommands: {takers}.\n\n{_table(_rows(owner))}"


def _fragment(path: Path) -> str:
    """Returns a fragment under its name: its comments as prose, with commands among them as code, and then the YAML."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# yaml-language-server:")]
    comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
    parts = [
        f"```\n{line}\n```" if command else " ".join([line, *following])
        for command, (line, *following) in ((command, list(run)) for command, run in groupby(comments, _is_command))
    ]
    code = "\n".join(line for line in lines if not line.startswith("#"))
    return "\n\n".join([f"### {path.stem}", *parts, f'```yaml title="callbacks/{path.name}"\n{code}\n```'])


def _is_command(line: str) -> bool:
    return line.startswith("billhook ")


def _dataclasses(command: Command) -> dict[str, type]:
    given = inspect.signature(command).parameters.values()
    return {one.name: one.annotation for one in given if isinstance(one.annotation, type) and is_dataclass(one.annotation)}


def _owners(command: Command) -> list[type]:
    """Returns the dataclasses whose fields are options of a command, those that a dataclass inherits from first."""
    return [one for group in _dataclasses(command).values() for one in reversed(group.__mro__) if is_dataclass(one)]


def _shared() -> list[type]:
    """Returns the dataclasses whose fields are options of more than one command."""
    owners = [owner for name in COMMANDS for owner in _owners(command_of(name))]
    return [owner for owner in dict.fromkeys(owners) if owners.count(owner) > 1]


def _rows(owner: type) -> list[str]:
    """Returns a row for each field that a dataclass has, or has another default for, beside those that it inherits from."""
    about = {name: says for one in reversed(owner.__mro__) for name, says in _about(one).items()}
    own = [one for one in fields(owner) if one.name in inspect.get_annotations(owner)]
    return [_row(f"--{one.name}", one.type, one.default, about) for one in own]


def _sections(documented: object) -> list[griffe.DocstringSection]:
    return griffe.Docstring(inspect.cleandoc(documented.__doc__ or "")).parse("google", warnings=False)


def _prose(documented: object) -> str:
    return "\n\n".join(one.value for one in _sections(documented) if one.kind is griffe.DocstringSectionKind.text)


def _about(documented: object) -> dict[str, str]:
    """Returns what a docstring says of each argument."""
    parameters = [one.value for one in _sections(documented) if one.kind is griffe.DocstringSectionKind.parameters]
    return {one.name: one.description for found in parameters for one in found}


def _row(name: str, kind: object, default: object, about: dict[str, str]) -> str:
    says = " ".join(about.get(name.lstrip("-").lower(), "").split()).replace("|", r"\|")
    value = "" if default is MISSING or default is inspect.Parameter.empty else f"`{_value(default)}`"
    return f"| `{name}` | {_type(kind)} | {value} | {says} |"


def _table(rows: Iterable[str]) -> str:
    return "\n".join(["| option | type | default | |", "|---|---|---|---|", *rows])


def _type(kind: object) -> str:
    """Returns the name of a type as one would say it: `int or float or null`."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(json.dumps(one) for one in inside)
    if origin in (Union, UnionType):
        return " or ".join(_type(one) for one in inside)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type(one) for one in inside)}]"
    return "null" if kind in (None, NoneType) else getattr(kind, "__name__", str(kind))


def _value(default: object) -> str:
    plain = default is None or isinstance(default, str | int | float | bool | list | dict)
    return json.dumps(default).strip('"') if plain else textwrap.shorten(repr(default), 80)
