"""Runs the module's validation between training steps, and logs results."""

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
from billhook.fit.fit import Fit
from billhook.fit.lightning_internals import initial_hyperparameters, is_sequential, logged_step, to_device, validation_loaders
from billhook.fit.ranks import check_identical, fail_together
from billhook.fit.run import isolated_rng
from billhook.fit.training_step import bind_arguments
from billhook.linalg import widest_float


def measure(fit: Fit, trainer: pl.Trainer, pl_module: pl.LightningModule, limit: int | None = None) -> dict[str, float]:
    """Runs `validation_step` over the validation batches and returns averaged metrics.

    Loops, loggers, checkpoints, random state, and modes are restored.

    Args:
        fit: The training run.
        trainer: Its trainer, during training. Without validation, the result is empty.
        pl_module: The module in training.
        limit: Maximum number of batches per loader. Defaults to the Trainer's limit; 0 disables validation.
    """
    if limit == 0:
        return {}
    logged = _Logged()
    with fail_together(fit, "validation"), _validating(trainer, pl_module, logged):
        if (batches := validation_loaders(trainer)) is None:
            return {}
        most = [count if limit is None else min(count, limit) for count in trainer.num_val_batches]
        several = len(most) > 1 and is_sequential(batches)
        limits, batches.limits = batches.limits, most  # Lightning validates with the same loader
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
        return logged.values(fit)


class _Logged:
    """Replacement for `LightningModule.log`: averages values by batch size, as Lightning does."""

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
        # on the CPU, because some devices have no float64
        new = torch.tensor([number * weight, weight, number, number, number], dtype=torch.float64)
        old = self.sums.get(name, torch.tensor([0, 0, math.inf, -math.inf, 0], dtype=torch.float64))
        self.sums[name] = torch.stack([old[0] + new[0], old[1] + new[1], old[2].min(new[2]), old[3].max(new[3]), old[4] + number])

    def values(self, fit: Fit) -> dict[str, float]:
        """Returns values reduced over all batches and devices, and computed metrics."""
        values = {}
        names = [*self.how.items(), *self.metrics]
        check_identical(fit, "validation", "the logged metrics (none if a rank has no batches)", names)
        if self.sums:
            device = fit.device
            packed = torch.stack(list(self.sums.values())).to(device, widest_float(device))
            # collectives reduce in place and need contiguous memory
            least, most, summed = packed[:, 2].clone(), packed[:, 3].clone(), packed[:, [0, 1, 4]].clone()
            reduced = fit.reduce(summed)
            least, most = fit.reduce(least, "min"), fit.reduce(most, "max")
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
    trainer.state.stage = RunningStage.VALIDATING  # modules and loaders read it
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
"""Prefix of callback settings in loggers."""


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float | None]) -> None:
    """Logs metrics and the epoch to every logger, as Lightning does.

    The step is Lightning's own, so that steps increase in each logger: after six optimizer steps it is 5, as for the sixth
    training step and a validation after it.
    """
    numbers = {name: float(value) for name, value in metrics.items() if value is not None}
    for logger in trainer.loggers if numbers else ():
        logger.log_metrics(numbers | {"epoch": trainer.current_epoch}, step=logged_step(trainer))


def log_settings(trainer: pl.Trainer, callbacks: list[Mapping[str, Any]]) -> None:
    """Logs the settings of callbacks to every logger as hyperparameters.

    Names are `billhook/CALLBACK/PARAMETER`, and `billhook/CALLBACK_2/PARAMETER` for the second callback of a class.
    """
    settings, seen = dict[str, Any](), list[str]()
    for described in callbacks:
        seen.append(name := str(described["callback"]))
        number = seen.count(name)
        parameters = {key: value for key, value in described.items() if key != "callback"}
        settings |= _flatten(f"{PREFIX}/{name}" + (f"_{number}" if number > 1 else ""), parameters)
    for logger in trainer.loggers if settings and trainer.is_global_zero else ():
        # TensorBoard shows only the first hyperparameters it gets
        others = initial_hyperparameters(trainer) if isinstance(logger, TensorBoardLogger) else {}
        with _warn_on_error(logger, "the settings of callbacks"):
            logger.log_hyperparams(others | settings)


def _flatten(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 - plain data
    """Flattens a setting to numbers and strings by name."""
    if isinstance(value, Mapping):
        parts = dict[str, Any]()
        for part, setting in value.items():
            parts |= _flatten(f"{name}/{part}", setting)
        return parts
    return {name: value if isinstance(value, bool | int | float | str) else str(value)}


def log_plot(trainer: pl.Trainer, name: str, figure: Any) -> None:  # noqa: ANN401 - matplotlib has no types
    """Logs a matplotlib figure to every logger; for `CSVLogger`, saves a PNG.

    The number in the file name is the number of optimizer steps, as in records.
    """
    file = f"{name}_{trainer.global_step}.png"
    for logger in trainer.loggers if trainer.is_global_zero else ():
        step = logged_step(trainer)
        with _warn_on_error(logger, f"the plot {name}"):
            if isinstance(logger, MLFlowLogger):
                logger.experiment.log_figure(logger.run_id, figure, file)
            elif isinstance(logger, WandbLogger):
                logger.log_image(name, [figure], step=step)
            elif isinstance(logger, CSVLogger):
                figure.savefig(_log_folder(logger) / file)
            elif hasattr(board := getattr(logger, "experiment", None), "add_figure"):  # TensorBoard and similar loggers
                board.add_figure(name, figure, global_step=step, close=False)  # type: ignore[union-attr]


def log_card(trainer: pl.Trainer, card: Path) -> None:
    """Logs a model card to every logger: as an artifact, as text, or as a file."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        with _warn_on_error(logger, "the model card"):
            if isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(card), "model_card")
            elif isinstance(logger, WandbLogger):
                _log_artifact(logger, card)
            elif isinstance(logger, CSVLogger):
                shutil.copyfile(card, _log_folder(logger) / "model_card.md")
            elif hasattr(board := getattr(logger, "experiment", None), "add_text"):
                board.add_text("model_card", card.read_text(encoding="utf-8"), global_step=logged_step(trainer))  # type: ignore[union-attr]


def _log_artifact(logger: WandbLogger, card: Path) -> None:
    import wandb  # installed, because its logger is in use

    artifact = wandb.Artifact(f"model-card-{logger.experiment.id}", type="model-card")
    artifact.add_file(str(card))
    logger.experiment.log_artifact(artifact)


def _log_folder(logger: CSVLogger) -> Path:
    """Returns a logger's folder, creating it if needed."""
    folder = Path(logger.log_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _warn_on_error(logger: Logger, what: str) -> Iterator[None]:
    """Turns errors of a logger into warnings, so that training results are not lost."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"{type(logger).__name__} could not log {what}: {type(error).__name__}: {error}")
