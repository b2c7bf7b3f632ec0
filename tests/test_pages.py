"""README and the pages of docs/, run as they stand: `kit/pages.py` says what an author has to do."""

import logging
import re

import pyarrow.parquet
import pytest

from billhook.assets import text_files
from kit.cli import pytestmark as quiet
from kit.pages import LANGUAGES, ROOT, Block, blocks_in, needed_by, printed, run_page, unknown_in

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


@pytest.mark.parametrize(
    ("language", "code", "unknown"),
    [
        ("python", "import billhook as bh\nbh.plots; bh.schedules.Linear(final=0.5); model.bh.any()\n", []),
        ("python", "bh.Wandaa()\n", ["bh.Wandaa"]),
        ("python", "bh.schedules.Line\n", ["bh.schedules.Line"]),
        ("python", "from billhook.sparsity import wandaa\n", ["wandaa"]),
        ("python", "bh.prune(model, sparsety=0.5, **more)\n", ["bh.prune(sparsety=)"]),
        ("console", "billhook pruen tiny out\nbillhook --help\nbillhook fit --config a.yaml\n", ["pruen"]),
    ],
)
def test_names_that_are_not_there_are_found(language, code, unknown):
    assert unknown_in(block(language, code)) == unknown


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_each_block_has_a_language_that_is_known_and_begins_in_the_first_column(page):
    fences = re.findall(r"^( *)```(\w*)", page.read_text(), re.MULTILINE)
    assert not [language for indented, language in fences if indented or (language and language not in LANGUAGES)]
    assert len(blocks_in(page)) == sum(bool(language) for _, language in fences)


def block(language, code, marker=None, title=None):
    return Block("a.md", 1, language, code, marker, title)


def test_a_block_sees_what_those_above_it_made(folder):
    blocks = [block("python", "a = 1\n"), block("python", "print(a, 2.5)\n"), block("text", "1 2.75\n")]
    assert run_page(blocks, {})["a"] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        [block("python", "print('b')\n"), block("text", "a\n")],
        [block("python", "1 / 0\n")],
        [block("python", "a = 1\n", "refused")],
        [block("python", "raise ValueError('b')\n", "refused"), block("text", "a\n")],
        [block("console", "billhook summary nowhere\n")],
        [block("console", "billhook prune tiny out --sparsety 0.5\n", "parsed")],
        [block("yaml", "trainer: {max_stepz: 3}\n")],
    ],
    ids=["printed", "error", "not refused", "refused otherwise", "command", "parsed", "yaml"],
)
def test_what_is_wrong_is_found(wrong, folder):
    with pytest.raises(AssertionError, match=r"a\.md:1"):
        run_page(wrong, {})


def test_what_is_only_shown_is_only_read(folder):
    run_page([block("python", "import no_such_module\n", "shown"), block("console", "billhook no-command\n", "shown")], {})
    with pytest.raises(SyntaxError):
        run_page([block("python", "a =\n", "shown")], {})


def test_a_title_writes_a_file(folder):
    run_page([block("python", "print('own')\n", title="own.py"), block("console", "python own.py\n"), block("text", "own\n")], {})
    assert (folder / "own.py").read_text() == "print('own')\n"


@pytest.mark.parametrize(
    ("expected", "told", "same"),
    [
        ("a  b\n----", "a b\n-------\n", True),
        ("loss 1,234.5", "loss 7e-3", True),
        ("head  -0.5  +0.5", "head  +0.25  -0.25", True),
        ("1-2 of -s", "1+2 of -s", False),
        ("first ...\nlast", "first 1\nsecond\nlast", True),
        ("first", "first\nsecond", False),
        ("first ... last", "first\nsecond", False),
    ],
)
def test_what_is_printed_is_compared_apart_from_numbers_and_their_signs(expected, told, same):
    assert printed(expected, told) == same
