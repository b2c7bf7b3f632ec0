"""Finds numbers of units that use up a budget: levels that just meet it, and how far places are filled up in the end."""

from collections.abc import Mapping, Sequence

from billhook.pruning.widths import rounded
from billhook.shrinking.choose import Levels, cost, filled, widest
from billhook.shrinking.damages import groups, make_slots
from billhook.shrinking.levels import Place
from billhook.shrinking.spaces.hidden import Width
from billhook.shrinking.spaces.space import Space

BLOCKS = (0, 1, 2, 4)
"""For how many blocks that go there are levels that just meet the budget, where layers stay alike."""


def costs_of(places: Sequence[Place], uniform: bool) -> list[dict[int, int]]:
    """Returns by slot, and by all numbers of units that its places may keep, what they cost."""
    own = groups(places, uniform)
    return [{kept: sum(place.cost(kept) for place in group) for kept in group[0].allowed} for group in own]


def just_met(width: Width, levels: Mapping[str, Sequence[int]], limit: int) -> dict[str, set[int]]:
    """Finds further numbers to keep, where places of a kind keep as many, that just meet a limit.

    That is for several numbers of blocks that go, as if all were alike.
    """
    found: dict[str, set[int]] = {}
    for count in (one for one in BLOCKS if one <= len(width.blocks)):
        gone = width.blocks[:count]
        inside = {name for block in gone for name in block.places}
        places = [place for place in width.places if place.name not in inside]
        own, whole = groups(places, uniform=True), sum(place.cost(place.count) for place in places)
        within = limit - width.now + sum(block.cost for block in gone) + whole
        more = widest([levels[group[0].name] for group in own], costs_of(places, uniform=True), within) if own else {}
        for number, kept in more.items():
            alike = next(group for group in groups(width.places, uniform=True) if own[number][0] in group)
            for place in alike:
                found.setdefault(place.name, set()).update(kept)
    return found


def filled_up(
    space: Space,
    chosen: Levels,
    limit: int,
    places: Sequence[Place],
    levels: Mapping[str, Sequence[int]],
    losses: Mapping[str, Sequence[float]],
    uniform: bool,
) -> dict[str, int]:
    """Lets places keep more, between levels too, as far as a limit goes; what goes with its block stays gone."""
    kept, spare = space.kept(chosen), limit - space.left(chosen)
    present = [place for place in places if kept[place.name]]
    slots = make_slots(present, levels, losses, uniform)
    own = tuple(slot.kept.index(kept[slot.names[0]]) for slot in slots)
    some = zip(groups(present, uniform), slots, costs_of(present, uniform), strict=True)
    costs = [{one: c for one, c in own.items() if not group[0].pairs or one in slot.kept} for group, slot, own in some]
    more = filled(slots, own, cost(slots, own) + max(spare, 0), costs)
    return kept | {name: number for slot, number in zip(slots, more, strict=True) for name in slot.names}


def coarser(places: Sequence[Place], kept: Mapping[str, int], spare: int = 0) -> dict[str, int]:
    """Lets channels be a larger multiple of what rows are best a multiple of, where that takes at most 3 % of them more.

    Of them counts what a budget leaves, be it between the numbers that may be kept.

    Args:
        places: The places, which stay alike.
        kept: How many units some of them keep.
        spare: How much less they leave than the budget does.
    """
    found = dict(kept)
    for group in groups(places, uniform=True):
        present, place = [one.name for one in group if kept.get(one.name, 0)], group[0]
        now = kept[present[0]] if present else place.count
        if place.kind == "channel" and now < place.count:
            fewer = rounded(_afforded(place, now, spare / len(present)), place.count, most=now, more=False)
            found |= dict.fromkeys(present, fewer if fewer in place.allowed else now)
    return found


def _afforded(place: Place, kept: int, spare: float) -> int:
    """Returns how many units a place could keep, allowed or not, if it were given all that is spare."""
    within = place.cost(kept) + spare
    return next((more - 1 for more in range(kept + 1, place.count) if place.cost(more) > within), place.count - 1)
