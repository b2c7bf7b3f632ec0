"""Finds what places cost by the clock: times the whole model with all places of one shape cut to a level, beside the dense one.

As in ZipLM (Kurtic, Frantar & Alistarh, 2023, https://arxiv.org/abs/2302.04089), a table of measured times stands for all that
decides how fast hardware runs a shape. Differences of whole models hold what a module on its own would not: the cache, attention
over it, and what every step costs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import median

from transformers import PreTrainedModel

from billhook.engine.state import undisturbed
from billhook.model.meta import sharing
from billhook.pruning.block_plan import BlockPlan, take_out
from billhook.pruning.cuts import Cut
from billhook.pruning.removal import remove
from billhook.shrinking.costs import cut_of
from billhook.shrinking.latency.workload import Workload
from billhook.shrinking.levels import Place
from billhook.shrinking.shrunk import Times
from billhook.shrinking.work import Work

Seconds = Callable[[Sequence[PreTrainedModel]], Sequence[Sequence[float]]]
"""Measures models side by side, in interleaved rounds: by model, the seconds of each round."""


@dataclass(frozen=True, eq=False)
class Clock:
    """Times a model with what it would be after a cut; the model stays as it is.

    Args:
        model: The model.
        seconds: Measures models.
        workload: Says what they do meanwhile.
    """

    model: PreTrainedModel
    seconds: Seconds
    workload: str

    def times(self, cut: Cut, blocks: BlockPlan | None = None) -> Times:
        """Measures the model before and after a cut, and without some blocks, as copies that share all that stays whole."""
        with undisturbed(self.model):
            dense, smaller = sharing(self.model), sharing(self.model)
            remove(smaller, cut)
            if blocks is not None:
                take_out(smaller, blocks)
            first, own = self.seconds([dense, smaller])
        ratios = [after / before for before, after in zip(first, own, strict=True)]
        return Times(median(first), median(own), median(ratios), self.workload)


def clock_of(model: PreTrainedModel, workload: Workload | None) -> Clock:
    """Returns a clock that times a model doing what is asked, as `billhook bench` measures; refuses a model that cannot do it."""
    try:
        with undisturbed(model):
            own = (workload or Workload()).of(model)
    except ValueError as error:
        raise ValueError(f"latency: {error}") from error
    return Clock(model, own.seconds, str(own))


def timed(work: Work, most: float, clock: Clock) -> Work:
    """Returns the work within a budget of time, a fraction of the dense model's, with what places cost by the clock.

    Args:
        work: The work, begun for a budget of time.
        most: The fraction.
        clock: Measures each level of places of one shape.

    Raises:
        ValueError: If the budget cannot be reached.
    """
    found: list[tuple[list[Place], list[Times]]] = []
    groups = _same_shape(work.places)
    work.steps += sum(len(same[0].levels()) - 1 for same in groups)
    for same in groups:
        one = list[Times]()
        for kept in same[0].levels()[1:]:
            gone = {name: list(range(kept, place.count)) for place in same for name in place.names}
            one.append(clock.times(cut_of(work.search, gone)))
            work.advance()
        found.append((same, one))
    now = round(1e9 * median(times.dense for _, own in found for times in own))
    priced = dict[str, Place]()
    for same, own in found:
        priced |= {place.name: _priced(place, [times.ratio for times in own], now / len(same)) for place in same}
    places = [priced[place.name] for place in work.places]
    blocks = work.blocks.priced(_timed_blocks(work, clock, now), places)
    new = replace(work, target="latency", now=now, limit=int(most * now), places=places, blocks=blocks)
    new.divide(most)
    return new


def _timed_blocks(work: Work, clock: Clock, now: int) -> int:
    """Measures what one of the blocks that may go takes: without the latter half of them, or the last where half cannot go."""
    some = work.blocks.able[len(work.blocks.able) // 2 :]
    if not some:
        return 0
    some = some if not work.blocks.refusal(some) else some[-1:]
    work.advance()
    return round((1 - clock.times(cut_of(work.search, {}), work.blocks.planned(work.model, some)).ratio) * now / len(some))


def _same_shape(places: Sequence[Place]) -> list[list[Place]]:
    """Groups places that take as long at each level."""
    found: dict[object, list[Place]] = {}
    for place in places:
        found.setdefault((place.kind, place.count, place.allowed, place.each, len(place.names)), []).append(place)
    return list(found.values())


def _priced(place: Place, ratios: Sequence[float], share: float) -> Place:
    """Gives a place what it costs at each level, above the smallest: nanoseconds.

    Args:
        place: The place.
        ratios: By level, the time of a model whose places of this shape are all cut, against the dense model's.
        share: The time of the dense model over the number of these places.
    """
    falling = made_falling([1.0, *ratios])
    costs = [round((one - falling[-1]) * share) for one in falling]
    return replace(place, times=tuple(zip(place.levels(), costs, strict=True))[::-1])


def made_falling(values: Sequence[float]) -> list[float]:
    """Makes values that do not all fall do so: half way between the least so far and the most that follow.

    >>> made_falling([1.0, 0.75, 0.875, 0.5])
    [1.0, 0.8125, 0.8125, 0.5]
    """
    least = accumulate(values, min)
    most = list(accumulate(reversed(values), max))[::-1]
    return [(low + high) / 2 for low, high in zip(least, most, strict=True)]
