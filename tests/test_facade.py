"""What `billhook` exports is imported when it is asked for: alone, `import billhook` and short commands take no second."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import billhook as bh
import billhook.callbacks

HEAVY = ["torch", "transformers", "lightning", "datasets", "peft", "pandas"]
SAYS = """
import contextlib, json, sys
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
    {}
print(json.dumps([name for name in {} if name in sys.modules]))
"""


def imported(code):
    """What of the heavy packages is imported by code, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", SAYS.format(code, HEAVY)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["recipes", "wanda"], ["pruen"]], ids=" ".join)
def test_a_short_command_imports_nothing_heavy(words):
    assert imported(f"from billhook.cli.main import main; main({words})") == []


@pytest.mark.slow
def test_a_name_imports_what_it_needs():
    assert imported("import billhook as bh; bh.schedules.Cubic(0.5)") == []
    assert imported("import billhook as bh; bh.Amount(heads=0.5)") == ["torch", "transformers"]


def test_editors_and_mypy_see_the_names_that_are_there():
    tree = ast.parse(Path(bh.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {one.name: node.module for node in block.body for one in node.names}
    assert sorted([*told, "schedules"]) == sorted(bh.__all__)
    assert set(bh.__all__) <= set(dir(bh))
    for name, place in told.items():
        assert getattr(bh, name) is getattr(sys.modules[place], name)


def test_no_names_differ_by_a_capital_alone():
    spaces = [bh, *(one for one in map(vars(bh).get, bh.__all__) if isinstance(one, ModuleType) and hasattr(one, "__all__"))]
    assert len(spaces) == 6
    for space in spaces:
        assert len({name.lower() for name in space.__all__}) == len(space.__all__)


def test_what_is_not_there():
    with pytest.raises(AttributeError, match="module 'billhook' has no attribute 'Wandaa'"):
        bh.Wandaa  # noqa: B018
