"""A budget of time: what each place costs by the clock, and a model that is fast enough by it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import median
from typing import Any

from transformers import PreTrainedModel

from billhook.arguments import annotated, whole
from billhook.engine.state import undisturbed
from billhook.model.config_fields import text_config
from billhook.model.meta import sharing
from billhook.pruning.block_plan import BlockPlan, take_out
from billhook.pruning.cuts import Cut
from billhook.pruning.removal import remove
from billhook.repairs.repair import RepairConfig
from billhook.report.generation import CacheKind, generates
from billhook.report.speed import Phase, check_speed, measure_speed
from billhook.shrinking.levels import Place, cut_of
from billhook.shrinking.shrunk import Times
from billhook.shrinking.smallest import Choosing, Found
from billhook.shrinking.work import Work

CONTEXT = 512


@dataclass(frozen=True)
class Workload:
    """Says what a model does while it is timed: by default it writes, one token after the other, after a prompt of 512 tokens.

    Args:
        phase: `"decode"`: writing a token; `"prefill"`: reading the prompts. By default it writes, or it reads where a model
            predicts no next token.
        batch_size: Sequences at once.
        context: Tokens of each prompt; by default 512, or as many as the model reads.
        new_tokens: Tokens that are written after the prompt, in each round.
        rounds: How often a model and the dense one are measured, in turn; medians count.
        cache: How the key/value cache is kept: see `Generation`.

    Raises:
        ValueError: If a number is out of range.

    >>> from billhook.shrinking.latency import Workload
    >>> print(Workload("prefill", batch_size=8, context=1024))
    reading prompts of 1,024 tokens, 8 at once
    """

    phase: Phase | None = None
    batch_size: int = 1
    context: int | None = None
    new_tokens: int = 8
    rounds: int = 11
    cache: CacheKind = "static"

    def __post_init__(self) -> None:
        annotated(Workload, vars(self))
        for name, least in {"batch_size": 1, "context": 2, "new_tokens": 1, "rounds": 1}.items():
            whole(name, least if (value := getattr(self, name)) is None else value, least)

    def of(self, model: PreTrainedModel) -> "Workload":
        """Decides what is left open, for one model; refuses a model that cannot do it."""
        phase: Phase = self.phase or ("decode" if generates(model) else "prefill")
        longest = getattr(text_config(model.config), "max_position_embeddings", None) or CONTEXT + self.new_tokens
        room = longest - (self.new_tokens if generates(model) else 0)
        own = replace(self, phase=phase, context=self.context or max(min(CONTEXT, room), 2))
        check_speed([model], *own._given)
        return own

    def seconds(self, models: Sequence[PreTrainedModel]) -> list[tuple[float, ...]]:
        """Measures models side by side: by model, the seconds of each round."""
        sizes, contexts, new_tokens, rounds, warmup, cache, phases = self._given
        rows = measure_speed(models, sizes, contexts, new_tokens, rounds, warmup, cache, phases)
        return [row.seconds for row in rows]

    @property
    def _given(self) -> tuple[list[int], list[int], int, int, int, CacheKind, list[Phase]]:
        phases: list[Phase] = [self.phase or "decode"]
        return [self.batch_size], [self.context or CONTEXT], self.new_tokens, self.rounds, 1, self.cache, phases

    def __str__(self) -> str:
        prompts = f"{'prompts' if self.batch_size > 1 else 'a prompt'} of {self.context or CONTEXT:,} tokens"
        at_once = f", {self.batch_size} at once" if self.batch_size > 1 else ""
        return f"{'reading' if self.phase == 'prefill' else 'writing a token after'} {prompts}{at_once}"


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


TRIES = 4
"""How often a limit is tried by the clock, and how often a model is searched for, each time within less or more."""
SLACK = 0.02
"""How much faster than asked a model may be, as a fraction of the dense model's time, before it is allowed more."""


def fast_enough(
    work: Work, most: float, clock: Clock, fitted: Sequence[Any], repair: RepairConfig | None, choosing: Choosing
) -> Found:
    """Searches for a model that takes no longer than is asked, timed before anything is cut.

    What places take together is not the sum of what they take alone. So the limit is first adjusted to how long the knapsack's
    choice takes, cut but not repaired; the search itself comes then, again within less if what it finds takes too long, or
    within more if that leaves some of the budget unused.

    Args:
        work: The model, measured, with its limit.
        most: The fraction of the dense model's time that it may take.
        clock: Measures models.
        fitted: Batches to repair on.
        repair: How it is repaired.
        choosing: Searches within a limit.

    Raises:
        ValueError: If none is fast enough.
    """
    asked, best = work.limit, None
    adjust(work, most, clock)
    low, high, too_slow = work.least, work.now, 1.0  # the most that was fast enough, and the least that was not, with its time
    for _ in range(TRIES):
        found = Found.within(work, fitted, repair, choosing)
        times = clock.times(found.planned.units, found.planned.blocks)
        if times.ratio <= most:
            best, low = replace(found, times=times), work.limit
        else:
            high, too_slow = work.limit, times.ratio
        if most - SLACK <= times.ratio <= most or high - low <= 1:
            break
        scaled = low if best is not None and too_slow < 1 else max(_scaled(work, times.ratio, most), work.least)
        work.limit = scaled if low < scaled < high or best is None else (low + high) // 2
    if best is None or best.times is None:
        raise ValueError(
            f"latency={most}: a model that should take {work.limit / work.now:.3f} of the dense model's time, by what places "
            f"take, was measured at {times.ratio:.3f}, {clock.workload}"
        )
    work.limit = asked
    return replace(best, times=replace(best.times, unused=unused(most, best.times.ratio, too_slow)))


def unused(most: float, ratio: float, too_slow: float) -> str:
    """Returns words for the share of a budget of time that is unused, and what the next larger model takes; empty if it is small.

    >>> unused(0.7, 0.6, 0.75), unused(0.7, 0.69, 0.75)
    ('0.10 of the budget is unused: the next larger model that was tried takes 0.750', '')
    """
    if most - ratio <= SLACK:
        return ""
    tried = "no larger model was tried" if too_slow >= 1 else f"the next larger model that was tried takes {too_slow:.3f}"
    return f"{most - ratio:.2f} of the budget is unused: {tried}"


def adjust(work: Work, most: float, clock: Clock) -> None:
    """Adjusts the limit of the work so that the knapsack's choice takes as long as is asked, or a little less."""
    low, high = work.least, work.now
    for _ in range(TRIES):
        planned = work.planned((), None, work.sum_chosen())
        ratio = clock.times(planned.units, planned.blocks).ratio
        if most - SLACK <= ratio <= most:
            return
        low, high = (low, work.limit) if ratio > most else (work.limit, high)
        scaled = _scaled(work, ratio, most)
        work.limit = scaled if low < scaled < high else (low + high) // 2
    work.limit = low


def _scaled(work: Work, ratio: float, most: float) -> int:
    """Returns the limit that would save what is asked, if as much of what it saves counts as did."""
    saved = (work.now - work.limit) * (1 - most + SLACK / 2) / max(1 - ratio, 1e-3)
    return work.now - round(saved)
