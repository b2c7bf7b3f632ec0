"""Says what a search may try, before any of it is measured."""

from collections import Counter

from billhook.shrinking.damages import CALLED
from billhook.shrinking.hidden import HIDDEN
from billhook.shrinking.levels import Place
from billhook.shrinking.work import Work
from billhook.tracing.show import pattern


def outlook(work: Work, steps: int, within: str | None = None) -> str:
    """Returns what there is and may be left, the levels of each place, the blocks and hidden sizes, and how many steps it takes.

    Args:
        work: A work that has begun.
        steps: How many steps its search has at most.
        within: A budget that is no number of what is left, in words.
    """
    left = f"at most {work.limit:,} are to be left" if within is None else f"as few as {within} allows are to be left"
    lines = [f"{type(work.model).__name__}: {work.now:,} {work.target} now; {left}, and at least {work.least:,} can be"]
    rows = Counter((pattern(place.name), _levels(place, work.levels[place.name])) for place in work.places)
    lines += [f"  {name}  {levels}, in each of {count}" for (name, levels), count in rows.items()]
    able, sizes = len(work.blocks.able), [width.kept for width in work.hidden.widths]
    lines.append(f"  {able} whole block{'s' * (able > 1)} may go" if able else f"  all blocks stay: {work.blocks.why}")
    if sizes:
        lines.append(f"  {HIDDEN} {', '.join(map(str, [work.hidden.count, *sizes]))}")
    else:
        lines.append(f"  the {HIDDEN} stays: {work.hidden.why}")
    return "\n".join([*lines, f"  at most {steps:,} steps"])


def _levels(place: Place, levels: tuple[int, ...]) -> str:
    """Returns how many units a place may keep, all of them first; of KV heads and query heads, pairs."""
    if place.pairs:
        return f"{', '.join('/'.join(str(now) for _, now in place.told(kept).values()) for kept in levels)} KV/query heads"
    return f"{', '.join(map(str, levels))} {'KV heads' if place.kind == 'head' else CALLED[place.kind]}"
