"""The notebooks in examples/ run from top to bottom, and are kept without outputs."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from kit.pages import Block, unknown_in

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = {path.stem: path for path in sorted(EXAMPLES.glob("*.ipynb"))}


def executed(book, folder):
    """Runs a notebook in a folder of its own; a cell that fails raises."""
    return nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()


def shown(book):
    """What cells show, by the name of its kind."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return [output.get("data", {}) for output in outputs], "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_outputs_are_stored(name):
    book = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbformat.validate(book)
    assert [cell for cell in book.cells if cell.get("outputs") or cell.get("execution_count")] == []
    assert book.cells[0].cell_type == "markdown"
    assert book.metadata.keys() == {"kernelspec", "language_info"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_can_be_read_and_name_what_there_is(name):
    cells = [cell.source for cell in nbformat.read(NOTEBOOKS[name], as_version=4).cells if cell.cell_type == "code"]
    assert [unknown for cell in cells for unknown in unknown_in(Block(name, 1, "python", cell))] == []


PICTURES = {"convert": 1, "heads": 2, "prune": 1}


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_runs_and_pictures_and_tables_appear(name, tmp_path):
    book = nbformat.read(NOTEBOOKS[name], as_version=4)
    data, text = shown(executed(book, tmp_path))
    assert sum("image/png" in one for one in data) == PICTURES[name]
    assert sum("<pre" in one.get("text/html", "") for one in data) >= 2  # as rich draws tables in notebooks
    assert "perplexity" in text or "accuracy" in text
    assert re.findall(r"\bnan\b|Traceback|Warning", text) == []


@pytest.mark.nightly
@pytest.mark.slow
def test_what_shows_a_bar_in_a_terminal_shows_one_in_a_notebook(tmp_path):
    lines = "import billhook as bh\nmodel = bh.load('tiny')", "written = bh.generated(model, examples=2, length=8)"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(line) for line in lines])
    data, text = shown(nbformat.v4.new_notebook(cells=executed(book, tmp_path).cells[1:]))
    assert any("application/vnd.jupyter.widget-view+json" in one for one in data)
    assert "ipywidgets" not in text
