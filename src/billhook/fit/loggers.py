"""Gives pictures and the model card to the loggers of a fit, to each as it takes them, with no need of their packages."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_warn


def log_picture(trainer: pl.Trainer, name: str, figure: Any) -> None:  # noqa: ANN401 - matplotlib has no types
    """Gives a figure of matplotlib to every logger that takes one; beside the figures of `CSVLogger` a PNG is written."""
    file, step = f"{name}_{trainer.global_step}.png", trainer.global_step
    for logger in trainer.loggers if trainer.is_global_zero else ():
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
                board.add_text("model_card", card.read_text(encoding="utf-8"), global_step=trainer.global_step)  # type: ignore[union-attr]


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
