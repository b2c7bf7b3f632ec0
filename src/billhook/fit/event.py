"""Events during training: steps, validation, logging, and resuming.

The lifecycle of an `EventCallback` in a run:

1. `prepare` calls `check_fit`. A `ShapeCallback` also calls `begin` once the model exists, which calls `check`.
2. `load_state_dict` restores the events of a run that resumes.
3. `resolve` calls `steps`, and keeps those that are still to come.
4. `begin_training` calls `check_data`, and then applies the events that are `due` before the first step.
5. `after_batch` applies the events that are `due` after an optimizer step. For each, `apply_event` calls `apply_change`, which
   validates, makes the change (`run_change`, `record_event`), validates again, and logs (`log_event`). Followers are called then.
6. `state_dict` is saved with each checkpoint, and `end_training` warns of events that did not happen.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from billhook.arguments import check_int
from billhook.calibration.calibration import Calibration
from billhook.fit.calibration import FitCalibration
from billhook.fit.callback import FitCallback, ShapeSavingCallback
from billhook.fit.fit import Fit, Metrics
from billhook.fit.ranks import fail_together
from billhook.fit.targets import Targets, remaining_rounds, round_targets
from billhook.report.summary import summary
from billhook.schedules import Schedule

Event = dict[str, Any]
State = dict[str, Any]
"""The state of a callback in a checkpoint."""
Measured = dict[str, float | None]
"""Metrics of a model; None if they are unknown."""
ModelChange = Callable[[list[Optimizer]], str]
"""Changes a model and its optimizers, and returns a description."""
SIZES = ("params", "kv_cache_bytes", "sparsity")
"""Metrics of the model that are logged before the first event and after each event."""
UNLOGGED = ("zeros", "flops")  # metrics that are recorded but not logged
UNRECORDED = {"self", "measure_batches", "plot_file", "metric"}  # parameters that do not affect the model


class ShapeFollower(FitCallback, ABC):
    """A callback with state in the shapes of the model's tensors, updated when shapes change."""

    @abstractmethod
    def follow(self) -> None:
        """Adapts the state to the model's new shape."""


class EventFollower(FitCallback, ABC):
    """A callback that evaluates the model before the first event and after each event."""

    @abstractmethod
    def begin(self, fit: Fit) -> None:
        """Evaluates the model once it exists, before any event; idempotent."""

    @abstractmethod
    def on_event(self, fit: Fit, event: Event) -> None:
        """Evaluates the model after an event and may add results to the event."""


class EventCallback(ShapeSavingCallback, ABC):
    """A callback that changes the model at given steps.

    Events are measured and logged, and are not repeated after a resume.

    Args:
        calibration: Calibration data for the events. Defaults to 128 training examples.
        measure_batches: Validation batches to run before and after each event. Defaults to all; 0 disables it.

    Attributes:
        at: When events happen: a step (int), a fraction of training (float), `"start"`, or a schedule.
        events: Events so far: number in the run, step, description, and metrics before and after.
        last_event_step: The step of the last event; -1 before the first event.
        last_target: The target amount of the last event.
        start: Metrics before any event, stored by the first callback of the run.
        must_resume: True if a resumed run cannot replace this callback by another of its class.
    """

    must_resume = True
    at: Any = "start"  # a number, a schedule, or a list of these, as the subclass takes

    def __init__(self, calibration: FitCalibration | None = None, measure_batches: int | None = None) -> None:
        if measure_batches is not None:
            check_int("measure_batches", measure_batches, least=0)
        self.calibration = calibration or FitCalibration.of(None)
        self.measure_batches = measure_batches
        self._steps: Targets = {}
        self._last_step = -1
        self.reset()

    def reset(self) -> None:
        """Clears events at the start of training."""
        self.events: list[Event] = []
        self.last_event_step = -1
        self.last_target = 0.0
        self.start: Measured = {}
        self._validated: dict[str, Any] = {}

    def check_fit(self, fit: Fit) -> None:
        """Raises `ValueError` if the trainer's strategy does not support changes of weights."""
        fit.check_masking(type(self).__name__)

    def steps(self, fit: Fit) -> Targets:
        """Returns the target amount by step."""
        return round_targets(1.0, self.at, fit, "at")

    @abstractmethod
    def apply_event(self, fit: Fit, step: int) -> None:
        """Applies the event of a step, and sets `last_event_step`, as `apply_change` does."""

    def apply_change(self, fit: Fit, step: int, change: ModelChange) -> Event:
        """Applies a change as the event of a step, measured before and after, and logs it.

        Args:
            fit: The training run.
            step: The step, as in `steps`.
            change: Function that changes the model and the optimizers, and returns a description.
        """
        event = self.run_change(fit, self.validate(fit), change)
        self.last_event_step = step
        self.last_target = self._steps.get(step, 1.0)
        event["after"] |= self.validate(fit)
        log_event(fit, event)
        return event

    def run_change(self, fit: Fit, metrics: Metrics, change: ModelChange) -> Event:
        """Makes a change, and returns its event; see `record_event`."""
        with fail_together(fit, type(self).__name__):
            return self.record_event(fit, metrics, partial(change, fit.optimizers))

    @property
    def needs_data(self) -> bool:
        """True if events use batches, whether or not they are still to come."""
        return False

    def check_data(self, fit: Fit) -> None:
        """Raises `ValueError` if the calibration data of a coming event cannot be used."""
        if self.needs_data:
            self.calibration.check(fit)

    def prepare(self, fit: Fit) -> None:
        """Checks the run, and clears an earlier run."""
        fit.check_takes_steps(type(self).__name__)
        self.check_fit(fit)
        if [other.state_key for other in fit.callbacks(type(self))].count(self.state_key) > 1:
            raise ValueError(f"{type(self).__name__} ({self.state_key}) is listed twice. Use one callback with a schedule.")
        for follower in fit.callbacks(EventFollower):
            follower.begin(fit)  # also if it is listed later
        fit.follow_shapes()
        self._steps = {}
        self._last_step = -1
        if fit.step == 0:  # otherwise an earlier run continues
            self.reset()

    def resolve(self, fit: Fit) -> None:
        """Resolves the steps of the events."""
        self._steps = remaining_rounds(self.steps(fit), self.last_event_step, self.last_target, type(self).__name__)

    def begin_training(self, fit: Fit) -> None:
        """Applies events that are due before the first step, or that a resumed checkpoint lacks."""
        if self.due(fit) or self.pending_steps(fit):
            self.check_data(fit)
        if fit.callbacks(EventCallback)[0] is self and fit.starts_fresh:
            record_start(fit, {} if events_of(fit) else summary(fit.module).numbers())
            record_start(fit, metrics_of_callbacks(fit))
        self._run(fit)

    def after_batch(self, fit: Fit) -> None:
        """Applies events that are due after an optimizer step."""
        if fit.step != self._last_step:  # gradient accumulation takes no step
            self._run(fit)

    def _run(self, fit: Fit) -> None:
        self._last_step = fit.step
        for due in self.due(fit):
            self.apply_event(fit, due)

    def due(self, fit: Fit) -> list[int]:
        """Returns the step of the event that is due, if any; earlier missed steps are skipped."""
        return [due for due in self._steps if self.last_event_step < due <= fit.step][-1:]

    def pending_steps(self, fit: Fit) -> list[int]:
        """Returns the steps of pending events."""
        return [pending for pending in self._steps if pending > fit.step]

    def metrics(self, model: nn.Module) -> Measured:
        """Returns further metrics of the model for the start and the end of training."""
        return {}

    def plots(self) -> Mapping[str, Any]:
        """Returns matplotlib figures that `Report` saves, by kind."""
        return {}

    def validate(self, fit: Fit) -> Metrics:
        """Returns the validation metrics of the current model."""
        return fit.validate(self.measure_batches)

    def record_event(self, fit: Fit, metrics: Metrics, change: Callable[[], str]) -> Event:
        """Applies a change, which returns its description, and returns a new event."""
        before = summary(fit.module).numbers() | metrics
        what = change()
        number = len(events_of(fit))  # orders events of several callbacks at one step
        event: Event = {"number": number, "step": fit.step, "what": what, "before": before, "after": {}}
        event["by"] = describe_callback(self)
        self.events.append(event)  # recorded even if measuring fails
        event["after"] |= summary(fit.module).numbers()
        event["label"] = self.label(event)
        rank_zero_info(f"billhook, step {event['step']}: {what}")
        return event

    def label(self, event: Event) -> str:
        """Returns a short label of an event for tables, plots, and model cards."""
        return str(event["what"])

    def end_training(self, fit: Fit) -> None:
        """Warns if training ended before all events."""
        if late := self.pending_steps(fit):
            rank_zero_warn(
                f"{type(self).__name__}: training ended at step {fit.step}, before the event at step {max(late)}"
                + (f" (the last of {len(late)} pending events)" if len(late) > 1 else "")
            )

    def state_dict(self) -> State:
        """Returns the events; the LightningModule saves the shape."""
        return {"events": self.events, "done": self.last_event_step, "asked": self.last_target, "start": self.start}

    def load_state_dict(self, state_dict: State) -> None:
        """Restores the events."""
        self.events = state_dict["events"]
        self.last_event_step = state_dict["done"]
        self.last_target = state_dict["asked"]
        self.start = state_dict["start"]


def events_of(fit: Fit) -> list[Event]:
    """Returns the events of a run in order."""
    events = [event for callback in fit.callbacks(EventCallback) for event in callback.events]
    return sorted(events, key=lambda event: (event["step"], event["number"]))


def percent_change(event: Event) -> str:
    """Returns the change of the number of parameters in an event, in percent.

    >>> percent_change({"before": {"params": 2_881_792}, "after": {"params": 2_450_944}})
    '-15%'
    """
    return f"{100 * (event['after']['params'] / event['before']['params'] - 1):+.2g}%"


def record_not_refitted(event: Event, what: str) -> None:
    """Records and logs which pruned layers were not refitted, and why."""
    if what:
        event["not_refitted"] = what
        rank_zero_info(f"billhook, step {event['step']}: {what}")


def start_metrics(fit: Fit) -> Measured:
    """Returns the recorded metrics of the model before any event."""
    return {name: value for callback in fit.callbacks(EventCallback) for name, value in callback.start.items()}


def metrics_of_callbacks(fit: Fit) -> Measured:
    """Returns further metrics of the model from all callbacks."""
    return {name: value for callback in fit.callbacks(EventCallback) for name, value in callback.metrics(fit.module).items()}


def record_start(fit: Fit, metrics: Mapping[str, float | None]) -> None:
    """Records and logs metrics of the model before any event, each once."""
    known = start_metrics(fit)
    new = {name: value for name, value in metrics.items() if name not in known}
    for first in fit.callbacks(EventCallback)[:1]:
        first.start |= new
        fit.log_metrics({name: value for name, value in new.items() if name not in UNLOGGED})


def log_event(fit: Fit, event: Event) -> None:
    """Logs the metrics of an event and notifies event followers."""
    before = event["before"]
    after = event["after"]
    numbers = {key: after[key] for key in SIZES if key in after}
    for key in sorted(before.keys() & after.keys() - {*SIZES, *UNLOGGED}):
        numbers |= {f"{key}_before": before[key], f"{key}_after": after[key]}
    if event["number"] == 0 and fit.starts_fresh:
        record_start(fit, before)
    if event["step"] or not fit.resumes:  # a resumed run has already logged what comes before training
        fit.log_metrics(numbers)
    for follower in fit.callbacks(EventFollower):
        follower.on_event(fit, event)


def describe_callback(callback: object) -> dict[str, Any]:
    """Returns the class name of a callback as `callback`, and its settings as plain data."""
    unrecorded = UNRECORDED | ({"calibration"} if getattr(callback, "needs_data", None) is False else set())
    parameters = inspect.signature(type(callback).__init__).parameters
    settings = {}
    follows_schedule = False
    for name in parameters:
        value = getattr(callback, name, None)
        if name in unrecorded or value is None:
            continue
        follows_schedule |= isinstance(value, Schedule) and name != "at"
        plain = _plain(value)
        if plain or plain != (parameters[name].default or plain):  # options that are off by default are not recorded
            settings[name] = plain
    if follows_schedule:
        settings.pop("at", None)  # the schedule determines the steps
    return {"callback": type(callback).__name__} | settings


def _plain(value: object) -> Any:  # noqa: ANN401 - plain data of any kind
    if isinstance(value, FitCalibration):
        batches = value.batches
        if isinstance(batches, Calibration):
            return {name: setting for name, setting in batches.to_json().items() if setting is not None}
        if batches is None:
            return {"from": "training data", "seed": value.seed, "examples": value.examples}
        return {"from": type(batches).__name__, "seed": value.seed}
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, type):
        return value.__name__
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value)  # a dataclass by its settings, or else its string or class name
    if is_dataclass(value) and kind.__str__ is object.__str__:
        shown = [(field, getattr(value, field.name)) for field in fields(value) if field.repr]
        settings = [f"{field.name}={setting!r}" for field, setting in shown if setting != field.default]
        return f"{kind.__name__}({', '.join(settings)})"
    return kind.__name__ if kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__ else str(value)
