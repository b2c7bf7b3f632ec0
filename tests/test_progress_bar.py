"""Bars on stderr: moving where somebody looks, one line where nobody does, and how long it takes as the first steps say."""

import io
import re

import pytest

import billhook.progress as bars
from billhook.progress import format_duration, progress_bar


@pytest.fixture
def stderr(monkeypatch):
    """What is written to stderr, which is a terminal or none, and a clock that is set by hand."""
    clock = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: clock[0])

    def of(terminal):
        out = io.StringIO()
        out.isatty = lambda: terminal
        monkeypatch.setattr("sys.stderr", out)
        for name in ("TERM", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        return out

    return of, clock


def steps(clock, seconds, total):
    """Shows a bar for steps, the first of which takes a hundred times as long."""
    with progress_bar("scoring", "batches") as told:
        for done in range(1, total + 1):
            clock[0] += seconds * (100 if done == 1 else 1)
            told(done, total)


def test_no_terminal_gets_lines_now_and_then_and_only_if_it_takes_long(stderr):
    of, clock = stderr
    out = of(terminal=False)
    steps(clock, 0.1, 100)
    assert out.getvalue() == ""
    steps(clock, 3.0, 100)
    first, *lines, last = out.getvalue().splitlines()
    assert first == "scoring: about 5 min for 100 batches"
    assert lines[0] == "scoring: 23 of 100 batches, about 4 min left"
    assert last == "scoring: 83 of 100 batches, about 50 s left"
    assert len(lines) == 3


def test_a_terminal_gets_a_bar_that_goes_away_and_the_line_that_stays(stderr):
    of, clock = stderr
    out = of(terminal=True)
    steps(clock, 3.0, 100)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "100/100 batches" in shown
    assert "scoring: about 5 min for 100 batches" in shown
    assert out.getvalue().rstrip().endswith("\x1b[2K"), "the bar is not wiped out"


def test_nothing_is_said_before_three_steps_and_a_fiftieth_of_all_are_measured(stderr):
    of, clock = stderr
    out = of(terminal=False)
    with progress_bar("scoring", "batches") as told:
        for done in range(1, 12):
            clock[0] += 9.0
            told(done, 500)
            assert (out.getvalue() != "") == (done >= 11)
    assert format_duration(4500) == "75 min"


def test_the_first_step_says_how_long_all_take_if_none_was_told_before_it(stderr):
    of, clock = stderr
    out = of(terminal=True)
    with progress_bar("pruning", "blocks", lambda: f"peak {clock[0]:.1f} GiB") as told:
        told(0, 30)
        clock[0] += 4.0
        told(1, 30)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "1/30 blocks left: " in shown
    assert "peak 4.0 GiB" in shown
    assert "pruning: about 2 min for 30 blocks" in shown


def test_steps_that_are_not_alike_say_what_is_done_and_no_time(stderr):
    of, clock = stderr
    out, phase = of(terminal=False), ["scoring"]
    with progress_bar("shrinking", "steps", lambda: phase[-1], steady=False) as told:
        told(0, 10)
        for done in range(1, 8):
            clock[0] += 40.0
            phase.append("searching" if done > 4 else "scoring")
            told(done, 10)
    lines = out.getvalue().splitlines()
    assert lines == [
        "shrinking: 2 of 10 steps, scoring",
        "shrinking: 4 of 10 steps, scoring",
        "shrinking: 6 of 10 steps, searching",
    ]
    out = of(terminal=True)
    with progress_bar("shrinking", "steps", lambda: phase[-1], steady=False) as told:
        told(0, 175)
    assert "0/175 steps" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "left:" not in out.getvalue()
