"""Measures the model between two training steps by the user's own validation, and gives loggers what is found."""

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from billhook.engine.state import overridden
from billhook.fit.lightning_internals import initial_hyperparameters, is_sequential, logged_step, to_device, validation_loaders
from billhook.fit.ranks import check_identical, fail_together
from billhook.fit.run import isolated_rng
from billhook.fit.training_step import bind_arguments
from billhook.linalg import widest_float


def measure(trainer: pl.Trainer, pl_module: pl.LightningModule, limit: int | None = None) -> dict[str, float]:
    """Runs the module's `validation_step` over the validation batches and returns what it logs, averaged.

    Loops, loggers, checkpoints, random numbers and train or eval mode are as before afterwards.

    Args:
        trainer: The trainer, in the middle of a fit; without validation there are no values.
        pl_module: The module in training.
        limit: At most so many batches of each loader, 0 for none; by default as many as validation takes.
    """
    if limit == 0:
        return {}
    logged = _Logged()
    with fail_together(trainer, "validation"), _validating(trainer, pl_module, logged):
        if (batches := validation_loaders(trainer)) is None:
            return {}
        most = [count if limit is None else min(count, limit) for count in trainer.num_val_batches]
        several = len(most) > 1 and is_sequential(batches)
        limits, batches.limits = batches.limits, most  # the loader is Lightning's own, which its validations use too
        try:
            pl_module.on_validation_start()
            pl_module.on_validation_epoch_start()
            for batch, index, loader in batches:
                logged.batch, logged.suffix = batch, f"/dataloader_idx_{loader}" if several else ""
                moved = to_device(trainer, batch, loader if several else 0)
                with trainer.precision_plugin.val_step_context():
                    bind_arguments(pl_module.validation_step, moved, index, *[loader] * several)()
            logged.batch, logged.suffix = None, ""
            pl_module.on_validation_epoch_end()
            pl_module.on_validation_end()
        finally:
            batches.limits = limits
        return logged.values(trainer)


class _Logged:
    """Stands in for `LightningModule.log`: keeps values as Lightning would, weighted by batch size."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # weighted sum, sum of weights, smallest, largest, plain sum
        self.how: dict[str, str] = {}
        self.metrics: dict[str, Metric] = {}
        self.batch: Any = None
        self.suffix = ""

    def __call__(
        self,
        name: str,
        value: Any,  # noqa: ANN401
        *_: object,
        batch_size: int | None = None,
        reduce_fx: Any = "mean",  # noqa: ANN401
        add_dataloader_idx: bool = True,
        **__: object,
    ) -> None:
        name += self.suffix if add_dataloader_idx else ""
        if isinstance(value, Metric):
            self.metrics[name] = value
            return
        self.how[name] = getattr(reduce_fx, "__name__", str(reduce_fx))
        number = float(value)
        weight = float(batch_size or (1 if self.batch is None else extract_batch_size(self.batch)))
        # on the CPU, where float64 is on every device's machine
        new = torch.tensor([number * weight, weight, number, number, number], dtype=torch.float64)
        old = self.sums.get(name, torch.tensor([0, 0, math.inf, -math.inf, 0], dtype=torch.float64))
        self.sums[name] = torch.stack([old[0] + new[0], old[1] + new[1], old[2].min(new[2]), old[3].max(new[3]), old[4] + number])

    def values(self, trainer: pl.Trainer) -> dict[str, float]:
        """Returns each value reduced over all batches and devices, and computes metrics."""
        values = {}
        names = [*self.how.items(), *self.metrics]
        check_identical(trainer, "validation", "what is logged (nothing, where a rank has no batches)", names)
        if self.sums:
            device = trainer.strategy.root_device
            packed = torch.stack(list(self.sums.values())).to(device, widest_float(device))
            # ranks sum in place, and collectives want memory without gaps
            least, most, summed = packed[:, 2].clone(), packed[:, 3].clone(), packed[:, [0, 1, 4]].clone()
            reduced: Any = trainer.strategy.reduce(summed, reduce_op="sum")
            least, most = (trainer.strategy.reduce(t, reduce_op=op) for t, op in ((least, "min"), (most, "max")))
            for i, (name, how) in enumerate(self.how.items()):
                mean = reduced[i, 0] / reduced[i, 1]
                kinds = {"min": least[i], "max": most[i], "sum": reduced[i, 2]}
                values[name] = float(kinds.get(how, mean))
        for name, metric in self.metrics.items():
            values[name] = float(metric.compute())
        return values


@contextmanager
def _validating(trainer: pl.Trainer, pl_module: pl.LightningModule, logged: _Logged) -> Iterator[None]:
    stage, modes = trainer.state.stage, {name: m.training for name, m in pl_module.named_modules()}
    trainer.state.stage = RunningStage.VALIDATING  # by which modules and loaders know what they are called for
    pl_module.eval()
    try:
        with overridden(pl_module, log=logged), torch.no_grad(), isolated_rng():
            yield
    finally:
        for metric in logged.metrics.values():
            metric.reset()
        for name, module in pl_module.named_modules():
            module.training = modes[name]
        trainer.state.stage = stage


PREFIX = "billhook"
"""Where loggers keep the settings of callbacks."""


def log_metrics(trainer: pl.Trainer, figures: Mapping[str, float | None]) -> None:
    """Gives figures to every logger, with the epoch, as Lightning does.

    All come at the step under which Lightning logs what is measured at that moment, so that steps rise in each logger: what
    happens after six optimizer steps is logged at 5, as the sixth training step and a validation then are.
    """
    numbers = {name: float(value) for name, value in figures.items() if value is not None}
    for logger in trainer.loggers if numbers else ():
        logger.log_metrics(numbers | {"epoch": trainer.current_epoch}, step=logged_step(trainer))


def log_settings(trainer: pl.Trainer, callbacks: list[Mapping[str, Any]]) -> None:
    """Gives what callbacks are set to, each described by a dictionary, to every logger as hyperparameters.

    Their names are `billhook/CALLBACK/PARAMETER`, of the second callback of a class `billhook/CALLBACK_2/PARAMETER`.
    """
    settings, seen = dict[str, Any](), list[str]()
    for described in callbacks:
        seen.append(name := str(described["callback"]))
        number = seen.count(name)
        parameters = {key: value for key, value in described.items() if key != "callback"}
        settings |= _flat(f"{PREFIX}/{name}" + (f"_{number}" if number > 1 else ""), parameters)
    for logger in trainer.loggers if settings and trainer.is_global_zero else ():
        # TensorBoard shows the hyperparameters that come first alone
        others = initial_hyperparameters(trainer) if isinstance(logger, TensorBoardLogger) else {}
        with _warned(logger, "the settings of callbacks"):
            logger.log_hyperparams(others | settings)


def _flat(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 - plain data
    """Returns the parts of a setting by name: numbers and words; lists as words."""
    if isinstance(value, Mapping):
        parts = dict[str, Any]()
        for part, setting in value.items():
            parts |= _flat(f"{name}/{part}", setting)
        return parts
    return {name: value if isinstance(value, bool | int | float | str) else str(value)}


def log_plot(trainer: pl.Trainer, name: str, figure: Any) -> None:  # noqa: ANN401 - matplotlib has no types
    """Gives a figure of matplotlib to every logger that takes one; beside the figures of `CSVLogger` a PNG is written.

    The number in the file's name is that of the optimizer steps that were taken, as in records.
    """
    file = f"{name}_{trainer.global_step}.png"
    for logger in trainer.loggers if trainer.is_global_zero else ():
        step = logged_step(trainer)
        with _warned(logger, f"the picture {name}"):
            if isinstance(logger, MLFlowLogger):
                logger.experiment.log_figure(logger.run_id, figure, file)
            elif isinstance(logger, WandbLogger):
                logger.log_image(name, [figure], step=step)
            elif isinstance(logger, CSVLogger):
                figure.savefig(_beside(logger) / file)
            elif hasattr(board := getattr(logger, "experiment", None), "add_figure"):  # TensorBoard, and what is like it
                board.add_figure(name, figure, global_step=step, close=False)  # type: ignore[union-attr]


def log_card(trainer: pl.Trainer, card: Path) -> None:
    """Gives a model card to every logger that takes one: as an artefact, as text, or as a file beside the figures."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        with _warned(logger, "the model card"):
            if isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(card), "model_card")
            elif isinstance(logger, WandbLogger):
                _log_artifact(logger, card)
            elif isinstance(logger, CSVLogger):
                shutil.copyfile(card, _beside(logger) / "model_card.md")
            elif hasattr(board := getattr(logger, "experiment", None), "add_text"):
                board.add_text("model_card", card.read_text(encoding="utf-8"), global_step=logged_step(trainer))  # type: ignore[union-attr]


def _log_artifact(logger: WandbLogger, card: Path) -> None:
    import wandb  # there, as its logger is

    artifact = wandb.Artifact(f"model-card-{logger.experiment.id}", type="model-card")
    artifact.add_file(str(card))
    logger.experiment.log_artifact(artifact)


def _beside(logger: CSVLogger) -> Path:
    """Returns the folder of a logger's figures, which it may not have made yet."""
    folder = Path(logger.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _warned(logger: Logger, what: str) -> Iterator[None]:
    """Warns where a logger fails, as what it is given comes when the training is done."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"{type(logger).__name__} has not taken {what}: {type(error).__name__}: {error}")
