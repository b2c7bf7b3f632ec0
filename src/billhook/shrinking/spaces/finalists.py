"""Picks the choices that are repaired as a whole before one of them is taken, where layers stay alike."""

from collections.abc import Callable, Mapping, Sequence

from billhook.shrinking.choose import Levels
from billhook.shrinking.levels import Place
from billhook.shrinking.spaces.hidden import HIDDEN
from billhook.shrinking.spaces.space import Point, Space

NEAR = 1.25
"""How many times as much as the best a choice may lose before repair: refitted places put together say too little of it."""
MOST = 2
"""How many choices are repaired at most."""


def finalists(order: Sequence[Point], measured: Mapping[Point, float], cut: Callable[[Point], frozenset[str]]) -> list[Point]:
    """Returns the choice that loses least, and after it the best of others that cut other kinds of units and lose little more.

    Args:
        order: Choices, the one that loses least first.
        measured: What each of them loses.
        cut: The kinds of units of which a choice keeps less.

    >>> finalists([(0, (1, 1)), (0, (1, 0)), (0, (0, 1))], {(0, (1, 1)): 1.0, (0, (1, 0)): 1.1, (0, (0, 1)): 1.5},
    ...     lambda point: frozenset(kind for kind, level in zip(("channel", "head"), point[1]) if level))
    [(0, (1, 1)), (0, (1, 0))]
    """
    best: dict[frozenset[str], Point] = {}
    for point in order:
        best.setdefault(cut(point), point)
    first, *others = best.values()
    return [first, *(point for point in others if measured[point] <= NEAR * measured[first])][:MOST]


def kinds_cut(space: Space, levels: Levels, places: Sequence[Place]) -> frozenset[str]:
    """Returns the kinds of units of which a choice keeps less: of places, `"block"`, and the hidden size."""
    kept = space.kept(levels)
    kinds = {place.kind for place in places if 0 < kept[place.name] < place.count}
    return frozenset({*kinds, *(["block"] if space.gone else []), *([HIDDEN] if space.fixed else [])})
