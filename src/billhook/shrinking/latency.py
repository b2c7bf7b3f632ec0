"""A budget of time: what each layer costs by the clock, and a model that is fast enough by it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import median

from transformers import PreTrainedModel

from billhook.arguments import check_int, check_types
from billhook.engine.state import evaluating_without_grad
from billhook.model.config_fields import text_config
from billhook.model.meta import copy_sharing_parameters
from billhook.pruning.block_plan import BlockPlan, remove_blocks
from billhook.pruning.cut import Cut
from billhook.pruning.removal import remove
from billhook.report.generation import CacheKind, generates
from billhook.report.speed import Phase, check_speed, measure_speed
from billhook.shrinking.candidates import Candidates, Progress
from billhook.shrinking.choice import Chosen, Within, choose_by_sums
from billhook.shrinking.layers import Layer, cut_of, grouped
from billhook.shrinking.measurement import Measured
from billhook.shrinking.planned import plan
from billhook.shrinking.shrunk import Times

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
        check_types(Workload, vars(self))
        for name, least in {"batch_size": 1, "context": 2, "new_tokens": 1, "rounds": 1}.items():
            check_int(name, least if (value := getattr(self, name)) is None else value, least)

    def of(self, model: PreTrainedModel) -> "Workload":
        """Decides what is left open, for one model; refuses a model that cannot do it."""
        phase: Phase = self.phase or ("decode" if generates(model) else "prefill")
        longest = getattr(text_config(model.config), "max_position_embeddings", None) or CONTEXT + self.new_tokens
        prompt = longest - (self.new_tokens if generates(model) else 0)
        workload = replace(self, phase=phase, context=self.context or max(min(CONTEXT, prompt), 2))
        check_speed([model], *workload._settings)
        return workload

    def seconds(self, models: Sequence[PreTrainedModel]) -> list[tuple[float, ...]]:
        """Measures models side by side: by model, the seconds of each round."""
        return [row.seconds for row in measure_speed(models, *self._settings)]

    @property
    def _settings(self) -> tuple[list[int], list[int], int, int, int, CacheKind, list[Phase]]:
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
        with evaluating_without_grad(self.model):
            dense, smaller = copy_sharing_parameters(self.model), copy_sharing_parameters(self.model)
            remove(smaller, cut)
            if blocks is not None:
                remove_blocks(smaller, blocks)
            before, after = self.seconds([dense, smaller])
        ratios = [later / first for first, later in zip(before, after, strict=True)]
        return Times(median(before), median(after), median(ratios), self.workload)


def clock_of(model: PreTrainedModel, workload: Workload | None) -> Clock:
    """Returns a clock that times a model doing what is asked, as `billhook bench` measures; refuses a model that cannot do it."""
    try:
        with evaluating_without_grad(model):
            decided = (workload or Workload()).of(model)
    except ValueError as error:
        raise ValueError(f"latency: {error}") from error
    return Clock(model, decided.seconds, str(decided))


def timed(candidates: Candidates, most: float, clock: Clock, progress: Progress) -> Candidates:
    """Returns the candidates within a budget of time, a fraction of the dense model's, with what layers cost by the clock.

    Args:
        candidates: Those of a budget that any smaller model meets.
        most: The fraction.
        clock: Measures each config of layers of one shape.
        progress: Says how far it is.

    Raises:
        ValueError: If the budget cannot be reached.
    """
    # layers that take as long in each config are timed together
    groups = grouped(candidates.layers, lambda layer: (layer.kind, layer.count, layer.allowed, layer.each, len(layer.names)))
    progress.steps += sum(len(group[0].grid()) - 1 for group in groups)
    measured = list[list[Times]]()
    for group in groups:
        measured.append([])
        for kept in group[0].grid()[1:]:
            removed = {name: list(range(kept, layer.count)) for layer in group for name in layer.names}
            measured[-1].append(clock.times(cut_of(candidates.search, removed)))
            progress.advance()
    now = round(1e9 * median(times.dense for of_group in measured for times in of_group))
    priced = dict[str, Layer]()
    for group, of_group in zip(groups, measured, strict=True):
        ratios = [times.ratio for times in of_group]
        priced |= {layer.name: _priced(layer, ratios, now / len(group)) for layer in group}
    layers = [priced[layer.name] for layer in candidates.layers]
    blocks = candidates.blocks.priced(_block_time(candidates, clock, now, progress), layers)
    budget = replace(candidates, target="latency", now=now, limit=int(most * now), layers=layers, blocks=blocks)
    return budget.with_configs(most)


def _block_time(candidates: Candidates, clock: Clock, now: int, progress: Progress) -> int:
    """Measures what one of the blocks that may go takes: without the latter half of them, or the last where half cannot go."""
    blocks = candidates.blocks
    half = blocks.able[len(blocks.able) // 2 :]
    if not half:
        return 0
    if blocks.refusal(half):
        half = half[-1:]
    progress.advance()
    times = clock.times(cut_of(candidates.search, {}), blocks.planned(candidates.model, half))
    return round((1 - times.ratio) * now / len(half))


def _priced(layer: Layer, ratios: Sequence[float], share: float) -> Layer:
    """Gives a layer what it costs at each config, above the smallest: nanoseconds.

    Args:
        layer: The layer.
        ratios: By config, the time of a model whose layers of this shape are all cut, against the dense model's.
        share: The time of the dense model over the number of these layers.
    """
    falling = made_falling([1.0, *ratios])
    costs = [round((ratio - falling[-1]) * share) for ratio in falling]
    return replace(layer, times=tuple(zip(layer.grid(), costs, strict=True))[::-1])


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


def fast_enough(measured: Measured, most: float, clock: Clock, within: Within) -> Chosen:
    """Searches for a model that takes no longer than is asked, timed before anything is cut.

    What layers take together is not the sum of what they take alone. So the limit is first adjusted to how long the knapsack's
    choice takes, cut but not repaired; the search itself comes then, again within less if what it finds takes too long, or
    within more if that leaves some of the budget unused.

    Args:
        measured: What candidates lose.
        most: The fraction of the dense model's time that it may take.
        clock: Measures models.
        within: Searches within a limit.

    Raises:
        ValueError: If none is fast enough.
    """
    candidates, best = measured.candidates, None
    limit = adjusted(measured, most, clock)
    # the most that was fast enough, and the least that was not, with its time
    low, high, too_slow = candidates.least, candidates.now, 1.0
    for _ in range(TRIES):
        chosen = within(limit)
        times = clock.times(chosen.planned.units, chosen.planned.blocks)
        if times.ratio <= most:
            best, low = replace(chosen, times=times), limit
        else:
            high, too_slow = limit, times.ratio
        if most - SLACK <= times.ratio <= most or high - low <= 1:
            break
        scaled = (
            low if best is not None and too_slow < 1 else max(_scaled(candidates.now, limit, times.ratio, most), candidates.least)
        )
        limit = scaled if low < scaled < high or best is None else (low + high) // 2
    if best is None or best.times is None:
        raise ValueError(
            f"latency={most}: a model that should take {limit / candidates.now:.3f} of the dense model's time, by what layers "
            f"take, was measured at {times.ratio:.3f}, {clock.workload}"
        )
    left_over = unused(most, best.times.ratio, too_slow)
    return replace(best, limit=candidates.limit, times=replace(best.times, unused=left_over))


def unused(most: float, ratio: float, too_slow: float) -> str:
    """Returns words for the share of a budget of time that is unused, and what the next larger model takes; empty if it is small.

    >>> unused(0.7, 0.6, 0.75), unused(0.7, 0.69, 0.75)
    ('0.10 of the budget is unused: the next larger model that was tried takes 0.750', '')
    """
    if most - ratio <= SLACK:
        return ""
    tried = "no larger model was tried" if too_slow >= 1 else f"the next larger model that was tried takes {too_slow:.3f}"
    return f"{most - ratio:.2f} of the budget is unused: {tried}"


def adjusted(measured: Measured, most: float, clock: Clock) -> int:
    """Returns the limit at which the knapsack's choice takes as long as is asked, or a little less."""
    candidates = measured.candidates
    low, high, limit = candidates.least, candidates.now, candidates.limit
    for _ in range(TRIES):
        planned = plan(measured, limit, choose_by_sums(measured, limit), (), None)
        ratio = clock.times(planned.units, planned.blocks).ratio
        if most - SLACK <= ratio <= most:
            return limit
        low, high = (low, limit) if ratio > most else (limit, high)
        scaled = _scaled(candidates.now, limit, ratio, most)
        limit = scaled if low < scaled < high else (low + high) // 2
    return low


def _scaled(now: int, limit: int, ratio: float, most: float) -> int:
    """Returns the limit that would save what is asked, if as much of what it saves counts as did."""
    return now - round((now - limit) * (1 - most + SLACK / 2) / max(1 - ratio, 1e-3))
