"""The Report callback: a table and a plot of the training run."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from billhook.arguments import check_int, check_path, check_types
from billhook.callbacks.degradation import Degradation, check_listed_after
from billhook.callbacks.export import Export
from billhook.fit.callback import FitCallback
from billhook.fit.event import Event, EventCallback, State, events_of, metrics_of_callbacks, record_start, start_metrics
from billhook.fit.fit import Fit
from billhook.fit.ranks import on_first_rank
from billhook.plots.style import PLOT_SUFFIXES
from billhook.plots.validation import validation
from billhook.report.degradation import degradation_table
from billhook.report.summary import ReportRow, report_table, summary


class Report(FitCallback):
    """Prints a table of size and quality before and after each event, and plots validation.

    Put it last, after `Export`, so that it reports the checkpoint. It also prints the results of `Degradation`. The plot is sent
    to the loggers too: TensorBoard, MLflow, W&B, and a file next to the metrics of `CSVLogger`. After `HeadPruning`, a second
    plot next to the first, with `_heads` in its name, shows the importance of heads and the removed heads.

    Args:
        plot_file: Output file of the plot (PNG, PDF, SVG, or JPEG). No plot is drawn if the run has no validation.
        metric: Logged validation metric to plot. Defaults to the first of `val_perplexity`, `val_accuracy`, `val_loss`, and
            others that start with `val`.
        measure_batches: Validation batches to run at the start and the end. Defaults to all; 0 disables it.

    Raises:
        ValueError: If an argument is not legal. Before training, if the plot cannot be written.

    >>> import billhook as bh
    >>> callback = bh.Report("outputs/report.png")  # last in Trainer(callbacks=[...])
    """

    def __init__(
        self, plot_file: str = "outputs/report.png", metric: str | None = None, measure_batches: int | None = None
    ) -> None:
        check_path("plot_file", plot_file, PLOT_SUFFIXES)
        check_types(Report, locals())
        if measure_batches is not None:
            check_int("measure_batches", measure_batches, least=0)
        self.plot_file = plot_file
        self.metric = metric
        self.measure_batches = measure_batches
        self.history: list[list[float]] = []
        self.first: Event | None = None
        self._dtype = ""

    def prepare(self, fit: Fit) -> None:
        """Clears results and checks the order of callbacks."""
        for callback in fit.callbacks(Degradation):
            check_listed_after(fit, self, callback)
        on_first_rank(fit, "Report", self._check_file)
        self.history = []
        self.first = None
        if Path(self.plot_file).is_file():
            rank_zero_info(f"billhook: the plot {self.plot_file} will be replaced")

    def _check_file(self) -> None:
        path = Path(self.plot_file).absolute()
        parent = next(parent for parent in path.parents if parent.exists())
        if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
            reason = "it is a folder" if path.is_dir() else f"{parent} is not a folder that can be written to"
            raise ValueError(f"plot_file='{self.plot_file}' cannot be written, because {reason}. Pass another file.")

    def begin_training(self, fit: Fit) -> None:
        """Measures the model before training."""
        if self.first is None:
            numbers = self._measured(fit)
            num_events = len(events_of(fit))
            self.first = {"step": fit.step, "after": numbers, "events": num_events}
            if fit.starts_fresh and not num_events:
                record_start(fit, numbers)

    def after_validation(self, fit: Fit) -> None:
        """Stores the logged validation metric."""
        metrics = fit.validation_metrics
        if self.first is not None and (fit.step, len(events_of(fit))) == (self.first["step"], self.first["events"]):
            self.first["after"] = metrics | self.first["after"]
        if name := self._name(metrics):
            self.history.append([fit.step, metrics[name]])

    def end_training(self, fit: Fit) -> None:
        """Validates the final model, prints the table, and saves the plot."""
        on_first_rank(fit, "Report", partial(self._report, fit, self._measured(fit)))

    def _measured(self, fit: Fit) -> dict[str, Any]:
        metrics = metrics_of_callbacks(fit)
        report = summary(fit.module)
        self._dtype = report.dtype
        return report.numbers() | metrics | fit.validate(self.measure_batches)

    def _report(self, fit: Fit, last: dict[str, Any]) -> None:
        events = events_of(fit)
        rows = self._rows(fit, events, ReportRow("end of training", fit.step, last))
        notes = [(f"step {e['step']}", e["what"]) for e in events if e["label"] != e["what"]]
        for callback in fit.callbacks(Export):
            if callback.saved is not None:
                notes += [("checkpoint", callback.saved.folder), ("format", callback.saved.format)]
                notes += [("verified", f"largest logit difference {callback.saved.difference:.3g}")]
        plots = []
        if name := self._name(last):
            if rows[0].numbers.get(name) is None and fit.validate_first and self.measure_batches != 0:
                notes.append((rows[0].name, f"not validated. {fit.validate_first}"))
            marks = [(e["step"], e["label"], e["before"].get(name), e["after"].get(name)) for e in events]
            figure = validation(
                self._points(name, last, fit.step), marks, name, dense=rows[0].numbers.get(name) if events else None
            )
            plots.append(("plot", Path(self.plot_file), figure))
        elif self.metric:
            rank_zero_warn(f"metric={self.metric!r} is not logged in validation, so no plot is drawn. Logged: {', '.join(last)}.")
        plots_of_callbacks = [plot for callback in fit.callbacks(EventCallback) for plot in callback.plots().items()]
        for number, (kind, figure) in enumerate(plots_of_callbacks):
            path = Path(self.plot_file)
            plots.append((kind, path.with_stem(f"{path.stem}_{kind}{number or ''}"), figure))
        for kind, path, figure in plots:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path)
            except OSError as error:  # a plot is no reason to end training before Export
                rank_zero_warn(f"Report: {path} was not written ({error}).")
            else:
                notes.append((kind, str(path)))
        measured = [
            (f"after {event['label']}", event["degradation"], event.get("written", ()))
            for event in events
            if "degradation" in event
        ]
        for end in fit.callbacks(Degradation):
            if end.last is not None:
                measured.append(("end of training", end.last, end.written))
        tables = [f"{when}\n{degradation_table(texts, written)}\n" for when, texts, written in measured]
        print("\n".join(["", report_table(rows, notes, name, self._dtype), "", *tables]))

    def _rows(self, fit: Fit, events: list[Event], last: ReportRow) -> list[ReportRow]:
        first = self.first or {"step": 0, "after": {}, "events": 0}
        if not events:
            return [ReportRow("start of training", first["step"], first["after"]), last]
        # the first measurement is of the dense model, unless events came first
        num_events = first["events"]
        start = start_metrics(fit) | (events[0]["before"] if num_events else first["after"])
        dense = ReportRow("dense", events[0]["step"] if num_events else first["step"], start)
        after = [ReportRow(f"after {event['label']}", event["step"], event["after"]) for event in events]
        if num_events:
            last_before = after[num_events - 1]
            after[num_events - 1] = replace(last_before, numbers=first["after"] | last_before.numbers)
        return [dense, *after, last]

    def _points(self, name: str, last: dict[str, Any], step: int) -> list[tuple[int, float]]:
        points = {int(s): value for s, value in self.history} | {step: float(last[name])}
        if self.first is not None and name in self.first["after"]:
            points.setdefault(self.first["step"], self.first["after"][name])
        return sorted(points.items())

    def _name(self, metrics: dict[str, Any]) -> str | None:
        known = ["val_perplexity", "val_accuracy", "val_loss", *sorted(name for name in metrics if name.startswith("val"))]
        return next((name for name in ([self.metric] if self.metric else known) if name in metrics), None)

    def state_dict(self) -> State:
        """Returns the metrics so far."""
        return {"history": self.history, "first": self.first}

    def load_state_dict(self, state_dict: State) -> None:
        """Restores the metrics of the resumed run."""
        self.history = state_dict["history"]
        self.first = state_dict["first"]
