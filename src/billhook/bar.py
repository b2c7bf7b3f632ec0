"""A bar on stderr for what takes long, with the time that is left, as the first steps have shown it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Told = Callable[[int, int], None]
"""Is called with how much is done, and of how much."""
FIRST, SHARE = 3, 0.02
"""How many steps, and which share of all, say how long all take.

The first is left out, as it often takes longer, unless it was told before that none is done.
"""
LONG, EVERY = 20.0, 60.0
"""Seconds from which on it is said in a line how long all steps take, and between lines on progress where no bar is seen."""


@contextmanager
def bar(what: str, of: str = "", beside: Callable[[], str] | None = None, alike: bool = True) -> Iterator[Told]:
    """Shows a bar on stderr until the end of a `with` block, if stderr is a terminal or a notebook.

    Once a few steps have been measured, a line, which stays, says how long all of them take, if that is long. Where no bar can be
    seen, as in a log file, a line each minute says how far it is.

    Args:
        what: What is done, as in "scoring".
        of: What is counted, as in "batches"; empty where nothing is, and the bar only moves.
        beside: Returns what is shown at its end whenever something is done.
        alike: Whether steps take about as long as each other; otherwise it is not said how long the rest takes.

    Yields:
        A function to call with how much is done, and of how much.
    """
    console = Console(stderr=True)
    left = (TextColumn("left:"), TimeRemainingColumn()) if alike else ()
    counts = (MofNCompleteColumn(), of, *left) if of else ()
    columns = (what, BarColumn(), *counts, TimeElapsedColumn(), TextColumn("{task.fields[beside]}"))
    shown = Progress(*columns, console=console, transient=True, disable=not (console.is_terminal or console.is_jupyter))
    pace = _Pace(what, of, console, shown.disable, alike, beside)
    with shown:
        task = shown.add_task("", total=None, beside="")

        def told(done: int, total: int) -> None:
            shown.update(task, completed=done, total=total, beside=beside() if beside is not None else "")
            pace.see(done, total)

        yield told


class _Pace:
    """Measures the first steps, and says once how long all take; with `lines`, each minute, how far it is."""

    def __init__(
        self, what: str, of: str, console: Console, lines: bool, alike: bool = True, beside: Callable[[], str] | None = None
    ) -> None:
        self.what, self.of, self.console, self.lines, self.alike, self.beside = what, of, console, lines, alike, beside
        self.calls, self.said = 0, not alike
        self.first, self.due = (0, 0.0), time.monotonic() + EVERY

    def see(self, done: int, total: int) -> None:
        """Notes how many steps are done."""
        now, self.calls = time.monotonic(), self.calls + 1
        if self.calls == 1:
            self.first = done, now
        begun, then = self.first
        if self.lines and self.said and now >= self.due and begun < done < total:
            self.due = now + EVERY
            left = f"about {lasting((now - then) / (done - begun) * (total - done))} left" if self.alike else ""
            words = [f"{self.what}: {done:,} of {total:,} {self.of}", left, self.beside() if self.beside is not None else ""]
            self.console.print(", ".join(filter(None, words)), highlight=False)
        if self.said or self.calls < (FIRST if begun else 2) or done - begun < max(SHARE * total, 1):
            return
        self.said, self.due = True, now + EVERY
        seconds = (now - then) / (done - begun) * total
        if seconds >= LONG:
            self.console.print(f"{self.what}: about {lasting(seconds)} for {total:,} {self.of}", highlight=False)


def lasting(seconds: float) -> str:
    """Writes how long something takes, roughly.

    >>> lasting(42), lasting(200), lasting(9000)
    ('40 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{max(round(seconds, -1), 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
