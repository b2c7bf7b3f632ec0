"""What the documentation names is there."""

import ast
import inspect
import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import billhook as bh
from billhook.cli.examples import TextOptions
from billhook.cli.options import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
SPACES = (bh.criteria, bh.importance, bh.kv_methods, bh.pruning, bh.training)
PUBLIC = {f"{one.__name__}.{name}": getattr(one, name) for one in SPACES for name in one.__all__ if not hasattr(bh, name)}
PUBLIC |= {f"billhook.{name}": getattr(bh, name) for name in bh.__all__}
REFERENCE = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
SOURCES = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_and_files_that_it_names(page):
    text = page.read_text()
    files = re.findall(r"`(?:tests/(?:\w+/)?)?(test_[\w*]+\.py)`", text)
    assert all(list((ROOT / "tests").rglob(name)) for name in files)
    functions = re.findall(r"`(?:tests/\w+/)?((?:test_|Test)\w+)`", text)
    assert [name for name in functions if not re.search(rf"(?:def|class) {name}\b", SOURCES)] == []
    paths = re.findall(r"(?<!tests/)\b((?:benchmarks|examples|callbacks|docs)/[\w/*]+\.(?:py|yaml|md|png))", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_it_links_are_there(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_readme_is_read_in_two_minutes():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110
    assert max(map(len, (line for line in lines if not line.startswith("|")))) <= 140


GUIDE = [page for page in PAGES if "evidence" not in page.relative_to(ROOT).parts]
"""README, and the pages of the guide and the reference: short sentences in the words of the glossary, without history."""
NEVER = re.compile(
    r"\b(?:affair|alike|bit for bit|brings? back|comes? and goe?s?|gives? way|hands? (?:on|out)|kin|linears|of one's own|owes?"
    r"|settles?|so many|straight run|way out)\b|\w*(?:quantis|licence|generalis|normalis|randomis|behaviour|colour|centre)\w*",
    re.IGNORECASE,
)
HISTORY = re.compile(r"\btest_\w+|\b(?:as was|no longer|in this version|at first|billhook's own aim)\b|\b20\d\d-\d\d-\d\d\b")


def prose(page):
    """The text of a page without code, tables, headings and comments."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("|", "#", "!", "<!--")))


def lengths(page):
    """How many words each sentence of a page has."""
    text = re.sub(r"`[^`]*`", "CODE", prose(page))
    sentences = re.split(r"(?<=[.!?:])\s+(?=[A-Z*`\[])|\n\s*\n|\n\s*[-*] ", text)
    return [words for words in (len(sentence.split()) for sentence in sentences) if words > 2]


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_outside_evidence_are_plain(page):
    line = " ".join(prose(page).split())
    assert NEVER.findall(line) == []
    assert HISTORY.findall(line) == []
    assert max(lengths(page), default=0) <= 45


def test_few_sentences_outside_evidence_are_long():
    assert len(GUIDE) >= 40
    words = [count for page in GUIDE for count in lengths(page)]
    assert sum(count > 30 for count in words) <= 0.01 * len(words)


def test_each_marker_is_described_and_the_two_commands_are_told(pytestconfig):
    """That each is registered is what `--strict-markers` asks for."""
    options, said = " ".join(pytestconfig.getini("addopts")), (ROOT / "CONTRIBUTING.md").read_text()
    markers = dict(line.split(": ", 1) for line in pytestconfig.getini("markers") if line.isascii() and ": " in line)
    own = [re.match(r"\w+", name)[0] for name in markers]
    assert {"fast", "slow", "real", "sweep", "nightly", "daily"} <= set(own)
    assert [name for name in ("fast", "slow", "real", "sweep", "nightly", "daily") if not re.search(rf"[` ]{name}\b", said)] == []
    assert "--strict-markers" in options
    assert "-m not sweep and not nightly" in options
    assert "\npytest -n 2\n" in said
    assert "\npytest -n 2 -m nightly\n" in said


def test_cases_that_run_each_time_are_there(unused_patterns):
    assert unused_patterns == {}


def test_each_public_name_stands_on_a_page_of_the_reference():
    names = {name for name, one in PUBLIC.items() if callable(one)}
    shown = re.findall(r"^::: (billhook(?:\.[\w]+){1,2})$", REFERENCE, re.MULTILINE)
    assert sorted(names - set(shown)) == []
    assert len(shown) == len(set(shown))


def test_each_schedule_stands_on_a_page_of_the_reference():
    classes = [one for one in vars(bh.schedules).values() if inspect.isclass(one) and issubclass(one, bh.schedules.Schedule)]
    shown = re.findall(r"^::: billhook\.schedules\.(\w+)$", REFERENCE, re.MULTILINE)
    assert {one.__name__ for one in classes} - {"Schedule", "Ramp"} == set(shown)


def test_each_page_is_in_the_menu_and_in_the_list_for_language_models():
    pytest.importorskip("griffe", reason="griffe is not installed: pip install 'billhook[docs]'")
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)
    told = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["llms"](config["nav"], ROOT / "docs", "What it is.")
    listed = re.findall(r"^- \[.+?\]\((.+?)\): \S", told, re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.name != "README.md")


def test_the_reference_describes_each_option_of_each_command():
    pytest.importorskip("griffe", reason="griffe is not installed: pip install 'billhook[docs]'")
    made = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    text = made["commands"]() + made["shared"]()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert [name for name, kind, _, says in rows if not kind or not says] == []
    assert {f"`--{one.name}`" for one in fields(TextOptions)} < {name for name, *_ in rows}
    assert re.findall(r"^billhook (\S+)", text, re.MULTILINE) == list(COMMANDS)


NOUNS = {
    "As",
    "Batches",
    "Blocks",
    "Bytes",
    "Examples",
    "Heads",
    "Linears",
    "Parameters",
    "Rows",
    "This",
    "Tokens",
    "Units",
    "Weights",
}
VERBS = {"Checks", "Plans", "Records", "Returns", "Warns"}
"""Verbs that "of", "that" or "which" may follow; after another word these tell a noun ("Rows of ...")."""
FOLDERS = sorted(path.parent.name for path in (ROOT / "src" / "billhook").glob("*/__init__.py"))


def of_folder(name):
    source = ROOT / "src" / "billhook"
    return sorted(source.glob("*.py") if name == "billhook" else (source / name).rglob("*.py"))


def wrong_in(node):
    """What is against the style in the docstring of a module, class, function or property."""
    text = ast.get_docstring(node) or ""
    wrong = re.findall(r"^(?:What|Whether) |\b(?:as|see) there\b|\banew\b", text, re.IGNORECASE)
    decorators = {ast.unparse(one).rpartition(".")[2] for one in getattr(node, "decorator_list", [])}
    if text and isinstance(node, ast.FunctionDef) and not decorators & {"property", "cached_property"}:
        first, _, rest = " ".join(text.split()).partition(" ")
        noun = first in NOUNS or (rest.startswith(("of ", "that ", "which ")) and first not in VERBS)
        if noun or not re.fullmatch(r"[A-Z][\w-]*s,?", first):
            wrong = ["no verb in the third person", *wrong[text.startswith(("What ", "Whether ")) :]]
    return [f"{node.name if hasattr(node, 'name') else 'module'}: {one}: {text[:70]!r}" for one in wrong]


@pytest.mark.parametrize("folder", [*FOLDERS, "billhook"])
def test_docstrings_begin_with_a_verb_and_public_names_have_an_example(folder):
    """A function's first word is a verb ("Finds"); run one folder with `-k "docstrings and units"`."""
    nodes = [(path, node) for path in of_folder(folder) for node in ast.walk(ast.parse(path.read_text()))]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    wrong = [f"{path.name}: {line}" for path, node in nodes if isinstance(node, documented) for line in wrong_in(node)]
    place = "billhook.schedules" if folder == "billhook" else f"billhook.{folder}."
    public = {name: one for name, one in PUBLIC.items() if f"{getattr(one, '__module__', '')}.".startswith(place)}
    bare = [name for name, one in public.items() if ">>>" not in (one.__doc__ or "") and not inspect.isabstract(one)]
    wrong += [f"{name} has no example (>>>)" for name in bare]
    assert not wrong, "\n".join(["", *wrong])


HEADLESS = re.compile(r"\b(what|those|one(?! \w)|so many|as many)\b")
"""Words that stand for a noun which a summary should name."""


def summary_of(text):
    """The first paragraph of a docstring, on one line."""
    return " ".join(text.split("\n\n")[0].split())


def test_summaries_of_public_names_are_one_plain_line():
    summaries = {name: summary_of(inspect.getdoc(value) or "") for name, value in PUBLIC.items() if callable(value)}
    assert {name: text for name, text in summaries.items() if len(text) > 88 or HEADLESS.search(text)} == {}


def test_nearly_all_summaries_are_one_plain_line():
    nodes = [
        node for folder in [*FOLDERS, "billhook"] for path in of_folder(folder) for node in ast.walk(ast.parse(path.read_text()))
    ]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [summary_of(ast.get_docstring(node)) for node in nodes if isinstance(node, documented) and ast.get_docstring(node)]
    poor = [text for text in texts if len(text) > 88 or HEADLESS.search(text)]
    assert len(poor) <= 0.01 * len(texts), poor


def test_docstrings_and_messages_avoid_words_that_nobody_knows():
    found = []
    for folder in [*FOLDERS, "billhook"]:
        for path in of_folder(folder):
            strings = [
                node
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
            found += [
                f"{path.name}:{node.lineno}: {word}" for node in strings for word in NEVER.findall(" ".join(node.value.split()))
            ]
    assert found == []
