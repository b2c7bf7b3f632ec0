"""README and the pages of docs/, run as they stand: `kit/pages.py` says what an author has to do."""

import logging
import re

import pyarrow.parquet
import pytest

from billhook.assets import text_files
from kit.cli import pytestmark as quiet
from kit.pages import LANGUAGES, ROOT, Block, blocks_in, needed_by, run_page, unknown_in

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = [page for page in PAGES if blocks_in(page) and page.name != "export.md"]  # which test_docs_onnx.py runs, on several models
pytestmark = [*quiet, pytest.mark.filterwarnings("ignore:::lightning.*")]


def named(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with what a clone has, and two files of text."""
    for name in ("examples", "callbacks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for split, name in (("train", "train.txt"), ("validation", "test.txt")):
        works = pyarrow.parquet.read_table(text_files()[split])["text"]
        (tmp_path / name).write_text(works[0].as_py()[:60_000])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=named)
def test_what_a_page_says_runs_and_prints_what_it_says(page, folder):
    for package in needed_by(page):
        pytest.importorskip(package)
    level = logging.getLogger("lightning.pytorch").level
    run_page(blocks_in(page), {"__name__": "__main__"})
    logging.getLogger("lightning.pytorch").setLevel(level)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_of_a_page_can_be_read_and_names_what_there_is(page):
    assert [(block.place, name) for block in blocks_in(page) if block.marker != "refused" for name in unknown_in(block)] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_each_block_has_a_language_that_is_known_and_begins_in_the_first_column(page):
    fences = re.findall(r"^( *)```(\w*)", page.read_text(), re.MULTILINE)
    assert not [language for indented, language in fences if indented or (language and language not in LANGUAGES)]
    assert len(blocks_in(page)) == sum(bool(language) for _, language in fences)


def block(language, code, marker=None, title=None):
    return Block("a.md", 1, language, code, marker, title)
