"""What the documentation names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
SOURCES = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_and_files_that_it_names(page):
    text = page.read_text()
    files = re.findall(r"`(?:tests/(?:\w+/)?)?(test_[\w*]+\.py)`", text)
    assert all(list((ROOT / "tests").rglob(name)) for name in files)
    functions = re.findall(r"`(test_\w+)`", text)
    assert [name for name in functions if f"def {name}(" not in SOURCES] == []
    paths = re.findall(r"\b((?:benchmarks|examples|callbacks|docs)/[\w/*]+\.(?:py|yaml|md|png))", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_each_row_of_what_works_has_its_test():
    lines = (ROOT / "docs" / "training.md").read_text().splitlines()
    rows = [line for line in lines if re.match(r"\| [^|\s]", line)]
    assert len(rows) > 30
    assert [row for row in rows if "`test_" not in row] == []
