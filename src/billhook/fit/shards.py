"""Gathers FSDP2 modules while their shapes change, at once or block by block."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from billhook.engine.fsdp import remove_fsdp, restore_fsdp
from billhook.engine.sharding import is_sharded, reshard, sharded_as
from billhook.engine.shards import ShardStore


@contextmanager
def gathered(module: nn.Module, optimizers: Collection[Optimizer], gradients: bool, blockwise: bool = False) -> Iterator[None]:
    """Gathers a sharded module within, then shards it as before, also after an error.

    Optimizer state stays sharded.

    Args:
        module: The module.
        optimizers: The optimizers of the module.
        gradients: If True, keeps gradients; otherwise drops them.
        blockwise: If True, gathers one block at a time, when it is accessed; see `ShardStore`.
    """
    if not is_sharded(module):
        yield
        return
    reshard(module)
    store = ShardStore(module, gradients)  # gathering may fail, so it comes before any change
    shardings = remove_fsdp(module)
    full_parameters = store.begin()
    _follow(optimizers, full_parameters)
    if not gradients:
        for shard in full_parameters:
            shard.grad = None
    del full_parameters
    try:
        with nullcontext() if blockwise else store.all_loaded():
            yield
    finally:
        store.end()
        shards = store.sharded()
        restore_fsdp(module, shardings, shards)
        _follow(optimizers, shards)


def _follow(optimizers: Collection[Optimizer], new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replaces parameters in optimizers, and shards optimizer state like its parameter."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [new.get(parameter, parameter) for parameter in group["params"]]
        for old, parameter in new.items():
            if old in optimizer.state:
                optimizer.state[parameter] = {key: _as(value, parameter) for key, value in optimizer.state.pop(old).items()}


def _as(value: object, like: nn.Parameter) -> object:
    """Shards optimizer state like its parameter, if it has the same shape."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape or not value.ndim:
        return value
    if isinstance(value, DTensor) and value.placements != like.placements:
        return value.redistribute(placements=like.placements)
    return sharded_as(value, like)
