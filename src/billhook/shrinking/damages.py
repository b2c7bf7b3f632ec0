"""Predicts what each level of each place costs the whole model, from a few that are measured; and measures one kind alone."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from billhook.importance.blocks import BlockInfluence
from billhook.importance.score import score
from billhook.pruning.choice import ranked
from billhook.shrinking.choose import Frontier, Levels, Slot, joined, without_beaten
from billhook.shrinking.divergence import Divergence
from billhook.shrinking.levels import Place
from billhook.shrinking.variants import Library
from billhook.units.find import find_units
from billhook.units.gates import mask
from billhook.units.units import UnitKind

PROBES = (0.4, 0.8)
"""How far down the levels of a place those lie that are measured."""


def probes(levels: Sequence[int]) -> list[int]:
    """Returns the numbers of units at which the whole model is measured.

    >>> probes((384, 336, 288, 240, 192, 144, 96, 48)), probes((3, 2, 1)), probes((2, 1))
    ([240, 96], [2, 1], [1])
    """
    below = levels[1:]
    return [below[number] for number in dict.fromkeys(round(part * (len(below) - 1)) for part in PROBES)]


def damages(library: Library, divergence: Divergence, place: Place, levels: Sequence[int]) -> list[float]:
    """Returns what each level of a place loses, the whole model's KL divergence, with all else dense.

    It is measured at the probes; at other levels it is in proportion to the error of the refitted linears between them, which is
    known for all: a straight line from zero through the probes' pairs of error and damage, and on beyond the last.
    """
    points = {0.0: 0.0}
    for kept in probes(place.levels()):
        if (place.name, kept) not in library.measured:
            with library.assembled({place.name: kept}):
                library.note(place.name, kept, max(divergence.mean(library.weights(place.name, kept)), 0.0))
        points[library.errors[place.name, kept]] = library.measured[place.name, kept]
    errors, found = sorted(points), [0.0]
    for kept in levels[1:]:
        error, last = library.errors[place.name, kept], errors[-1]
        beyond = points[last] * error / last if last and error > last else None
        found.append(float(np.interp(error, errors, [points[one] for one in errors])) if beyond is None else beyond)
    lost = list(zip(levels, found, strict=True))
    return [max(other for more, other in lost if place.holds(more, kept)) for kept in levels]


def damage_without(library: Library, divergence: Divergence, block: str) -> float:
    """Returns what is lost without a block, the whole model's KL divergence, with all else dense."""
    if (block, 0) not in library.measured:
        with library.assembled({block: 0}):
            library.note(block, 0, max(divergence.mean(library.weights(block, 0)), 0.0))
    return library.measured[block, 0]


def make_slots(
    places: Sequence[Place], levels: Mapping[str, Sequence[int]], losses: Mapping[str, Sequence[float]], uniform: bool
) -> list[Slot]:
    """Makes a slot of each place, or of all places of one kind and size; of pairs, without those that others beat."""
    slots = {
        place.name: Slot((place.name,), tuple(own), tuple(place.cost(kept) for kept in own), tuple(losses[place.name]))
        for place in places
        for own in [levels[place.name]]
    }
    own = [(group[0], joined([slots[place.name] for place in group])) for group in groups(places, uniform)]
    return [without_beaten(slot) if place.pairs else slot for place, slot in own]


def groups(places: Sequence[Place], uniform: bool) -> list[list[Place]]:
    """Returns the places that take one level together: each alone, or all of one kind and size."""
    found: dict[object, list[Place]] = {}
    for place in places:
        found.setdefault((place.kind, place.count, place.allowed, place.pairs) if uniform else place.name, []).append(place)
    return list(found.values())


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
