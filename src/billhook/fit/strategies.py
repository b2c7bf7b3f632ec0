"""Lightning's strategies: their limits, and shape changes under DDP and FSDP2."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel

from billhook.fit.lightning_internals import averaging_callbacks, communication_state, forks_or_spawns
from billhook.fit.shards import gathered

FIRST = "prune or convert first on one device and train the result"


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


def check_masking_strategy(trainer: pl.Trainer, name: str) -> None:
    """Raises `ValueError` if the strategy does not support masks."""
    is_sharded = check_strategy(trainer, name)
    averaging = [type(callback).__name__ for callback, _ in averaging_callbacks(trainer)]
    if is_sharded and averaging:
        raise ValueError(f"{name} under ModelParallelStrategy cannot mask the copy of {averaging[0]}. Remove {averaging[0]}.")


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


@contextmanager
def unwrapped(trainer: pl.Trainer, blockwise: bool = False) -> Iterator[None]:
    """Unwraps DDP and FSDP2 within, because their hooks are on the old parameters.

    Within, sharded parameters are gathered: all of them, or with `blockwise`, one block at a time.
    """
    module, wrapped = trainer.lightning_module, isinstance(trainer.strategy.model, DistributedDataParallel)
    if wrapped:
        trainer.strategy.model = module
    if module.automatic_optimization:  # new gradients are computed before the next step
        module.zero_grad()
    with gathered(module, trainer.optimizers, gradients=not module.automatic_optimization, blockwise=blockwise):
        yield
    if wrapped:
        assert isinstance(trainer.strategy, DDPStrategy)
        trainer.strategy.configure_ddp()  # same settings, new buckets and hooks
        if isinstance(state := communication_state(trainer), PowerSGDState):
            _restart(state)


def _restart(state: PowerSGDState) -> None:
    """Clears PowerSGD's state, because DDP's buckets change in the first two steps."""
    state.iter = max(0, min(state.iter, state.start_powerSGD_iter - 2))
    for value in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
        value.clear()
