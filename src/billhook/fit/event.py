"""Events in a fit: when they are due, what is measured and logged, and what a resumed fit knows of them."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from billhook.arguments import check_int
from billhook.calibration.calibration import Calibration
from billhook.checkpoints.card import current_names
from billhook.checkpoints.export import TRAINED
from billhook.fit.calibration import FitCalibration
from billhook.fit.checkpoint_hooks import ResumeState, add_resume_state, unwrap_hooks, wrap_hooks
from billhook.fit.lightning_internals import is_tuning
from billhook.fit.measure import log_metrics, log_settings, measure
from billhook.fit.run import (
    callbacks_of,
    check_takes_steps,
    drop_pending,
    is_dev_run,
    remaining_rounds,
    training_record,
    training_steps,
)
from billhook.report.summary import summary
from billhook.schedules import Schedule

Event = dict[str, Any]

SIZES = ("params", "kv_cache_bytes", "sparsity")
"""Figures of the model that loggers are given after each event, and once before all."""
UNLOGGED = ("zeros", "flops")
"""Figures that records alone hold."""


class ShapeFollower(Callback, ABC):
    """Keeps something in the sizes of the model's tensors, and follows when these change in the middle of a fit."""

    @abstractmethod
    def follow(self) -> None:
        """Takes the shape that the model has now."""


class LengthSetter(Callback, ABC):
    """Sets the length of the fit, which others may need in their own `setup`."""

    @abstractmethod
    def set_length(self, trainer: pl.Trainer) -> None:
        """Sets the length; called again, it changes nothing."""


class EventFollower(Callback, ABC):
    """Looks at the model before all events of a fit, and after each."""

    @abstractmethod
    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the model as it is once it exists, before any event; called again in the fit, it does nothing."""

    @abstractmethod
    def on_event(self, trainer: pl.Trainer, event: Event) -> None:
        """Looks at the model after an event, which it may add to."""


class EventCallback(Callback, ABC):
    """Changes the model at given steps of a fit. Events are counted by step, measured, logged, and not repeated after a resume.

    Args:
        calibration: The batches that events are decided on.
        measure_batches: Validation batches to measure before and after each event; by default all of validation, 0 for none.

    Attributes:
        events: What has happened: for each event its number in the fit, its step, what was done, and figures before and after.
        done: The last step by which all that was due has been done; -1 for none.
        asked: The amount that was due by then.
        start: Figures of the model before any event, at step 0, which the first callback of a fit keeps.
        must_resume: True if its state says what it has done, so that a run cannot continue with another instead of it.
    """

    must_resume = True

    def __init__(self, calibration: FitCalibration, measure_batches: int | None) -> None:
        if measure_batches is not None:
            check_int("measure_batches", measure_batches, least=0)
        self.calibration, self.measure_batches = calibration, measure_batches
        self._steps: dict[int, float] = {}
        self._last_step = -1
        self._resume: ResumeState | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets all events, when a fit begins."""
        self.events: list[Event] = []
        self.last_event_step, self.last_target = -1, 0.0
        self.start: dict[str, float | None] = {}
        self._validated: dict[str, Any] = {}

    @abstractmethod
    def check_trainer(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises `ValueError` if events cannot happen under the trainer's strategy, or next to its other callbacks."""

    @abstractmethod
    def steps(self, total: int | None, trainer: pl.Trainer) -> dict[int, float]:
        """Returns from which step on how much is pruned in a fit of so many steps, None if that is not known."""

    @abstractmethod
    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Does what is due, and sets `done` and `asked` as soon as it is done."""

    @property
    def needs_data(self) -> bool:
        """True if events take batches."""
        return False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Adds the shape to checkpoints, checks the trainer, and forgets an earlier fit."""
        if stage == "fit":
            check_takes_steps(trainer, type(self).__name__)
            self.check_trainer(trainer, pl_module)
            if [other.state_key for other in callbacks_of(trainer, type(self))].count(self.state_key) > 1:
                raise ValueError(f"two {type(self).__name__} ({self.state_key}): one is enough, with a schedule")
            for follower in callbacks_of(trainer, EventFollower):
                follower.begin(trainer, pl_module)  # even if it is later in the list
        wrap_hooks(trainer, pl_module)
        self._resume, self._steps, self._last_step = None, {}, -1
        if stage == "fit" and trainer.global_step == 0:  # otherwise the fit before continues
            self.reset()
        if stage == "fit" and callbacks_of(trainer, EventCallback)[0] is self and not is_dev_run(trainer):
            log_settings(trainer, [describe_callback(callback) for callback in callbacks_of(trainer, EventCallback)])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the steps of the events."""
        steps = self.steps(training_steps(trainer), trainer)
        self._steps = remaining_rounds(steps, self.last_event_step, self.last_target, type(self).__name__)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Carries out what is due before the first step (after a resume: what the checkpoint had not yet)."""
        if self.needs_data:
            self.calibration.check(trainer)
        if callbacks_of(trainer, EventCallback)[0] is self and starts_fresh(trainer):
            record_start(trainer, {} if events_of(trainer) else summary(pl_module).numbers())
            record_start(trainer, metrics_of_callbacks(trainer, pl_module))
        self._run(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Carries out what is due at the step that has just been taken."""
        if trainer.global_step != self._last_step:  # a batch of gradients that are only accumulated is no step
            self._run(trainer, pl_module)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        for due in self.due(pl_module, trainer.global_step):
            self.apply_event(trainer, pl_module, due)

    def due(self, model: nn.Module, step: int) -> list[int]:
        """Returns what is due at a step: of the moments that have come since the last event, the last one."""
        return [due for due in self._steps if self.last_event_step < due <= step][-1:]

    def pending_steps(self, model: nn.Module, step: int) -> list[int]:
        """Returns the steps of the events that are still to come."""
        return [pending for pending in self._steps if pending > step]

    def metrics(self, model: nn.Module) -> dict[str, float | None]:
        """Returns what else is told of the model at the start and at the end of a fit."""
        return {}

    def plots(self) -> Mapping[str, Any]:
        """Returns figures of matplotlib that `Report` writes beside its own, by what they show."""
        return {}

    def validate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Returns what validation logs of the model as it is."""
        return measure(trainer, pl_module, self.measure_batches)

    def record_event(self, trainer: pl.Trainer, model: nn.Module, metrics: dict[str, float], change: Callable[[], str]) -> Event:
        """Carries out a change, which says what was done; returns an event, which the caller measures afterwards and logs."""
        before = summary(model).numbers() | metrics
        what = change()
        number = len(events_of(trainer))  # of a step, events of several callbacks come in any order
        event: Event = {"number": number, "step": trainer.global_step, "what": what, "before": before, "after": {}}
        event["by"] = describe_callback(self)
        self.events.append(event)  # it has happened, even if measuring fails
        event["after"] |= summary(model).numbers()
        event["label"] = self.label(event)
        rank_zero_info(f"billhook, step {event['step']}: {what}")
        return event

    def label(self, event: Event) -> str:
        """Returns a few words for an event, for tables, pictures and model cards; all of it is in `what`."""
        return str(event["what"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns if training has ended before all events."""
        if late := self.pending_steps(pl_module, trainer.global_step):
            rank_zero_warn(
                f"{type(self).__name__}: training has ended at step {trainer.global_step}, before the event at step {max(late)}"
                + (f", the last of {len(late)} that were still to come" if len(late) > 1 else "")
            )

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds how the model was trained, and the shape to checkpoints that are saved after the fit or after an error, too."""
        add_resume_state(trainer, pl_module, checkpoint, self._resume)
        checkpoint[TRAINED] = self._validated | training_record(trainer)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps what validation said before the stop, until it says something again."""
        noted = checkpoint.get(TRAINED, {})
        self._validated = {"metrics": noted["metrics"]} if "metrics" in noted else {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what has happened so far; the shape itself is in the LightningModule's part of the checkpoint."""
        start = {"start": self.start} if self.start else {}
        return {"events": self.events, "done": self.last_event_step, "asked": self.last_target} | start

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what had happened."""
        self.events, self.last_event_step, self.last_target = (
            current_names(state_dict)["events"],
            state_dict["done"],
            state_dict["asked"],
        )
        self.start = state_dict.get("start", {})  # an older billhook noted none

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the LightningModule as it was found."""
        self.release_masks(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the LightningModule as it was found (Lightning does not call `teardown` then)."""
        self.release_masks(trainer, pl_module)

    def release_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Removes all hooks."""
        self._resume = unwrap_hooks(trainer, pl_module) or self._resume
        drop_pending(pl_module)


def events_of(trainer: pl.Trainer) -> list[Event]:
    """Returns what has happened in a fit, one after the other."""
    events = [event for callback in callbacks_of(trainer, EventCallback) for event in callback.events]
    return sorted(events, key=lambda event: (event["step"], event["number"]))


def percent_change(event: Event, name: str = "params") -> str:
    """Returns the change of a number in an event, in percent.

    >>> percent_change({"before": {"params": 2_881_792}, "after": {"params": 2_450_944}})
    '-15 %'
    """
    return f"{100 * (event['after'][name] / event['before'][name] - 1):+.2g} %"


def record_not_refitted(event: Event, what: str) -> None:
    """Notes what was cut and not refitted, and why, and says it."""
    if what:
        event["not_refitted"] = what
        rank_zero_info(f"billhook, step {event['step']}: {what}")


def starts_fresh(trainer: pl.Trainer) -> bool:
    """Tells whether a fit has taken no step, and goes on from no checkpoint."""
    return trainer.global_step == 0 and trainer.ckpt_path is None and not is_tuning(trainer)


def start_metrics(trainer: pl.Trainer) -> dict[str, float | None]:
    """Returns the figures of the model before any event; none if nothing noted them."""
    return {name: value for callback in callbacks_of(trainer, EventCallback) for name, value in callback.start.items()}


def metrics_of_callbacks(trainer: pl.Trainer, model: nn.Module) -> dict[str, float | None]:
    """Returns what callbacks tell of a model besides its size."""
    figures = dict[str, float | None]()
    for callback in callbacks_of(trainer, EventCallback):
        figures |= callback.metrics(model)
    return figures


def record_start(trainer: pl.Trainer, figures: Mapping[str, float | None]) -> None:
    """Notes figures of the model before any event, once each, and gives them to loggers, whose curves begin with them."""
    known = start_metrics(trainer)
    new = {name: value for name, value in figures.items() if name not in known}
    for first in callbacks_of(trainer, EventCallback)[:1]:
        first.start |= new
        log_metrics(trainer, {name: value for name, value in new.items() if name not in UNLOGGED})


def log_event(trainer: pl.Trainer, event: Event) -> None:
    """Gives every logger the figures of an event, and the event to who follows."""
    before, after = event["before"], event["after"]
    numbers = {key: after[key] for key in SIZES if key in after}
    for key in sorted(before.keys() & after.keys() - {*SIZES, *UNLOGGED}):
        numbers |= {f"{key}_before": before[key], f"{key}_after": after[key]}
    if event["number"] == 0 and starts_fresh(trainer):
        record_start(trainer, before)
    if event["step"] or trainer.ckpt_path is None:  # of a run that is resumed, what comes before training is logged already
        log_metrics(trainer, numbers)
    for follower in callbacks_of(trainer, EventFollower):
        follower.on_event(trainer, event)


BESIDE = {"self", "measure_batches", "plot_file", "metric"}
"""Parameters that do not decide what is done."""


def describe_callback(callback: Callback) -> dict[str, Any]:
    """Returns the name of a callback's class as `callback`, and what is set of its settings; data by where it comes from."""
    beside = BESIDE | ({"calibration"} if getattr(callback, "needs_data", None) is False else set())
    parameters = inspect.signature(type(callback).__init__).parameters
    settings = {name: getattr(callback, name, None) for name in parameters if name not in beside}
    if any(isinstance(value, Schedule) for name, value in settings.items() if name != "at"):
        settings.pop("at", None)  # the schedule says when
    plain = {name: _plain(value) for name, value in settings.items() if value is not None}
    # what is switched off by default is not told
    plain = {name: value for name, value in plain.items() if value or value != (parameters[name].default or value)}
    return {"callback": type(callback).__name__} | plain


def _plain(value: object) -> Any:  # noqa: ANN401 - plain data of any kind
    if isinstance(value, FitCalibration):
        return _data(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, type):
        return value.__name__
    return value if value is None or isinstance(value, bool | int | float | str) else _words(value)


def _words(value: object) -> str:
    """Says an object as its class prints it, a dataclass by what is set, or the class's name where that is an address."""
    kind = type(value)
    if is_dataclass(value) and kind.__str__ is object.__str__:
        shown = [(field, getattr(value, field.name)) for field in fields(value) if field.repr]
        settings = [f"{field.name}={setting!r}" for field, setting in shown if setting != field.default]
        return f"{kind.__name__}({', '.join(settings)})"
    prints = kind.__str__ is not object.__str__ or kind.__repr__ is not object.__repr__
    return str(value) if prints else kind.__name__


def _data(calibration: FitCalibration) -> dict[str, Any]:
    batches, seed = calibration.batches, calibration.seed
    if isinstance(batches, Calibration):
        return {name: value for name, value in batches.to_json().items() if value is not None}
    if batches is None:
        return {"from": "training data", "seed": seed, "examples": calibration.examples}
    return {"from": type(batches).__name__, "seed": seed}
