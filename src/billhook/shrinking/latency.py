"""Latency budget: a latency table of all levels, and a search for a fast enough model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import attrgetter
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
from billhook.shrinking.measurement import Measurement
from billhook.shrinking.modules import PrunableModule, cut_of, group_by
from billhook.shrinking.planning import plan
from billhook.shrinking.result import Times
from billhook.shrinking.scope import Progress, SearchScope
from billhook.shrinking.selection import SearchResult, Within, knapsack_solution

CONTEXT = 512


@dataclass(frozen=True)
class Workload:
    """The workload for timing; by default, decoding after a prompt of 512 tokens.

    Args:
        phase: `"decode"` (generating tokens) or `"prefill"` (processing prompts). Defaults to decode, or to prefill if the model
            does not generate.
        batch_size: Number of sequences.
        context: Number of tokens of each prompt. Defaults to 512, or to the longest that the model accepts.
        new_tokens: Number of generated tokens in each round.
        rounds: Number of interleaved measurements of each model; the median counts.
        cache: Kind of KV cache. See `Generation`.

    Raises:
        ValueError: If a number is out of range.

    >>> from billhook.shrinking.latency import Workload
    >>> print(Workload("prefill", batch_size=8, context=1024))
    prefill of 8 prompts of 1,024 tokens
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
        """Fills in the defaults for a model, and checks that it supports the workload."""
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
        prompts = f"{self.batch_size} prompts" if self.batch_size > 1 else "a prompt"
        prompts = f"{prompts} of {self.context or CONTEXT:,} tokens"
        return f"prefill of {prompts}" if self.phase == "prefill" else f"decoding after {prompts}"


Seconds = Callable[[Sequence[PreTrainedModel]], Sequence[Sequence[float]]]
"""Measures models side by side, in interleaved rounds: by model, the seconds of each round."""


@dataclass(frozen=True, eq=False)
class Clock:
    """Times a model against its pruned copy; the model stays unchanged.

    Args:
        model: The model.
        seconds: Measures models.
        workload: Description of the workload.
    """

    model: PreTrainedModel
    seconds: Seconds
    workload: str

    def times(self, cut: Cut, blocks: BlockPlan | None = None) -> Times:
        """Measures the model before and after a removal, as copies that share unchanged weights."""
        with evaluating_without_grad(self.model):
            dense, smaller = copy_sharing_parameters(self.model), copy_sharing_parameters(self.model)
            remove(smaller, cut)
            if blocks is not None:
                remove_blocks(smaller, blocks)
            before, after = self.seconds([dense, smaller])
        ratios = [later / first for first, later in zip(before, after, strict=True)]
        return Times(median(before), median(after), median(ratios), self.workload)


def make_clock(model: PreTrainedModel, workload: Workload | None) -> Clock:
    """Returns a clock that measures like `billhook bench`.

    Raises a ValueError for an unsupported workload.
    """
    try:
        with evaluating_without_grad(model):
            decided = (workload or Workload()).of(model)
    except ValueError as error:
        raise ValueError(f"latency: {error}") from error
    return Clock(model, decided.seconds, str(decided))


def with_latency(scope: SearchScope, most: float, clock: Clock, progress: Progress) -> SearchScope:
    """Returns the scope of a latency budget, with the measured cost of each level.

    Args:
        scope: Scope of a budget that every smaller model meets.
        most: Largest allowed fraction of the dense model's time.
        clock: Measures each level of modules of one shape.
        progress: Progress of the search.

    Raises:
        ValueError: If the budget is out of reach.
    """
    # modules that take equally long at each level are timed together
    shape = attrgetter("kind", "count", "allowed", "unit_cost")
    groups = group_by(scope.modules, lambda module: (shape(module), len(module.names)))
    progress.steps += sum(len(group[0].grid()) - 1 for group in groups)
    measured, dense = list[list[float]](), list[float]()
    for group in groups:
        measured.append([])
        for kept in group[0].grid()[1:]:
            removed = dict[str, list[int]]()
            for module in group:
                removed |= dict.fromkeys(module.names, list(range(kept, module.count)))
            times = clock.times(cut_of(scope.search, removed))
            measured[-1].append(times.ratio)
            dense.append(times.dense)
            progress.advance()
    now = round(1e9 * median(dense))
    priced = {}
    for group, ratios in zip(groups, measured, strict=True):
        for module in group:
            priced[module.name] = _priced(module, ratios, now / len(group))
    modules = [priced[module.name] for module in scope.modules]
    blocks = scope.blocks.with_cost(_block_time(scope, clock, now, progress), modules)
    budget = replace(scope, target="latency", now=now, limit=int(most * now), modules=modules, blocks=blocks)
    return budget.with_levels(most)


def _block_time(scope: SearchScope, clock: Clock, now: int, progress: Progress) -> int:
    """Returns the time of a removable block, measured without the last half of them."""
    blocks = scope.blocks
    half = blocks.removable[len(blocks.removable) // 2 :]
    if not half:
        return 0
    if blocks.refusal(half):
        half = half[-1:]
    progress.advance()
    times = clock.times(cut_of(scope.search, {}), blocks.planned(scope.model, half))
    return round((1 - times.ratio) * now / len(half))


def _priced(module: PrunableModule, ratios: Sequence[float], share: float) -> PrunableModule:
    """Sets the cost of each level of a module, relative to the lowest level, in nanoseconds.

    Args:
        module: The module.
        ratios: By level, the time of a model whose modules of this shape are all pruned, relative to the dense model.
        share: Time of the dense model divided by the number of these modules.
    """
    falling = make_decreasing([1.0, *ratios])
    costs = [round((ratio - falling[-1]) * share) for ratio in falling]
    return replace(module, times=tuple(zip(module.grid(), costs, strict=True))[::-1])


def make_decreasing(values: Sequence[float]) -> list[float]:
    """Makes values decrease: the mean of the least value so far and the largest that follows.

    >>> make_decreasing([1.0, 0.75, 0.875, 0.5])
    [1.0, 0.8125, 0.8125, 0.5]
    """
    least = accumulate(values, min)
    most = list(accumulate(reversed(values), max))[::-1]
    return [(low + high) / 2 for low, high in zip(least, most, strict=True)]


TRIES = 4
"""Maximum number of adjustments of a limit, and of searches with a tighter or looser limit."""
SLACK = 0.02
"""Unused part of a latency budget, as a fraction of the dense time, that triggers a looser limit."""


def fast_enough(measurement: Measurement, most: float, clock: Clock, within: Within) -> SearchResult:
    """Searches for a model within a latency budget, timed before anything is removed.

    The latency of a model is not the sum of its modules' latencies. The limit is first adjusted to the measured time of the
    knapsack solution, pruned but not repaired. The search follows. It is repeated with a tighter limit if its result is too
    slow, or with a looser one if much of the budget is unused.

    Args:
        measurement: Losses of the variants.
        most: Largest allowed fraction of the dense model's time.
        clock: Measures models.
        within: Searches within a limit.

    Raises:
        ValueError: If no model is fast enough.
    """
    scope, best = measurement.scope, None
    limit = adjusted_limit(measurement, most, clock)
    # the most that was fast enough, and the least that was not, with its time
    low, high, too_slow = scope.least, scope.now, 1.0
    for _ in range(TRIES):
        chosen = within(limit)
        times = clock.times(chosen.planned.units, chosen.planned.blocks)
        if times.ratio <= most:
            best, low = replace(chosen, times=times), limit
        else:
            high, too_slow = limit, times.ratio
        if most - SLACK <= times.ratio <= most or high - low <= 1:
            break
        scaled = low if best is not None and too_slow < 1 else max(_scaled(scope.now, limit, times.ratio, most), scope.least)
        limit = scaled if low < scaled < high or best is None else (low + high) // 2
    if best is None or best.times is None:
        raise ValueError(
            f"latency={most} is out of reach: a model estimated at {limit / scope.now:.3f} of the dense model's time took "
            f"{times.ratio:.3f} ({clock.workload}). Raise latency."
        )
    left_over = unused_budget(most, best.times.ratio, too_slow)
    return replace(best, limit=scope.limit, times=replace(best.times, unused=left_over))


def unused_budget(most: float, ratio: float, too_slow: float) -> str:
    """Returns a note on the unused part of a latency budget; empty if it is small.

    >>> unused_budget(0.7, 0.6, 0.75), unused_budget(0.7, 0.69, 0.75)
    ('0.10 of the budget is unused: the next larger candidate takes 0.750', '')
    """
    if most - ratio <= SLACK:
        return ""
    tried = "no larger candidate was tried" if too_slow >= 1 else f"the next larger candidate takes {too_slow:.3f}"
    return f"{most - ratio:.2f} of the budget is unused: {tried}"


def adjusted_limit(measurement: Measurement, most: float, clock: Clock) -> int:
    """Returns the limit at which the knapsack solution just meets the latency budget."""
    scope = measurement.scope
    low, high, limit = scope.least, scope.now, scope.limit
    for _ in range(TRIES):
        planned = plan(measurement, limit, knapsack_solution(measurement, limit), (), None)
        ratio = clock.times(planned.units, planned.blocks).ratio
        if most - SLACK <= ratio <= most:
            return limit
        low, high = (low, limit) if ratio > most else (limit, high)
        scaled = _scaled(scope.now, limit, ratio, most)
        limit = scaled if low < scaled < high else (low + high) // 2
    return low


def _scaled(now: int, limit: int, ratio: float, most: float) -> int:
    """Returns the limit at which proportional savings would meet the budget."""
    return now - round((now - limit) * (1 - most + SLACK / 2) / max(1 - ratio, 1e-3))
