"""A sharded model whose shapes change in the middle of training: whole for that long, and sharded again as it was."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from billhook.running.sharded.fsdp import put_on, take_off
from billhook.running.sharded.shards import is_sharded, reshard, sharded_as, whole

Place = tuple[nn.Module, str]
"""A parameter, by a module that has it and its name there."""


@contextmanager
def reshaped(module: nn.Module, optimizers: Collection[Optimizer], gradients: bool) -> Iterator[None]:
    """Makes a sharded module whole on each rank while its shapes change, then shards it as it was, also after an error.

    What optimizers keep of parameters stays sharded. Gradients follow if that is asked for, and are dropped otherwise.
    """
    if not is_sharded(module):
        yield
        return
    reshard(module)
    before = dict(_places(module))
    plain = {place for place, own in before.items() if not isinstance(own, DTensor)}
    along = {place: found for place, own in before.items() if isinstance(own, DTensor) and (found := _dimension(own))[0]}
    del before
    gathered = _gathered(module, gradients)  # which may fail, so it comes before anything changes
    shardings = take_off(module)
    _put(module, optimizers, gathered)
    try:
        yield
    finally:
        places = dict(_places(module))
        dims = {own: along[place] for place, own in places.items() if place in along}
        put_on(module, shardings, {own for place, own in places.items() if place in plain}, lambda own: _placement(own, dims))
        _follow(places, optimizers)


def _places(module: nn.Module) -> Iterator[tuple[Place, nn.Parameter]]:
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None:
                yield (part, name), own


def _dimension(parameter: DTensor) -> tuple[int, int]:
    """Returns the dimension in which a parameter is sharded, and over how many ranks; the first one where it is not."""
    pairs = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    shards = [(one.dim, size) for one, size in pairs if isinstance(one, Shard)]
    return shards[-1] if shards else (0, 1)


def _placement(parameter: nn.Parameter, dims: Mapping[nn.Parameter, tuple[int, int]]) -> Shard | None:
    """Returns the dimension in which a parameter is sharded, None for the first: torch shares out another only evenly."""
    dim, ranks = dims.get(parameter, (0, 1))
    return Shard(dim) if dim and parameter.shape[dim] % ranks == 0 else None


def _gathered(module: nn.Module, gradients: bool) -> dict[nn.Parameter, nn.Parameter]:
    """Gathers all shards of a module, each once; with their gradients, if that is asked for."""
    found: dict[nn.Parameter, nn.Parameter] = {}
    for _, own in _places(module):
        if isinstance(own, DTensor) and own not in found:
            found[own] = nn.Parameter(whole(own), own.requires_grad)
            if gradients and own.grad is not None:
                found[own].grad = whole(own.grad)
    return found


def _put(module: nn.Module, optimizers: Collection[Optimizer], new: dict[nn.Parameter, nn.Parameter]) -> None:
    """Puts whole parameters instead of shards into a module and into optimizers, and lets go of the shards."""
    for (part, name), own in list(_places(module)):
        if own in new:
            part._parameters[name] = new[own]
    while new:
        _swap(optimizers, *new.popitem())


def _follow(places: Mapping[Place, nn.Parameter], optimizers: Collection[Optimizer]) -> None:
    """Gives optimizers the shards of parameters that were whole, and shards what they keep of these."""
    for own, new in {own: part._parameters[name] for (part, name), own in places.items()}.items():
        if new is None or new is own:
            continue
        if own.grad is not None:
            new.grad = sharded_as(own.grad, new)
        _swap(optimizers, own, new)
        for optimizer in optimizers:
            state = optimizer.state.get(new, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == new.shape and value.ndim:
                    state[key] = _as(value, new)


def _as(value: Tensor, like: Tensor) -> Tensor:
    if isinstance(value, DTensor) and isinstance(like, DTensor) and value.placements != like.placements:
        return value.redistribute(placements=like.placements)
    return sharded_as(value, like)


def _swap(optimizers: Collection[Optimizer], old: nn.Parameter, new: nn.Parameter) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [new if own is old else own for own in group["params"]]
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)
