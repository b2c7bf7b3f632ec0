"""Config files that drop the callbacks of those before them say so."""

import pytest

from billhook.cli.main import main

FIRST = "trainer:\n  callbacks+:\n    - class_path: billhook.WeightPruning\n"
ADDS = "trainer:\n  callbacks+:\n    - class_path: billhook.Export\n"
DROPS = "trainer:\n  callbacks:\n    - class_path: billhook.Export\n"


@pytest.mark.parametrize(("later", "dropped"), [(ADDS, None), (DROPS, "WeightPruning"), ("trainer:\n  max_steps: 1\n", None)])
def test_a_list_in_a_later_file_is_told_to_drop(tmp_path, monkeypatch, capsys, later, dropped):
    ran = []
    monkeypatch.setattr("billhook.cli.main._lightning", ran.append)
    for name, text in {"first.yaml": FIRST, "later.yaml": later}.items():
        (tmp_path / name).write_text(text)
    main(["fit", "--config", str(tmp_path / "first.yaml"), f"--config={tmp_path / 'later.yaml'}"])
    said = capsys.readouterr().err
    assert len(ran) == 1
    assert said == (
        ""
        if dropped is None
        else f"billhook fit: warning: {tmp_path / 'later.yaml'} drops {dropped}, which files before it gave: "
        "`callbacks+:` in the place of `callbacks:` adds\n"
    )
