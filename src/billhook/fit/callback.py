"""Callbacks whose hooks take a `Fit`, and the Lightning hooks that call them."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from billhook.checkpoints.export import TRAINED
from billhook.fit.checkpoint_hooks import ResumeState, add_resume_state, unwrap_hooks, wrap_hooks
from billhook.fit.fit import Fit
from billhook.fit.lightning import LightningFit
from billhook.fit.run import drop_pending
from billhook.model import Checkpoint


class FitCallback(Callback):
    """A callback whose hooks take a `Fit`.

    Lightning calls them through its own hooks, other trainers directly.
    """

    def prepare(self, fit: Fit) -> None:
        """Checks the run before the model is wrapped and optimizers are created."""

    def resolve(self, fit: Fit) -> None:
        """Resolves steps, once the length of training is known."""

    def begin_training(self, fit: Fit) -> None:
        """Starts training or resumes it, with the checkpoint loaded."""

    def before_batch(self, fit: Fit, batch: object) -> None:
        """Runs before each batch."""

    def after_batch(self, fit: Fit) -> None:
        """Runs after each batch."""

    def after_validation(self, fit: Fit) -> None:
        """Runs after each validation during training."""

    def before_evaluation(self, fit: Fit) -> None:
        """Runs before validation, testing, or prediction without training."""

    def end_training(self, fit: Fit) -> None:
        """Runs after the last batch."""

    def close(self, fit: Fit) -> None:
        """Runs after all callbacks have ended training."""

    def release(self, fit: Fit, completed: bool) -> None:
        """Removes hooks after training (`completed`), an error, or a run without training."""

    def on_init_end(self, *_: object, **__: object) -> None:
        """Raises `ValueError`: transformers' Trainer calls this."""
        name = type(self).__name__
        raise ValueError(
            f"{name} is for Lightning's Trainer. In transformers' Trainer, use callbacks=[Callbacks([{name}(...)])] with "
            "Callbacks from billhook.integrations.transformers."
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Calls `prepare`."""
        if stage == "fit":
            self.prepare(LightningFit(trainer, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls `resolve`."""
        self.resolve(LightningFit(trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls `begin_training`."""
        self.begin_training(LightningFit(trainer, pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Calls `before_batch`."""
        self.before_batch(LightningFit(trainer, pl_module), batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Calls `after_batch`."""
        self.after_batch(LightningFit(trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls `after_validation` in training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.after_validation(LightningFit(trainer, pl_module))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls `before_evaluation` outside of training."""
        if trainer.state.fn != TrainerFn.FITTING:
            self.before_evaluation(LightningFit(trainer, pl_module))

    on_test_start = on_predict_start = on_validation_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls `end_training`."""
        self.end_training(LightningFit(trainer, pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls `close`."""
        self.close(LightningFit(trainer, pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Calls `release`."""
        self._end(trainer, pl_module, completed=stage == "fit")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Calls `release`, because Lightning does not call `teardown` after an error."""
        self._end(trainer, pl_module, completed=False)

    def _end(self, trainer: Trainer, pl_module: LightningModule, completed: bool) -> None:
        self.release(LightningFit(trainer, pl_module), completed)
        drop_pending(pl_module)


class ShapeSavingCallback(FitCallback):
    """A callback that adds shape, adapters, and random state to checkpoints."""

    _resume: ResumeState | None = None
    _validated: dict[str, Any]

    def checkpoint_entries(self) -> Checkpoint:
        """Returns further entries of a checkpoint, for readers that do not know this callback."""
        return {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Calls `prepare`, and wraps checkpoint hooks."""
        self._resume = None
        super().setup(trainer, pl_module, stage)
        wrap_hooks(trainer, pl_module)  # once: `prepare` has done it for a fit

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Checkpoint) -> None:
        """Adds the training record and, after training or an error, the shape."""
        add_resume_state(trainer, pl_module, checkpoint, self._resume)
        checkpoint[TRAINED] = self._validated | LightningFit(trainer, pl_module).record()
        checkpoint |= self.checkpoint_entries()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Checkpoint) -> None:
        """Restores the last validation metrics, until the next validation."""
        noted = checkpoint.get(TRAINED, {})
        self._validated = {"metrics": noted["metrics"]} if "metrics" in noted else {}

    def _end(self, trainer: Trainer, pl_module: LightningModule, completed: bool) -> None:
        super()._end(trainer, pl_module, completed)
        self._resume = unwrap_hooks(trainer, pl_module) or self._resume
