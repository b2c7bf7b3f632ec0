"""Progress bars on stderr for long steps, with an estimate of the remaining time."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

OnProgress = Callable[[int, int], None]  # callback with the number of finished steps and the total
MIN_CALLS, MIN_SHARE = 3, 0.02
"""Number of calls, and share of all steps, before the total time is estimated.

The first call is not timed unless it reports 0 finished steps, because the first step often takes longer.
"""
LONG, INTERVAL = 20.0, 60.0  # seconds from which the total time is printed, and between progress lines in a log file


@contextmanager
def progress_bar(task: str, unit: str = "", suffix: Callable[[], str] | None = None, steady: bool = True) -> Iterator[OnProgress]:
    """Shows a progress bar on stderr within a `with` block, if stderr is a terminal or a notebook.

    After the first few steps, a permanent line estimates the total time, if that is long. In a log file, where no bar can be
    seen, a line per minute reports the progress, also of a task without a count.

    Args:
        task: The task, such as "scoring".
        unit: The steps that are counted, such as "batches". Empty for a bar without a count.
        suffix: Returns further text for the end of the bar, called at each step.
        steady: If True, steps take about equally long, so that the remaining time is estimated.

    Yields:
        Callback with the number of finished steps and the total.
    """
    console = Console(stderr=True)
    left = (TextColumn("left:"), TimeRemainingColumn()) if steady else ()
    counts = (MofNCompleteColumn(), unit, *left) if unit else ()
    named = TextColumn("{task.description}", markup=False), BarColumn()
    columns = *named, *counts, TimeElapsedColumn(), TextColumn("{task.fields[suffix]}")
    bar = Progress(*columns, console=console, transient=True, disable=not (console.is_terminal or console.is_jupyter))
    lines, ended = _ProgressLines(task, unit, console, steady, suffix), threading.Event()

    def repeat() -> None:
        while not ended.wait(INTERVAL):
            lines.repeat()

    reporter = threading.Thread(target=repeat, daemon=True)  # a single step may take longer than a minute
    if bar.disable:
        reporter.start()
    try:
        with bar:
            task_id = bar.add_task(task, total=None, suffix="")

            def report(done: int, total: int) -> None:
                bar.update(task_id, completed=done, total=total, suffix=suffix() if suffix is not None else "")
                lines.update(done, total)

            yield report
    finally:
        ended.set()
        if bar.disable:
            reporter.join()


class _ProgressLines:
    """Prints the estimated total time once, and the progress on demand."""

    def __init__(self, task: str, unit: str, console: Console, steady: bool, suffix: Callable[[], str] | None) -> None:
        self.task, self.unit, self.console, self.steady, self.suffix = task, unit, console, steady, suffix
        self.begun, self.calls, self.estimated = time.monotonic(), 0, not steady
        self.start, self.done, self.total = (0, self.begun), 0, 0

    def update(self, done: int, total: int) -> None:
        """Counts finished steps, and prints an estimate of the total time once."""
        now, self.calls = time.monotonic(), self.calls + 1
        if self.calls == 1 or done < self.done:  # a second series of steps may follow
            self.start = done, now
        self.done, self.total = done, total
        first_done, first_time = self.start
        too_early = self.calls < (MIN_CALLS if first_done else 2) or done - first_done < max(MIN_SHARE * total, 1)
        if self.estimated or too_early:
            return
        self.estimated = True
        seconds = (now - first_time) / (done - first_done) * total
        if seconds >= LONG:
            self.console.print(
                f"{self.task}: about {format_duration(seconds)} for {total:,} {self.unit}", markup=False, highlight=False
            )

    def repeat(self) -> None:
        now, (first_done, first_time) = time.monotonic(), self.start
        words = [f"{self.task}: {format_duration(now - self.begun)} so far"]
        if self.unit and self.total:
            words = [f"{self.task}: {self.done:,} of {self.total:,} {self.unit}"]
            if self.steady and self.done > first_done:
                left = (now - first_time) / (self.done - first_done) * (self.total - self.done)
                words.append(f"about {format_duration(left)} left")
        words.append(self.suffix() if self.suffix is not None else "")
        self.console.print(", ".join(filter(None, words)), markup=False, highlight=False)


def format_duration(seconds: float) -> str:
    """Formats a duration with one or two significant digits.

    >>> format_duration(42), format_duration(200), format_duration(9000)
    ('40 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{max(round(seconds, -1), 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
