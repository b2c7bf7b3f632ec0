"""Gives figures, settings, pictures and the model card to the loggers of a fit, to each as it takes them.

None of their packages is needed. All come at the step under which Lightning logs what is measured at that moment, so that steps
rise in each logger: what happens after six optimizer steps is logged at 5, as the sixth training step and a validation then are.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn

from billhook.fit.lightning_internals import initial_hyperparameters, logged_step

PREFIX = "billhook"
"""Where loggers keep the settings of callbacks."""


def log_figures(trainer: pl.Trainer, figures: Mapping[str, float | None]) -> None:
    """Gives figures to every logger, with the epoch, as Lightning does."""
    numbers = {name: float(value) for name, value in figures.items() if value is not None}
    for logger in trainer.loggers if numbers else ():
        logger.log_metrics(numbers | {"epoch": trainer.current_epoch}, step=logged_step(trainer))


def log_settings(trainer: pl.Trainer, callbacks: list[Mapping[str, Any]]) -> None:
    """Gives what callbacks are set to, each described by a dictionary, to every logger as hyperparameters.

    Their names are `billhook/CALLBACK/PARAMETER`, of the second callback of a class `billhook/CALLBACK_2/PARAMETER`.
    """
    settings, seen = dict[str, Any](), list[str]()
    for one in callbacks:
        seen.append(name := str(one["callback"]))
        number = seen.count(name)
        given = {key: value for key, value in one.items() if key != "callback"}
        settings |= _flat(f"{PREFIX}/{name}" + (f"_{number}" if number > 1 else ""), given)
    for logger in trainer.loggers if settings and trainer.is_global_zero else ():
        # TensorBoard shows the hyperparameters that come first alone
        others = initial_hyperparameters(trainer) if isinstance(logger, TensorBoardLogger) else {}
        with _warned(logger, "the settings of callbacks"):
            logger.log_hyperparams(others | settings)


def _flat(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401 - plain data
    """Returns the parts of a setting by name: numbers and words; lists as words."""
    if isinstance(value, Mapping):
        return {key: own for part, one in value.items() for key, own in _flat(f"{name}/{part}", one).items()}
    return {name: value if isinstance(value, bool | int | float | str) else str(value)}


def log_picture(trainer: pl.Trainer, name: str, figure: Any) -> None:  # noqa: ANN401 - matplotlib has no types
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
