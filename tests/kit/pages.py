"""Runs the code blocks of a page of docs/, in order, in one namespace and one working folder, as a reader would.

What an author has to do: begin each block in the first column, and name its language.

- ``python`` is executed; a page is one script, and a block sees what those above it made.
- ``console`` or ``bash``: lines that begin with `billhook` are run (a line that ends in a backslash goes on), and so is
  `python FILE.py`. Other lines, such as `pip install`, are left alone.
- ``yaml`` is parsed by the CLI's own parser, on top of examples/base.yaml. Options of another command than `fit` are `shown`.
- ``text`` under such a block is what it prints, and is compared: word for word, but numbers need only be numbers, and `...`
  stands for anything. What is not printed by a block belongs in a block without a language, which is left alone.
- A title, as in ```` ```yaml title="gqa.yaml" ````, writes the block to that file in the working folder, too. Any language may
  have one; python with a title is only written, for `python FILE.py` and `class_path`.

A comment on a line of its own before a block says that it is not run:

- `<!-- parsed -->`: commands are parsed by their real parser, and python is compiled. For what takes long, or needs a hub.
- `<!-- shown -->`: code of other libraries; python and YAML are read, and nothing else is done.
- `<!-- refused -->`: the block must fail, and the ``text`` block under it is the message.

`<!-- needs onnxruntime -->` anywhere skips the page where that package is missing. The working folder has `examples` and
`callbacks` as a clone does, and real text in `train.txt` and `test.txt`. Use the model "tiny", few examples and few steps: all
pages together take a minute.
"""

import ast
import contextlib
import importlib
import inspect
import io
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

import billhook as bh
from billhook.cli.main import main
from billhook.cli.options import COMMANDS, LIGHTNING

ROOT = Path(__file__).parents[2]
LANGUAGES = {"python", "console", "bash", "yaml", "text", "json", "jsonl", "toml", "csv"}
BLOCK = re.compile(
    r'(?:^<!-- (?P<marker>parsed|shown|refused) -->\n+)?^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```',
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code of a page, and where it stands."""

    page: str
    line: int
    language: str
    code: str
    marker: str | None = None
    title: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_in(path: Path) -> list[Block]:
    """Returns the blocks of a page whose language is named."""
    text = path.read_text()
    name = path.relative_to(ROOT).as_posix()
    return [
        Block(name, text.count("\n", 0, one.start("code")) + 1, one["language"], one["code"], one["marker"], one["title"])
        for one in BLOCK.finditer(text)
    ]


def needed_by(path: Path) -> list[str]:
    """Returns the packages that a page says it needs."""
    return re.findall(r"<!-- needs ([\w.]+) -->", path.read_text())


def unknown_in(block: Block) -> list[str]:
    """Returns what a block says of billhook that is not there: names, arguments of calls, commands."""
    if block.language == "yaml":
        yaml.safe_load(block.code)
    if block.language in ("console", "bash"):
        commands = [words[1] for words in _lines(block.code) if words[0] == "billhook" and len(words) > 1]
        return [name for name in commands if name not in (*COMMANDS, *LIGHTNING) and not name.startswith("-")]
    if block.language != "python":
        return []
    unknown = []
    for node in ast.walk(ast.parse(block.code, block.place)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "billhook":
            module = importlib.import_module(node.module)
            unknown += [one.name for one in node.names if not hasattr(module, one.name)]
        if isinstance(node, ast.Attribute) and _named(node) is None and _named(node.value) is not None:
            unknown.append(ast.unparse(node))
        if isinstance(node, ast.Call) and callable(function := _named(node.func)):
            parameters = inspect.signature(function).parameters
            if all(one.kind is not one.VAR_KEYWORD for one in parameters.values()):
                keywords = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
                unknown += [f"{ast.unparse(node.func)}({name}=)" for name in keywords if name not in parameters]
    return unknown


def _named(node: ast.AST) -> Any:
    """What a chain of attributes names that begins with `bh`: the package, what it exports, or what that holds; or None."""
    if isinstance(node, ast.Name):
        return bh if node.id == "bh" else None
    return getattr(_named(node.value), node.attr, None) if isinstance(node, ast.Attribute) else None


def run_page(blocks: list[Block], names: dict[str, Any]) -> dict[str, Any]:
    """Runs blocks in the current folder, and compares what they print; returns the names that they made."""
    told = None
    for block in blocks:
        if block.title is not None:
            assert ROOT not in Path(block.title).resolve().parents, f"{block.place} would write into the clone"
            Path(block.title).write_text(block.code)
        if block.language == "text" and block.marker is None:
            assert told is None or printed(block.code, told), f"{block.place} says\n{block.code}\nand what is printed is\n{told}"
            told = None
        else:
            told = _run(block, names)
    return names


def _run(block: Block, names: dict[str, Any]) -> str | None:
    """Runs a block; returns what it prints, or the message with which it fails, or None if it is not run."""
    kind = "console" if block.language == "bash" else block.language
    if block.marker in ("parsed", "shown") or kind not in ("python", "console") or (block.title and kind == "python"):
        _read(block, kind)
        return None
    message, out, said = None, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said if block.marker == "refused" else sys.stderr):
        try:
            _python(block, names) if kind == "python" else _console(block)
        except (Exception, SystemExit) as error:
            if block.marker != "refused":
                raise AssertionError(f"{block.place} fails: {error}\n{out.getvalue()}") from error
            message = said.getvalue() if isinstance(error, SystemExit) and isinstance(error.code, int) else str(error)
    assert (block.marker == "refused") == (message is not None), f"{block.place} is not refused"
    return out.getvalue() if message is None else message


def _read(block: Block, kind: str) -> None:
    """Does with a block what is possible without running it."""
    if kind == "python":
        ast.parse(block.code, block.place)
    elif kind == "yaml":
        yaml.safe_load(block.code)
        if block.marker != "shown":
            Path(".block.yaml").write_text(block.code)
            _parse(["fit", "--config", "examples/base.yaml", "--config", ".block.yaml"], block)
    elif kind == "console" and block.marker == "parsed":
        for words in _lines(block.code):
            if words[0] == "billhook":
                _parse(words[1:], block)


def _python(block: Block, names: dict[str, Any]) -> None:
    exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)


def _console(block: Block) -> None:
    for words in _lines(block.code):
        if words[0] == "billhook":
            _command(words[1:])
        elif words[0] == "python" and words[1].endswith(".py"):
            with mock.patch.object(sys, "argv", words[1:]):
                runpy.run_path(words[1], run_name="__main__")


def _lines(code: str) -> list[list[str]]:
    """Splits the lines of a shell into words, without comments and prompts."""
    lines = re.sub(r"\\\n\s*", " ", code).splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [one for one in words if one]


def _command(words: list[str]) -> None:
    """Runs a command; that it ends the process by itself, as `--help` does, is no failure."""
    try:
        main(words)
    except SystemExit as end:
        if end.code:
            raise


def _parse(words: list[str], block: Block) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            _command([*words, "--print_config"])
    except SystemExit as end:
        raise AssertionError(f"{block.place} is not parsed: {end} {said.getvalue()}") from end


def printed(expected: str, told: str) -> bool:
    """Tells whether text is what a page says, apart from numbers and their signs, spaces and what `...` stands for."""
    pattern = r"\s*.*\s*".join(re.escape(_plain(piece)) for piece in expected.split("..."))
    return re.fullmatch(pattern, _plain(told), re.DOTALL) is not None


def _plain(text: str) -> str:
    text = re.sub(r"(?<=\s)[+-](?=\d)", "", text)
    text = re.sub(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", "0", text)
    return re.sub(r"-{2,}", "--", re.sub(r"\s+", " ", text)).strip()
