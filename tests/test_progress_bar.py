"""Bars on stderr: moving where somebody looks, one line where nobody does, and how long it takes as the first steps say."""

import io
import re
import threading
import time

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


def said(out, line):
    """Waits until a line is written, which is done by another thread."""
    end = time.time() + 10
    while line not in out.getvalue().splitlines():
        assert time.time() < end, out.getvalue()
        time.sleep(0.005)


def test_no_terminal_gets_the_estimate_if_it_takes_long(stderr):
    of, clock = stderr
    out = of(terminal=False)
    steps(clock, 0.1, 100)
    assert out.getvalue() == ""
    steps(clock, 3.0, 100)
    assert out.getvalue().splitlines() == ["scoring: about 5 min for 100 batches"]


def test_no_terminal_gets_lines_now_and_then_also_within_a_step_or_without_a_count(stderr, monkeypatch):
    of, clock = stderr
    out = of(terminal=False)
    monkeypatch.setattr(bars, "INTERVAL", 0.01)
    with progress_bar("reading [chats].jsonl"):
        clock[0] += 180.0
        said(out, "reading [chats].jsonl: 3 min so far")
    with progress_bar("repairing", "layers") as told:
        told(0, 30)
        clock[0] += 40.0
        told(10, 30)
        said(out, "repairing: 10 of 30 layers, about 80 s left")
        told(0, 4)  # a second series
        clock[0] += 10.0
        told(2, 4)
        said(out, "repairing: 2 of 4 layers, about 10 s left")
    count = len(threading.enumerate())
    with progress_bar("scoring"):
        pass
    assert len(threading.enumerate()) <= count


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


def test_steps_that_are_not_alike_say_what_is_done_and_no_time(stderr, monkeypatch):
    of, clock = stderr
    out, phase = of(terminal=False), ["scoring"]
    monkeypatch.setattr(bars, "INTERVAL", 0.01)
    with progress_bar("shrinking", "steps", lambda: phase[-1], steady=False) as told:
        told(0, 10)
        clock[0] += 400.0
        said(out, "shrinking: 0 of 10 steps, scoring")
        phase.append("searching")
        told(6, 10)
        said(out, "shrinking: 6 of 10 steps, searching")
    out = of(terminal=True)
    with progress_bar("shrinking", "steps", lambda: phase[-1], steady=False) as told:
        told(0, 175)
    assert "0/175 steps" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "left:" not in out.getvalue()
