"""Refuses strategies of Lightning under which callbacks do not work, with the reason and the way out."""

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from billhook.fit.lightning_internals import averages, forks_or_spawns

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
