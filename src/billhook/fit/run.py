"""Facts of a fit: its length, its callbacks, its strategy, when its model is there, and how it was trained."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedModel

from billhook.engine.state import Ambient
from billhook.fit.lightning_internals import averages, forks_or_spawns
from billhook.names import without_folders

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


FIRST = "prune or convert first (billhook on one device), then train the result"


def check_strategy(trainer: pl.Trainer, name: str) -> None:
    """Refuses strategies under which no callback works."""
    _shards(trainer, name)


def check_masks(trainer: pl.Trainer, name: str) -> None:
    """Refuses strategies under which a callback cannot mask weights."""
    if not _shards(trainer, name):
        return
    averaging = [type(one).__name__ for one, _ in averages(trainer)]
    if averaging:
        raise ValueError(
            f"{name} under ModelParallelStrategy cannot mask the copy that {averaging[0]} keeps: leave {averaging[0]} out"
        )


def check_learned(trainer: pl.Trainer, name: str) -> None:
    """Refuses strategies and callbacks under which a callback cannot learn masks."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            f"{name}: learn chooses masks of whole weights at each step, and ModelParallelStrategy shards them: leave it out, or "
            "use one device or DDP"
        )
    if averaging := [type(one).__name__ for one, _ in averages(trainer)]:
        raise ValueError(
            f"{name}: learn masks what runs see of weights, and not the copy that {averaging[0]} keeps: leave one of them out"
        )


def check_shapes(trainer: pl.Trainer, name: str) -> None:
    """Refuses strategies under which a callback cannot change shapes."""
    _shards(trainer, name)
    if forks_or_spawns(trainer):
        raise ValueError(
            f"{name} changes shapes, and processes that are forked or spawned (ddp_notebook, ddp_fork, ddp_spawn) give back "
            f"nothing but weights, which the model they came from cannot take then: use strategy='ddp' in a script, or {FIRST}"
        )


def _shards(trainer: pl.Trainer, name: str) -> bool:
    """Returns whether the fit is sharded by FSDP2; refuses other ways to shard, and strategies that are not known."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        if (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
            raise ValueError(
                f"{name} works where data is parallel, not where tensors are: tensor_parallel_size={size} must be 1, as in "
                f"ModelParallelStrategy(data_parallel_size={trainer.world_size}, tensor_parallel_size=1); or {FIRST}"
            )
        return True
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy):
        return False
    reason = ""
    if isinstance(strategy, FSDPStrategy):
        reason = ", which flattens the parameters of a layer into one (FSDP1)"
    if isinstance(strategy, DeepSpeedStrategy):
        reason = ", which keeps weights and optimizer states in an engine of its own"
    raise ValueError(
        f"{name} works on one device, under DDP, and under ModelParallelStrategy (FSDP2); the strategy is "
        f"{type(strategy).__name__}{reason}. Use one of these, or {FIRST}"
    )


_WAITING = "_billhook_waiting"
_HOOK = "configure_model"


def once_model_exists(pl_module: pl.LightningModule, step: Callable[[], None]) -> None:
    """Takes a step at once where there is a Hugging Face model, else right after `configure_model`.

    That is after the module's `setup`, and before checkpoints are loaded, strategies wrap the model and optimizers are made.
    """
    if any(isinstance(one, PreTrainedModel) for one in pl_module.modules()):
        step()
        return
    own = vars(pl_module)
    if _WAITING not in own:
        own[_WAITING], own[_HOOK] = [], partial(_configure, pl_module, pl_module.configure_model)
    own[_WAITING].append(step)


def drop_waiting(pl_module: pl.LightningModule) -> None:
    """Drops the steps that still wait, and restores the module's hook."""
    if vars(pl_module).pop(_WAITING, None) is not None:
        del vars(pl_module)[_HOOK]


def _configure(pl_module: pl.LightningModule, configure: Callable[[], None]) -> None:
    """Makes the model, and takes the steps that wait for it."""
    configure()
    steps = vars(pl_module)[_WAITING]
    drop_waiting(pl_module)
    before = Ambient.now()
    try:
        with torch.device("cpu"):  # Lightning has set a device and a dtype for new models
            Ambient(gradients=before.gradients, precision=before.precision, autocast=before.autocast).restore()
            for step in steps:
                step()
    finally:
        before.restore()


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
