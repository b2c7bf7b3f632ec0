"""Stages of a fit, each of which is done when the model has the shape that it leads to."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from billhook.fit.calibration import Calibration
from billhook.fit.events.event import log_event
from billhook.fit.events.rounds import At, check_at, step_of
from billhook.fit.events.shape_event import ShapeCallback
from billhook.fit.lightning_internals import is_search
from billhook.fit.run import callbacks_of, is_trial, training_steps
from billhook.schedules import Schedule


class StageCallback(ShapeCallback):
    """Changes tensor shapes in one or more stages, each at its step; one that the model's shape already shows is not repeated.

    Args:
        at: When each stage happens: a step (int), a fraction of training (float in 0..1), or `"start"` (before the optimizer
            exists); a schedule where a subclass defines that in its `steps`.
        calibration: The batches that stages are decided on.
        measure_batches: Validation batches on which the model is measured before and after each stage.
    """

    keeps_what_it_did = False  # the shape says it

    def __init__(self, at: Sequence[At | Schedule], calibration: Calibration, measure_batches: int | None) -> None:
        for moment in at:
            check_at(moment)
        self.at = list(at)
        self._steps: list[int] = []
        super().__init__(calibration, measure_batches)

    @abstractmethod
    def is_done(self, model: nn.Module, stage: int) -> bool:
        """Returns whether the model already has the shape that a stage, or a later one, leads to."""

    @abstractmethod
    def change(self, model: nn.Module, stage: int, optimizers: list[Optimizer]) -> str:
        """Carries out a stage and returns a phrase that says what was done."""

    @property
    def only_at_start(self) -> bool:
        """True if no shape changes in the middle of the fit."""
        return all(moment == "start" for moment in self.at)

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks all stages, and carries out those at the start."""
        self._steps = []
        super().begin(trainer, pl_module)
        others = [moment for callback in callbacks_of(trainer, type(self)) for moment in callback.at if moment != "start"]
        if is_trial(trainer) or (trainer.max_steps > 0 and trainer.max_epochs in (-1, None)):
            self.check_together(trainer, trainer.max_steps)
        elif others and "start" in self.at:
            raise ValueError(
                f"at={self.at}: 'start' next to later stages ({others}) needs a length that is known at the start: "
                "set max_steps alone, or give 0 instead of 'start'"
            )
        for index, moment in enumerate(self.at):
            if moment == "start" and not is_search(trainer) and not self.is_done(pl_module, index):
                log_event(trainer, self.as_event(trainer, pl_module, {}, partial(self.change, pl_module, index, [])))

    def steps(self, total: int | None, trainer: pl.Trainer) -> list[int]:
        """Returns the step of each stage, -1 for the start.

        Raises:
            ValueError: If one lies past the end of training, or two fall on one step.
        """
        trial, moments = is_trial(trainer), [moment for moment in self.at if not isinstance(moment, Schedule)]
        steps = [-1 if moment == "start" else step_of(moment, total, trial) for moment in moments]
        if not trial and len(set(steps)) < len(steps):
            raise ValueError(f"at={self.at}: two stages fall on one step ({steps} of {total} steps)")
        return steps

    def moments(self, total: int | None, trainer: pl.Trainer) -> dict[int, float]:
        """Returns the steps of the stages; each is done as a whole."""
        return dict.fromkeys(self.steps(total, trainer), 1.0)

    def check_together(self, trainer: pl.Trainer, total: int | None) -> None:
        """Checks the stages of all callbacks of this kind.

        Raises:
            ValueError: If two fall on one step.
        """
        steps = [step for callback in callbacks_of(trainer, type(self)) for step in callback.steps(total, trainer)]
        if not is_trial(trainer) and len(set(steps)) < len(steps):
            raise ValueError(f"two {type(self).__name__} fall on one step: their steps are {sorted(steps)}")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Turns fractions of training into steps, and checks the stages."""
        total = training_steps(trainer)
        self.check_together(trainer, total)
        self._steps = self.steps(total, trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Carries out what is due before the first step (after a resume: what the checkpoint had not yet)."""
        if any(step == -1 and not self.is_done(pl_module, stage) for stage, step in enumerate(self._steps)):
            self.events = []  # a checkpoint of a run without this callback undid the stage at the start
        super().on_train_start(trainer, pl_module)

    def due(self, model: nn.Module, step: int) -> list[int]:
        """Returns the stages that have come and are not done, by their number, in the order of their steps."""
        stages = sorted(enumerate(self._steps), key=lambda pair: pair[1])
        return [stage for stage, own in stages if own <= step and not self.is_done(model, stage)]

    def late(self, model: nn.Module, step: int) -> list[int]:
        """Returns the steps of the stages that are still to come."""
        return [own for stage, own in enumerate(self._steps) if own > step and not self.is_done(model, stage)]

    def carry_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule, moment: int) -> None:
        """Carries out a stage, unless one before it at the same step did."""
        if not self.is_done(pl_module, moment):
            self.happen(trainer, pl_module, partial(self.change, pl_module, moment))
