"""Properties of a training run: length, callbacks, strategy, model creation, and record."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn
from transformers import PreTrainedModel

from billhook.engine.state import TorchState
from billhook.fit.lightning_internals import averaging_callbacks, forks_or_spawns
from billhook.private_paths import without_folders
from billhook.schedules import Schedule, Step, check_step, resolve_step

CallbackT = TypeVar("CallbackT", bound=Callback)


def training_steps(trainer: pl.Trainer) -> int | None:
    """Returns the total number of optimizer steps; None if it is unknown."""
    if not trainer.lightning_module.automatic_optimization and trainer.max_epochs != -1:
        return None  # the module may take any number of steps per batch
    steps = trainer.estimated_stepping_batches
    return None if steps == float("inf") or steps < 0 else int(steps)


def callbacks_of(trainer: pl.Trainer, kind: type[CallbackT]) -> list[CallbackT]:
    """Returns the callbacks of a class, in the trainer's order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def is_dev_run(trainer: pl.Trainer) -> bool:
    """Returns whether this is a `fast_dev_run`."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def check_takes_steps(trainer: pl.Trainer, what: str) -> None:
    """Raises `ValueError` if training takes no step, so that hooks are not called."""
    limits = {
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "limit_train_batches": trainer.limit_train_batches,
    }
    if none := next((name for name, value in limits.items() if value == 0), None):
        raise ValueError(
            f"{none}=0 takes no training step, so {what} has no effect. Train for at least one step, or use `billhook prune`, "
            "bh.prune, bh.convert_kv_heads, or bh.save without training."
        )


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restores random state afterward, also after an error, unlike Lightning's `isolate_rng`."""
    rng = isolate_rng()
    rng.__enter__()
    try:
        yield
    finally:
        rng.__exit__(None, None, None)  # without the exception, so that it restores


FIRST = "prune or convert first on one device and train the result"


def check_masking_strategy(trainer: pl.Trainer, name: str) -> None:
    """Raises `ValueError` if the strategy does not support masks."""
    is_sharded = check_strategy(trainer, name)
    averaging = [type(callback).__name__ for callback, _ in averaging_callbacks(trainer)]
    if is_sharded and averaging:
        raise ValueError(f"{name} under ModelParallelStrategy cannot mask the copy of {averaging[0]}. Remove {averaging[0]}.")


def check_learning_strategy(trainer: pl.Trainer, name: str) -> None:
    """Raises `ValueError` if the strategy or a callback does not support learned masks."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            f"{name} does not support ModelParallelStrategy, because masks need unsharded weights at each step. Use one device, "
            "DDP, or WeightPruning."
        )
    if averaging := [type(callback).__name__ for callback, _ in averaging_callbacks(trainer)]:
        raise ValueError(f"{name} cannot mask the copy of {averaging[0]}. Remove one of them.")


def check_reshaping_strategy(trainer: pl.Trainer, name: str) -> None:
    """Raises `ValueError` if the strategy does not support shape changes."""
    check_strategy(trainer, name)
    if forks_or_spawns(trainer):
        raise ValueError(
            f"{name} does not support ddp_notebook, ddp_fork, and ddp_spawn, whose processes return weights without shapes. Use "
            f"strategy='ddp' in a script, or {FIRST}."
        )


def check_strategy(trainer: pl.Trainer, name: str) -> bool:
    """Raises `ValueError` for unsupported strategies; returns whether the strategy is FSDP2."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        if (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
            raise ValueError(
                f"tensor_parallel_size={size} is not supported by {name}. Use ModelParallelStrategy(data_parallel_size="
                f"{trainer.world_size}, tensor_parallel_size=1), or {FIRST}."
            )
        return True
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy):
        return False
    reason = ", which flattens parameters (FSDP1)" if isinstance(strategy, FSDPStrategy) else ""
    if isinstance(strategy, DeepSpeedStrategy):
        reason = ", which manages weights and optimizer state itself"
    raise ValueError(
        f"{name} does not support {type(strategy).__name__}{reason}. Use one device, DDP, or ModelParallelStrategy (FSDP2), or "
        f"{FIRST}."
    )


_WAITING = "_billhook_waiting"
_HOOK = "configure_model"


def once_model_exists(pl_module: pl.LightningModule, step: Callable[[], None]) -> None:
    """Calls `step` now if the model exists, or else right after `configure_model`.

    That is after the module's `setup`, and before checkpoints are loaded, strategies wrap the model, and optimizers are created.
    """
    if any(isinstance(module, PreTrainedModel) for module in pl_module.modules()):
        step()
        return
    attributes = vars(pl_module)
    if _WAITING not in attributes:
        attributes[_WAITING], attributes[_HOOK] = [], partial(_configure, pl_module, pl_module.configure_model)
    attributes[_WAITING].append(step)


def drop_pending(pl_module: pl.LightningModule) -> None:
    """Drops pending calls and restores the module's hook."""
    if vars(pl_module).pop(_WAITING, None) is not None:
        del vars(pl_module)[_HOOK]


def _configure(pl_module: pl.LightningModule, configure: Callable[[], None]) -> None:
    """Creates the model and makes the pending calls."""
    configure()
    steps = vars(pl_module)[_WAITING]
    drop_pending(pl_module)
    before = TorchState.now()
    try:
        with torch.device("cpu"):  # undoes the default device and dtype that Lightning sets for new models
            TorchState(gradients=before.gradients, precision=before.precision, autocast=before.autocast).restore()
            for step in steps:
                step()
    finally:
        before.restore()


def training_record(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns the run's settings as `training` and last validation metrics as `metrics`."""
    data = getattr(getattr(trainer, "datamodule", None), "data", None)
    seed = os.environ.get("PL_GLOBAL_SEED", "")  # set by `seed_everything`, also in a parent process
    training = {
        "data": without_folders(data) if _names(data) else None,
        "seed": int(seed) if seed.isdigit() else None,
        "precision": str(trainer.precision),
        "devices": trainer.world_size,
    }
    facts: dict[str, Any] = {"training": {name: value for name, value in training.items() if value is not None}}
    metrics = dict[str, float]()
    for name, value in trainer.callback_metrics.items():
        if name.startswith("val") and math.isfinite(number := float(value)):
            metrics[name] = number
    return facts | ({"metrics": metrics} if metrics else {})


def _names(data: object) -> bool:
    """Returns whether data is given by name, not as an object of `datasets`."""
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return isinstance(data, str) or (bool(parts) and all(_names(part) for part in parts))


At = Step | Literal["start"]
"""A step (int), a fraction of training (float in 0..1), or `"start"`.

`ratio=Linear(final=0.5)` schedules the amount itself; `at=Linear(final=1.0)` schedules the share of the amount.
"""


def check_at(at: At | Schedule, amount: object = None) -> None:
    """Raises `ValueError` if `at` is not legal or contradicts a schedule of the amount."""
    if isinstance(at, str) and at != "start":
        raise ValueError(f"at={at!r} must be 'start', an int (a step) or a float in 0..1 (a fraction of training)")
    if not isinstance(at, Schedule | str):
        check_step(at, "at")
    if isinstance(amount, Schedule) and at != "start":
        raise ValueError(f"at={at!r} conflicts with the schedule of the amount. Set start and end of the schedule instead.")


def round_targets(
    amount: float | Schedule, at: At | Schedule, total: int | None, trainer: pl.Trainer, name: str
) -> dict[int, float]:
    """Returns the target amount by step; in a `fast_dev_run` only the last round.

    Args:
        amount: A fraction, or a schedule of it.
        at: Step or fraction of training, or a schedule of the share of the amount.
        total: Number of training steps; None if unknown.
        trainer: The trainer.
        name: Name of the amount's argument.
    """
    trial = is_dev_run(trainer)
    if isinstance(amount, Schedule):
        return _amounts(amount, total, trial, name)
    if isinstance(at, Schedule):
        return {step: share * amount for step, share in share_targets(at, total, trial).items()}
    return {resolve_at(at, total, trial): amount}


def _values(schedule: Schedule, total: int | None, trial: bool, name: str) -> dict[int, float]:
    """Returns the values of a schedule by step; in a trial only the final value."""
    if total is None:
        raise ValueError(f"{name}: a schedule requires a known training length. Set Trainer(max_steps=...).")
    bound = schedule.bind(sys.maxsize if trial else total)
    return {total: bound(sys.maxsize)} if trial else {step: bound(step) for step in bound.changes(total)}


def _amounts(schedule: Schedule, total: int | None, trial: bool, name: str) -> dict[int, float]:
    rounds = _values(schedule, total, trial, name)
    for step, value in rounds.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} must be a fraction in [0, 1) (by the schedule, at step {step})")
    for higher, lower in pairwise(rounds.values()):
        if lower < higher:
            raise ValueError(
                f"{name}: the schedule decreases from {higher:g} to {lower:g}, but pruning cannot be undone. Use an increasing "
                "one."
            )
    return rounds


def share_targets(schedule: Schedule, total: int | None, trial: bool) -> dict[int, float]:
    """Returns the share of the amount by step; raises `ValueError` unless it increases to 1."""
    shares = _values(schedule, total, trial, f"at={schedule}")
    for (step, value), before in zip(shares.items(), [0.0, *shares.values()], strict=False):
        if not before <= value <= 1:
            raise ValueError(f"at={schedule} must increase from 0 to 1, but is {value:g} at step {step} after {before:g}.")
    if max(shares.values(), default=0) < 1:
        raise ValueError(
            f"at={schedule} is the share of the amount to prune and must reach 1 before training ends. Set the total by the "
            "amount."
        )
    return shares


def resolve_at(at: At, total: int | None, trial: bool = False, name: str = "at") -> int:
    """Returns the step of `at`; 0 for the start, and at most the last step in a trial."""
    if at == "start":
        return 0
    if total is None and isinstance(at, float):
        raise ValueError(f"{name}={at} is a fraction of an unknown training length. Set Trainer(max_steps=...), or use a step.")
    capped = min(at, total or 0) if trial and isinstance(at, int) else at
    return resolve_step(capped, sys.maxsize if total is None else total, name)


def remaining_rounds(rounds: Mapping[int, float], last_step: int, target: float, name: str) -> dict[int, float]:
    """Drops rounds below the target of a resumed run with another schedule or length."""
    before = max((amount for step, amount in rounds.items() if step <= last_step), default=0.0)
    if last_step < 0 or math.isclose(before, target):
        return dict(rounds)
    rank_zero_warn(
        f"{name}: the checkpoint's run reached {target:g} at step {last_step}, where this run has {before:g}. Pruning is not "
        f"undone, and rounds below {target:g} are skipped."
    )
    return {step: amount for step, amount in rounds.items() if step <= last_step or amount > target}
