"""What `billhook evaluate` shows while it works."""

import json
from contextlib import contextmanager

from billhook.cli.main import main
from billhook.report.choices import encode, read_questions
from kit.cli import tokenizer


def test_a_bar_for_questions_and_one_for_text(tmp_path, files, monkeypatch):
    shown = {}

    @contextmanager
    def bar(what, of=""):
        yield lambda done, total: shown.setdefault((what, of), []).append((done, total))

    asked = tmp_path / "asked.jsonl"
    questions = [("To be, or not", ["to be", "a sword"]), ("Good", ["morrow", "my lord", "lord of the the"])]
    lines = [json.dumps({"context": context, "choices": choices, "label": 0}) for context, choices in questions]
    asked.write_text("\n".join(lines))
    for module in ("evaluate", "machine"):
        monkeypatch.setattr(f"billhook.cli.{module}.progress_bar", bar)
    given = ["--data", str(asked), "--text", str(files["validation"]), "--length", "16", "--examples", "3", "--batch_size", "2"]
    main(["evaluate", "tiny", *given])
    rows = [row for own in encode(read_questions(str(asked)), tokenizer(), 16) for row in own]
    counted = shown["tiny: questions", "tokens"]
    assert counted[-1] == (sum(len(row.ids) for row in rows),) * 2
    assert [done for done, _ in counted] == sorted({done for done, _ in counted})
    assert len(counted) == 3
    assert shown["tiny: text", "blocks"] == [(1, 3), (2, 3), (3, 3)]
