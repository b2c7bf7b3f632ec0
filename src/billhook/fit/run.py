"""What a trainer says of its run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

CallbackT = TypeVar("CallbackT", bound=Callback)


def training_steps(trainer: pl.Trainer) -> int | None:
    """Optimizer steps from the start of training to its end; None where nothing bounds it."""
    if not trainer.lightning_module.automatic_optimization and trainer.max_epochs != -1:
        return None  # how often the module steps its optimizers in a batch is its own affair
    steps = trainer.estimated_stepping_batches
    return None if steps == float("inf") or steps < 0 else int(steps)


def callbacks_of(trainer: pl.Trainer, kind: type[CallbackT]) -> list[CallbackT]:
    """The callbacks of one kind, in the trainer's order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def is_trial(trainer: pl.Trainer) -> bool:
    """Whether this is a `fast_dev_run`, a step or two to try everything out."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def is_search(trainer: pl.Trainer) -> bool:
    """Whether this is a fit in which a `Tuner` looks for a learning rate or a batch size, and which it takes back."""
    return any(getattr(callback, "_early_exit", False) for callback in callbacks_of(trainer, Callback))


@contextmanager
def isolated() -> Iterator[None]:
    """Random numbers are as before afterwards, also if what happens within fails, which Lightning's own `isolate_rng` forgets."""
    failure: BaseException | None = None
    with isolate_rng():
        try:
            yield
        except BaseException as error:
            failure = error
    if failure is not None:
        raise failure
