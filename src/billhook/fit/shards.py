"""Takes what FSDP2 shares out in a fit apart while shapes change: a sharded module is whole then, at once or block by block."""

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
    """Makes a sharded module whole while its shapes change, then shards it as it was, also after an error.

    What optimizers keep of parameters stays sharded.

    Args:
        module: The module.
        optimizers: Those that train it.
        gradients: Whether gradients follow; they are dropped otherwise.
        blockwise: Whether it is whole a block at a time: what happens within loads each that it looks into, see `ShardStore`.
    """
    if not is_sharded(module):
        yield
        return
    reshard(module)
    store = ShardStore(module, gradients)  # which gathers, and may fail, so it comes before anything changes
    shardings = remove_fsdp(module)
    whole_ones = store.begin()
    _follow(optimizers, whole_ones)
    if not gradients:
        for shard in whole_ones:
            shard.grad = None
    del whole_ones
    try:
        with nullcontext() if blockwise else store.all_loaded():
            yield
    finally:
        store.end()
        shards = store.sharded()
        restore_fsdp(module, shardings, shards)
        _follow(optimizers, shards)


def _follow(optimizers: Collection[Optimizer], new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Gives optimizers new parameters instead of others, and shards what they keep of these as they are."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [new.get(parameter, parameter) for parameter in group["params"]]
        for old, parameter in new.items():
            if old in optimizer.state:
                optimizer.state[parameter] = {key: _as(value, parameter) for key, value in optimizer.state.pop(old).items()}


def _as(value: object, like: nn.Parameter) -> object:
    """Shards what an optimizer keeps of a parameter as that is, if it is of its size; what is sharded stays so."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape or not value.ndim:
        return value
    if isinstance(value, DTensor) and value.placements != like.placements:
        return value.redistribute(placements=like.placements)
    return sharded_as(value, like)
