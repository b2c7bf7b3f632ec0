"""Scripts in processes of their own. Needs neither torch nor an engine, so that each Python can run it."""

import sys

import pytest

from billhook.serving import worker

SCRIPT = """
import json, sys
for line in sys.stdin:
    try:
        import shadow
    except ImportError:
        shadow = None
    answer = {"arguments": sys.argv[1:], "name": __name__, "shadowed": shadow is not None}
    print(json.dumps(answer | json.loads(line)), flush=True)
"""


@pytest.mark.parametrize("version", [(3, 10, 13), tuple(sys.version_info[:3])])
def test_a_script_finds_no_modules_beside_it_or_in_the_current_folder(version, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "shadow.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker, "SCRIPTS", tmp_path)
    monkeypatch.setattr(sys, "version_info", version)
    with worker.Worker("script", ["a b", "-c"]) as running:
        answer = running.ask(number=3)
        assert ("-P" in running._process.args) == (version >= (3, 11)), "an option that Python 3.10 does not have"
    assert answer == {"arguments": ["a b", "-c"], "name": "__main__", "shadowed": False, "number": 3}
