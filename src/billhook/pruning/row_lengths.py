"""Finds which multiples rows become by a cut, and what other lengths would cost."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from billhook.pruning.cuts import Cut, find_cut
from billhook.pruning.widths.rows import length_of, others
from billhook.pruning.widths.told import RowLength
from billhook.serving.divisible import MULTIPLES, multiple_of


def row_lengths(model: nn.Module, cut: Cut, asked: Mapping[str, int], least: int = 1) -> tuple[RowLength, ...]:
    """Returns how long the rows become that a cut makes shorter, those that were 256 or longer.

    Args:
        model: The model.
        cut: What is removed.
        asked: By place, how many units would stay by what was asked for.
        least: The fewest that may stay.
    """
    units = cut.places
    alike: dict[RowLength, list[str]] = {}
    for name in cut.units:
        one, kept, each = units[name], cut.after[name][0], length_of(units[name])
        if one.count() * each >= MULTIPLES[0]:
            row = RowLength(one.kind, 1, each, asked[name], kept, multiple_of(kept * each))
            alike.setdefault(row, []).append(name)
    found = list[RowLength]()
    for row, places in alike.items():
        counts = {name: units[name].count() for name in places}
        options = {} if row.kind == "head" else others(row.asked, row.kept, max(counts.values()), least)
        more = list[tuple[int, int, int]]()
        for kept, multiple in options.items():
            chosen = cut.units | {name: list(range(kept, count)) for name, count in counts.items()}
            then = find_cut(model, cut.structure, units, chosen)
            more.append((kept, multiple, then.parameters[1] - cut.parameters[1]))
        found.append(replace(row, places=len(places), others=tuple(more)))
    return tuple(found)
