"""Facts of a fit, and ways to leave it undisturbed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

CallbackT = TypeVar("CallbackT", bound=Callback)


def training_steps(trainer: pl.Trainer) -> int | None:
    """Returns the optimizer steps from the start of training to its end; None where nothing bounds it."""
    if not trainer.lightning_module.automatic_optimization and trainer.max_epochs != -1:
        return None  # the module may step its optimizers any number of times in a batch
    steps = trainer.estimated_stepping_batches
    return None if steps == float("inf") or steps < 0 else int(steps)


def callbacks_of(trainer: pl.Trainer, kind: type[CallbackT]) -> list[CallbackT]:
    """Returns the callbacks of one kind, in the trainer's order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def is_trial(trainer: pl.Trainer) -> bool:
    """Returns whether this is a `fast_dev_run`, a step or two to try everything out."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def check_some_steps(trainer: pl.Trainer, what: str) -> None:
    """Refuses a fit that takes no step, in which Lightning calls none of the hooks that `what` needs."""
    given = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs, "limit_train_batches": trainer.limit_train_batches}
    if none := next((name for name, value in given.items() if value == 0), None):
        raise ValueError(
            f"{none}=0: a fit that takes no step prunes, converts and saves nothing, so {what} has no effect: take one step at "
            "least, or do it without training (`billhook prune`, bh.prune, bh.convert_kv_heads, bh.save)"
        )


@contextmanager
def isolated() -> Iterator[None]:
    """Restores random numbers afterwards, also after an error, where Lightning's own `isolate_rng` does not."""
    failure: BaseException | None = None
    with isolate_rng():
        try:
            yield
        except BaseException as error:
            failure = error
    if failure is not None:
        raise failure
