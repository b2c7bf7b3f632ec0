"""Changes parameters of a model whose blocks come and go: of those that ranks share, a block at a time."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import nn
from torch.optim import Optimizer

from billhook.model.surgery import Change, have_followed, replace_parameters, way_back
from billhook.running.sharded.turns import Turns, turns_of
from billhook.streaming.either import coming_of
from billhook.streaming.stream import Stream


def change_in_turn(model: nn.Module, changes: Mapping[str, Change], optimizers: Iterable[Optimizer] = ()) -> Callable[[], None]:
    """Changes parameters, also of blocks that ranks share, each of which then lies in shards again.

    What is returned has optimizers follow the parameters of such blocks: it is not undone, so that what optimizers keep is never
    there twice, and is called when nothing can fail any more.
    """
    trained_by, old = list(optimizers), dict[str, nn.Parameter]()
    turns = turns_of(model)
    for block in turns.blocks if turns is not None else ():
        assert turns is not None
        own = inside(turns, model, block, changes)
        if own or turns.is_altered(block):
            turns.bring(block)
            old |= {name: model.get_parameter(name) for name in own}
            replace_parameters(model, own)
            turns.change()
            turns.leave()
    replace_parameters(model, outside(model, changes), trained_by)
    return partial(have_followed, model, old, changes, trained_by)


def whole_way_back(model: nn.Module) -> Callable[[], None]:
    """Returns what puts a model back to what it is now, as `way_back` does, and has its blocks come as now."""
    ways = [way_back(model), *([coming.way_back()] if (coming := coming_of(model)) is not None else [])]

    def back() -> None:
        for way in ways:
            way()

    return back


def inside(coming: Stream | Turns, model: nn.Module, block: nn.Module, changes: Mapping[str, Change]) -> dict[str, Change]:
    """Returns the changes of parameters in a block."""
    return {name: change for name, change in changes.items() if block_of(coming, model, name) is block}


def outside(model: nn.Module, changes: Mapping[str, Change]) -> dict[str, Change]:
    """Returns the changes of parameters that are in no block that comes and goes."""
    coming = coming_of(model)
    return {name: change for name, change in changes.items() if coming is None or block_of(coming, model, name) is None}


def block_of(coming: Stream | Turns, model: nn.Module, parameter: str) -> nn.Module | None:
    """Returns the block that a parameter is in, None if in none."""
    return coming.owner.get(model.get_submodule(parameter.rpartition(".")[0]))
