"""Facts of a fit: its length, its callbacks, its strategy, when its model is there, and how it was trained."""

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
    """Returns the optimizer steps from the start of training to its end; None where nothing bounds it."""
    if not trainer.lightning_module.automatic_optimization and trainer.max_epochs != -1:
        return None  # the module may step its optimizers any number of times in a batch
    steps = trainer.estimated_stepping_batches
    return None if steps == float("inf") or steps < 0 else int(steps)


def callbacks_of(trainer: pl.Trainer, kind: type[CallbackT]) -> list[CallbackT]:
    """Returns the callbacks of one kind, in the trainer's order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def is_dev_run(trainer: pl.Trainer) -> bool:
    """Returns whether this is a `fast_dev_run`, a step or two to try everything out."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def check_takes_steps(trainer: pl.Trainer, what: str) -> None:
    """Refuses a fit that takes no step, in which Lightning calls none of the hooks that `what` needs."""
    limits = {
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "limit_train_batches": trainer.limit_train_batches,
    }
    if none := next((name for name, value in limits.items() if value == 0), None):
        raise ValueError(
            f"{none}=0: a fit that takes no step prunes, converts and saves nothing, so {what} has no effect: take one step at "
            "least, or do it without training (`billhook prune`, bh.prune, bh.convert_kv_heads, bh.save)"
        )


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restores random numbers afterwards, also after an error, where Lightning's own `isolate_rng` does not."""
    rng = isolate_rng()
    rng.__enter__()
    try:
        yield
    finally:
        rng.__exit__(None, None, None)  # as if nothing had been raised


FIRST = "prune or convert first (billhook on one device), then train the result"


def check_masking_strategy(trainer: pl.Trainer, name: str) -> None:
    """Refuses strategies under which a callback cannot mask weights."""
    is_sharded = check_strategy(trainer, name)
    averaging = [type(callback).__name__ for callback, _ in averaging_callbacks(trainer)]
    if is_sharded and averaging:
        raise ValueError(
            f"{name} under ModelParallelStrategy cannot mask the copy that {averaging[0]} keeps: leave {averaging[0]} out"
        )


def check_learning_strategy(trainer: pl.Trainer, name: str) -> None:
    """Refuses strategies and callbacks under which a callback cannot learn masks."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            f"{name} chooses masks of whole weights at each step, and ModelParallelStrategy shards them: use one device or "
            "DDP, or WeightPruning"
        )
    if averaging := [type(callback).__name__ for callback, _ in averaging_callbacks(trainer)]:
        raise ValueError(
            f"{name} masks what runs see of weights, and not the copy that {averaging[0]} keeps: leave one of them out"
        )


def check_reshaping_strategy(trainer: pl.Trainer, name: str) -> None:
    """Refuses strategies under which a callback cannot change shapes."""
    check_strategy(trainer, name)
    if forks_or_spawns(trainer):
        raise ValueError(
            f"{name} changes shapes, and processes that are forked or spawned (ddp_notebook, ddp_fork, ddp_spawn) give back "
            f"nothing but weights, which the model they came from cannot take then: use strategy='ddp' in a script, or {FIRST}"
        )


def check_strategy(trainer: pl.Trainer, name: str) -> bool:
    """Refuses strategies under which no callback works; returns whether the fit is sharded by FSDP2."""
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
    reason = ", which flattens the parameters of a layer into one (FSDP1)" if isinstance(strategy, FSDPStrategy) else ""
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
    if any(isinstance(module, PreTrainedModel) for module in pl_module.modules()):
        step()
        return
    attributes = vars(pl_module)
    if _WAITING not in attributes:
        attributes[_WAITING], attributes[_HOOK] = [], partial(_configure, pl_module, pl_module.configure_model)
    attributes[_WAITING].append(step)


def drop_pending(pl_module: pl.LightningModule) -> None:
    """Drops the steps that still wait, and restores the module's hook."""
    if vars(pl_module).pop(_WAITING, None) is not None:
        del vars(pl_module)[_HOOK]


def _configure(pl_module: pl.LightningModule, configure: Callable[[], None]) -> None:
    """Makes the model, and takes the steps that wait for it."""
    configure()
    steps = vars(pl_module)[_WAITING]
    drop_pending(pl_module)
    before = TorchState.now()
    try:
        with torch.device("cpu"):  # Lightning has set a device and a dtype for new models, which are not for what steps compute
            TorchState(gradients=before.gradients, precision=before.precision, autocast=before.autocast).restore()
            for step in steps:
                step()
    finally:
        before.restore()


def training_record(trainer: pl.Trainer) -> dict[str, Any]:
    """Returns data, seed, precision and devices of a fit as `training`, and the last figures of its validation as `metrics`."""
    data = getattr(getattr(trainer, "datamodule", None), "data", None)
    seed = os.environ.get("PL_GLOBAL_SEED", "")  # of `seed_everything`, in this process or the one that started it
    training = {
        "data": without_folders(data) if _names(data) else None,
        "seed": int(seed) if seed.isdigit() else None,
        "precision": str(trainer.precision),
        "devices": trainer.world_size,
    }
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    metrics = {name: value for name, value in figures.items() if math.isfinite(value)}
    facts = {"training": {name: value for name, value in training.items() if value is not None}}
    return facts | ({"metrics": metrics} if metrics else {})


def _names(data: object) -> bool:
    """Tells whether data is named, and not, or only in part, an object of `datasets`, which may be a dictionary."""
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return isinstance(data, str) or (bool(parts) and all(_names(part) for part in parts))


At = Step | Literal["start"]
"""A step (int), a fraction of training (float in 0..1), or `"start"`.

`ratio=Linear(final=0.5)` is a schedule of the amount, `at=Linear(final=1.0)` one of the share of it that is removed by a step.
"""


def check_at(at: At | Schedule, amount: object = None) -> None:
    """Refuses a moment that is none, or that contradicts a schedule of the amount."""
    if isinstance(at, str) and at != "start":
        raise ValueError(f"at={at!r} must be 'start', an int (a step) or a float in 0..1 (a fraction of training)")
    if not isinstance(at, Schedule | str):
        check_step(at, "at")
    if isinstance(amount, Schedule) and at != "start":
        raise ValueError(f"at={at!r}: the schedule says when; give it start and end instead")


def round_targets(
    amount: float | Schedule, at: At | Schedule, total: int | None, trainer: pl.Trainer, name: str
) -> dict[int, float]:
    """Finds from which step on how much is pruned; in a `fast_dev_run` there is only the last round.

    Args:
        amount: A fraction, or a schedule of it.
        at: When, or a schedule of the share of the amount.
        total: Steps of training; None where that is not known.
        trainer: The trainer.
        name: The name of the argument that is the amount.
    """
    trial = is_dev_run(trainer)
    if isinstance(amount, Schedule):
        return _amounts(amount, total, trial, name)
    if isinstance(at, Schedule):
        return {step: share * amount for step, share in share_targets(at, total, trial).items()}
    return {resolve_at(at, total, trial): amount}


def _values(schedule: Schedule, total: int | None, trial: bool, name: str) -> dict[int, float]:
    """Returns what a schedule gives from which step on; in a trial, which may be shorter than it, there is only its end."""
    if total is None:
        raise ValueError(f"{name}: a schedule needs the length of training, which is not known: set max_steps")
    bound = schedule.bind(sys.maxsize if trial else total)
    return {total: bound(sys.maxsize)} if trial else {step: bound(step) for step in bound.changes(total)}


def _amounts(schedule: Schedule, total: int | None, trial: bool, name: str) -> dict[int, float]:
    rounds = _values(schedule, total, trial, name)
    for step, value in rounds.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value!r} must be a fraction in [0, 1) (by the schedule, at step {step})")
    for higher, lower in pairwise(rounds.values()):
        if lower < higher:
            raise ValueError(f"{name}: the schedule goes down, from {higher:g} to {lower:g}: what is pruned does not come back")
    return rounds


def share_targets(schedule: Schedule, total: int | None, trial: bool) -> dict[int, float]:
    """Finds from which step on which share of the amount is pruned; refuses a schedule that does not rise to 1."""
    shares = _values(schedule, total, trial, f"at={schedule}")
    for (step, value), before in zip(shares.items(), [0.0, *shares.values()], strict=False):
        if not before <= value <= 1:
            raise ValueError(f"at={schedule}: it must rise to 1 at most, and is {value:g} at step {step} after {before:g}")
    if max(shares.values(), default=0) < 1:
        raise ValueError(
            f"at={schedule}: it says which share of the amount is pruned, and must rise to 1 before training ends; how much is "
            "pruned in all is said by the amount"
        )
    return shares


def resolve_at(at: At, total: int | None, trial: bool = False, name: str = "at") -> int:
    """Returns the step of a moment, 0 for the start; in a trial, which may be shorter, the last step at most."""
    if at == "start":
        return 0
    if total is None and isinstance(at, float):
        raise ValueError(f"{name}={at} is a fraction of training, whose length is not known: set max_steps")
    capped = min(at, total or 0) if trial and isinstance(at, int) else at
    return resolve_step(capped, sys.maxsize if total is None else total, name)


def remaining_rounds(rounds: Mapping[int, float], done: int, asked: float, name: str) -> dict[int, float]:
    """Drops rounds that would un-prune what was `asked` by step `done`, in a resumed fit of another schedule or length."""
    before = max((amount for step, amount in rounds.items() if step <= done), default=0.0)
    if done < 0 or math.isclose(before, asked):
        return dict(rounds)
    rank_zero_warn(
        f"{name}: the fit of the checkpoint had come to {asked:g} at step {done}, where this fit, by its arguments and length, "
        f"comes to {before:g}: what is pruned stays so, and rounds that ask for less are left out"
    )
    return {step: amount for step, amount in rounds.items() if step <= done or amount > asked}
