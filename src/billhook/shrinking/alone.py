"""Measures what one kind of unit alone would lose at the size of a budget, for comparison."""

from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from billhook.importance.blocks import BlockInfluence
from billhook.importance.score import score
from billhook.pruning.choice import ranked
from billhook.shrinking.choose import Frontier, Levels, Slot
from billhook.shrinking.divergence import Divergence
from billhook.units.find import find_units
from billhook.units.gates import mask
from billhook.units.units import UnitKind

CALLED: dict[UnitKind, str] = {"head": "heads", "channel": "channels", "block": "blocks"}


def of_one_kind(slots: Sequence[Slot], kinds: Sequence[UnitKind], limit: int) -> dict[UnitKind, Levels]:
    """Finds the levels that lose least within a limit if slots of one kind alone keep less, by kind, where that is enough.

    >>> slots = [Slot(("a",), (4, 2), (40, 20), (0.0, 0.3)), Slot(("b",), (4, 2), (40, 20), (0.0, 0.1))]
    >>> of_one_kind(slots, ["channel", "head"], 60), of_one_kind(slots, ["channel", "head"], 50)
    ({'channel': (1, 0), 'head': (0, 1)}, {})
    """
    found: dict[UnitKind, Levels] = {}
    for kind in dict.fromkeys(kinds) if len(set(kinds)) > 1 else ():
        own = [slot if kind == other else whole(slot) for slot, other in zip(slots, kinds, strict=True)]
        if (levels := Frontier(own).within(limit)) is not None:
            found[kind] = levels
    return found


def whole(slot: Slot) -> Slot:
    """Returns a slot that keeps all."""
    return Slot(slot.names, slot.kept[:1], slot.costs[:1], slot.losses[:1])


def fewer_blocks(
    model: PreTrainedModel, batches: Sequence[Any], divergence: Divergence, parameters: int, ends: tuple[int, int]
) -> tuple[int, float] | None:
    """Measures the model without its least important blocks (ShortGPT's score), as many as hold so many parameters.

    Returns:
        How many parameters they hold, and the divergence; None where there is not one stack of alike blocks, or too few.
    """
    try:
        ((name, blocks),) = find_units(model, "block").items()
    except ValueError:
        return None
    stack = cast(nn.ModuleList, model.get_submodule(name))
    sizes = {sum(one.numel() for one in block.parameters()) for block in stack}
    able = blocks.count() - sum(ends)
    if len(sizes) > 1 or not (size := sizes.pop()) or (number := -(-parameters // size)) > able:
        return None
    scores = score(model, {name: blocks}, BlockInfluence(), batches)
    gone = ranked(blocks, scores[name], ends)[:number]
    with mask(model, {name: sorted(gone)}, "block"):
        return number * size, divergence.mean()
