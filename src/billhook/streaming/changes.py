"""Changes parameters of a model whose blocks come and go: of those that ranks share, a block at a time."""

from collections.abc import Callable, Mapping

from torch import nn

from billhook.model.surgery import Change, Swap, change_values, way_back
from billhook.running.sharded.turns import Turns, turns_of
from billhook.streaming.either import coming_of
from billhook.streaming.stream import Stream


def change_in_turn(model: nn.Module, changes: Mapping[str, Change]) -> list[Swap]:
    """Changes parameters, also of blocks that ranks share, each of which then lies in shards again; see `change_values`."""
    swaps = list[Swap]()
    turns = turns_of(model)
    for block in turns.blocks if turns is not None else ():
        assert turns is not None
        own = inside(turns, model, block, changes)
        if own or turns.is_altered(block):
            turns.bring(block)
            swaps += change_values(model, own, keep_on_device=True)  # where they go with their block
            turns.change()
            turns.leave()
    return swaps + change_values(model, outside(model, changes))


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
