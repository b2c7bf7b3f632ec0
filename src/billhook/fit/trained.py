"""Says how a model was trained: data, seed, precision, and what validation said last."""

import math
import os
from typing import Any

import lightning.pytorch as pl

from billhook.names import without_folders


def trained(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns data, seed, precision and devices of a fit as `training`, and the last figures of its validation as `metrics`."""
    data = getattr(getattr(trainer, "datamodule", None), "data", None)
    training = {
        "data": without_folders(data) if _names(data) else None,
        "seed": _seed(),
        "precision": str(trainer.precision),
        "devices": trainer.world_size,
    }
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    metrics = {name: value for name, value in figures.items() if math.isfinite(value)}
    found = {"training": {name: value for name, value in training.items() if value is not None}}
    return found | ({"metrics": metrics} if metrics else {})


def _names(data: object) -> bool:
    """Tells whether data is named, and not, or only in part, an object of `datasets`, which may be a dictionary."""
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return isinstance(data, str) or (bool(parts) and all(_names(part) for part in parts))


def _seed() -> int | None:
    """Returns what `seed_everything` was given, in this process or the one that started it."""
    given = os.environ.get("PL_GLOBAL_SEED", "")
    return int(given) if given.isdigit() else None
