"""Makes a model smaller within one budget, where that loses least."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from billhook.arguments import annotated, whole
from billhook.calibration.calibration import Batches, batches_of
from billhook.importance.base import Importance
from billhook.importance.obs import OBS
from billhook.importance.score import run_of, score
from billhook.model.find import find_transformer
from billhook.model.plan import apply
from billhook.model.values import check_values
from billhook.pruning.amount import Amount
from billhook.pruning.cuts import find_cut
from billhook.pruning.plan import UnitPlan
from billhook.pruning.repair import repair as repair_weights
from billhook.pruning.target import Search
from billhook.repairs.repair import Repair
from billhook.running.batches import runs_of, source_of
from billhook.shrinking.choose import Frontier, Levels, between, cost, filled, loss, widest
from billhook.shrinking.damages import damages, groups, make_slots
from billhook.shrinking.divergence import Divergence
from billhook.shrinking.levels import Place, find_places, gone, removed
from billhook.shrinking.search import evolve
from billhook.shrinking.shrunk import Choice, Shrunk
from billhook.shrinking.variants import make_library

REPAIR = Repair()
CURVE = 9
"""How many sizes the curve shows."""
HELD_OUT = 0.2
"""Share of the batches of each source on which damage is measured, and on which nothing is fitted."""


def shrink(
    model: nn.Module,
    batches: Batches | None = None,
    *,
    params: int | float | None = None,
    kv_cache_bytes: int | float | None = None,
    bytes: int | float | None = None,  # noqa: A002 - the name of the target
    layers: Literal["uniform", "free"] = "uniform",
    importance: Importance | None = None,
    repair: Repair | None = REPAIR,
    first: int = 0,
    last: int = 0,
    round_to: int = 1,
    generations: int = 8,
    candidates: int = 8,
    seed: int = 0,
) -> Shrunk:
    """Removes feed-forward channels and KV heads within one budget, as many of each as loses least, in place, and repairs.

    Each place (a feed-forward, an attention) is cut to several levels and refitted, on its own; what a level costs the whole
    model is measured at two of them, as KL divergence from the dense model on batches that nothing is fitted to, and is in
    proportion to the error of the refitted linears in between. A knapsack then finds the levels that lose least, and evolution on
    the divergence itself refines them. What is chosen is cut as a whole and repaired from front to back. The parts are from
    ZipLM (Kurtic et al., 2023, https://arxiv.org/abs/2302.04089), MoDeGPT (Lin et al., 2024, https://arxiv.org/abs/2408.09632:
    how much each layer gives decides) and Týr-the-Pruner (Li et al., 2025, https://arxiv.org/abs/2503.09657).

    Args:
        model: A Hugging Face model with `logits`, or a module that holds one.
        batches: Inputs of the model's forward, as dictionaries; two of each source at least, three in all. A `Calibration` reads
            them; by default they are what the model itself writes.
        params: Budget: parameters that are left at most, a number (int) or a fraction of those that are there (float).
        kv_cache_bytes: Budget: bytes of the key/value cache per token; KV heads alone are removed for it.
        bytes: Budget: bytes of all parameters.
        layers: `"uniform"`: all feed-forwards keep as many channels and all attentions as many KV heads, which plain checkpoints
            can say; `"free"`: each place keeps its own number.
        importance: Which units go, at each level those of the lowest scores; by default `OBS()`.
        repair: How the linears that read removed units are refitted; None: not at all.
        first: Blocks at the beginning of each stack that stay whole.
        last: Blocks at the end of each stack that stay whole.
        round_to: The number of channels that remain is a multiple of it.
        generations: Rounds of evolution; 0 takes what the knapsack finds.
        candidates: Models that each round measures.
        seed: Decides what evolution tries.

    Returns:
        What was removed, what was expected and measured, and what other sizes would lose; `print` shows it.

    Raises:
        ValueError: If an argument is not legal, the budget cannot be reached (then with what can), there are too few batches, or
            the model predicts nothing; then nothing has changed.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> calibration = bh.Calibration(tokens=512, length=64)
        >>> shrunk = bh.shrink(model, calibration, params=0.8, generations=0)
        >>> sorted(set(shrunk.kept.values())), model.num_parameters() <= shrunk.limit
        ([(8, 7), (384, 247)], True)
    """
    annotated(shrink, locals())
    targets = {"params": params, "kv_cache_bytes": kv_cache_bytes, "bytes": bytes}
    asked = {name: value for name, value in targets.items() if value is not None}
    if len(asked) != 1:
        raise ValueError(f"{' and '.join(asked) or 'params=None'}: give one budget of {', '.join(targets)}")
    whole("generations", generations, 0)
    whole("candidates", candidates)
    amount = Amount(**asked, first=first, last=last, round_to=round_to)  # type: ignore[arg-type]
    subject = find_transformer(model)
    check_values(subject)
    work = _Work.begun(subject, amount, layers == "uniform")
    fitted, held_out = divided(list(batches_of(batches, subject)))
    work.measure(fitted, held_out, importance or OBS(), repair)
    return work.finished(fitted, repair, *work.chosen(generations, candidates, seed))


def divided(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Divides batches into those that are fitted to and those that damage is measured on, spread evenly over each source."""
    numbers: dict[str, list[int]] = {}
    for number, batch in enumerate(batches):
        numbers.setdefault(source_of(batch), []).append(number)
    if len(batches) < 3 or any(len(own) < 2 for own in numbers.values()):
        found = ", ".join(f"{len(own)}{f' of {source}' if source else ''}" for source, own in numbers.items())
        raise ValueError(f"batches: three at least, and two of each source, as some are held out; got {found or 'none'}")
    held_out = {own[place] for own in numbers.values() for place in Repair(held_out=HELD_OUT).chooses(len(own))}
    parts = [[batch for number, batch in enumerate(batches) if (number in held_out) == out] for out in (False, True)]
    return parts[0], parts[1]


@dataclass(eq=False)
class _Work:
    """One model on its way to a smaller one."""

    model: PreTrainedModel
    search: Search
    target: str
    limit: int
    uniform: bool
    places: list[Place]
    levels: dict[str, tuple[int, ...]]

    @classmethod
    def begun(cls, model: PreTrainedModel, amount: Amount, uniform: bool) -> "_Work":
        """Finds places and levels; refuses a budget that cannot be reached."""
        search, target = Search(model, amount), amount.target or ""
        limit = search.limit(target)
        places = find_places(search, target)
        now = int(getattr(search.now, target))
        least = now - sum((place.count - place.allowed[-1]) * place.each for place in places)
        if least > limit:
            asked = getattr(amount, target)
            raise ValueError(f"{target}={asked}: {limit:,} cannot be reached; with what may be removed, {least:,} to {now:,} can")
        levels = {place.name: place.levels() for place in places}
        work = cls(model, search, target, limit, uniform, places, levels)
        for number, kept in work._widths().items():
            for place in groups(places, uniform)[number]:
                levels[place.name] = tuple(sorted({*levels[place.name], *kept}, reverse=True))
        return work

    @property
    def within(self) -> int:
        """The most that all places together may cost: the limit without the rest of the model."""
        now = int(getattr(self.search.now, self.target))
        return self.limit - now + sum(place.count * place.each for place in self.places)

    def measure(self, fitted: Sequence[Any], held_out: Sequence[Any], importance: Importance, repair: Repair | None) -> None:
        """Scores the units, makes the variants, and measures what they cost the model."""
        self.divergence = Divergence(self.model, runs_of(self.model, held_out))
        units = self.search.units
        own = {name: units[name] for place in self.places for name in place.names}
        self.scores = score(self.model, own, importance, fitted, per="kv_head")
        runs = [run_of(self.model, own, batch) for batch in fitted]
        self.library = make_library(self.model, self.places, self.levels, units, self._gone, runs, repair)
        losses = {place.name: damages(self.library, self.divergence, place, self.levels[place.name]) for place in self.places}
        self.slots = make_slots(self.places, self.levels, losses, self.uniform)
        self.shared = make_slots(self.places, self.levels, losses, uniform=True)

    def chosen(self, generations: int, candidates: int, seed: int) -> tuple[dict[str, int], list[Choice], list[Choice]]:
        """Returns how many units places keep, the choices of other sizes, and what has been measured within the budget."""
        frontier = Frontier(self.slots)
        start = [levels for levels in (frontier.within(self.within), self._as_uniform()) if levels is not None]
        found = evolve(self.slots, start, self.within, self._measure, generations, candidates, seed)
        best = min(found, key=lambda levels: found[levels])
        if not generations:
            best = start[0]
        allowed = [group[0].allowed for group in groups(self.places, self.uniform)]
        kept = filled(self.slots, best, self.within, allowed)
        ranked = sorted(found, key=lambda levels: found[levels])
        curve = [self._choice(levels, self._measure(levels)) for levels in frontier.spread(CURVE)]
        return self._by_place(kept), curve, [self._choice(levels, found[levels]) for levels in ranked]

    def finished(
        self,
        fitted: Sequence[Any],
        repair: Repair | None,
        kept: Mapping[str, int],
        curve: Sequence[Choice],
        tried: Sequence[Choice],
    ) -> Shrunk:
        """Plans, repairs and carries out what was chosen, and measures it."""
        numbers = removed(self.places, self.search.units, self.scores, kept)
        cut = find_cut(self.model, self.search.structure, self.search.units, numbers)
        if (left := self.search.cost(cut, self.target)) > self.limit:
            raise ValueError(
                f"{self.target}: {left:,} would be left, more than {self.limit:,}, as units do not all cost the same"
            )
        plan = UnitPlan.of(cut, self.search.costs(cut))
        weights = repair_weights(self.model, plan, fitted, repair) if repair else None
        predicted = sum(between(slot, kept[slot.names[0]]) for slot in self.slots)
        counts = {name: (place.count, kept[place.name]) for place in self.places for name in place.names}
        apply(self.model, plan, weights=weights)
        after = self.divergence.by_source()
        return Shrunk(plan, self.target, self.limit, counts, predicted, after, tuple(curve), tuple(tried))

    def _gone(self, place: Place, kept: int) -> dict[str, list[int]]:
        return gone(place, self.search.units, self.scores, kept)

    def _widths(self) -> dict[int, set[int]]:
        """Finds further numbers to keep, where places of a kind keep as many, that just meet the budget."""
        if not self.uniform:
            return {}
        own = groups(self.places, self.uniform)
        kept, each = [self.levels[group[0].name] for group in own], [sum(place.each for place in group) for group in own]
        return widest(kept, each, self.within, [group[0].allowed for group in own])

    def _as_uniform(self) -> Levels | None:
        """Returns the best choice in which places of a kind keep as many, as levels of this search's slots."""
        found = Frontier(self.shared).within(self.within)
        if found is None:
            return None
        level = {name: one for slot, one in zip(self.shared, found, strict=True) for name in slot.names}
        return tuple(level[slot.names[0]] for slot in self.slots)

    def _measure(self, levels: Levels) -> float:
        kept = self._by_place([slot.kept[level] for slot, level in zip(self.slots, levels, strict=True)])
        with self.library.assembled(kept):
            return self.divergence.mean()

    def _choice(self, levels: Levels, measured: float) -> Choice:
        kept = self._by_place([slot.kept[level] for slot, level in zip(self.slots, levels, strict=True)])
        left = self.limit - self.within + cost(self.slots, levels)
        return Choice(kept, left, loss(self.slots, levels), measured)

    def _by_place(self, kept: Sequence[int]) -> dict[str, int]:
        return {name: own for slot, own in zip(self.slots, kept, strict=True) for name in slot.names}
