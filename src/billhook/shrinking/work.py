"""Leads a model through the steps of a search: levels, variants, damage, choice, and the cut and repair of what is chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from billhook.importance.base import Importance
from billhook.importance.score import run_of, score
from billhook.model.figures import figures_of
from billhook.model.linears import matrix_of
from billhook.model.plan import Weights
from billhook.pruning.amount import TARGETS, Amount
from billhook.pruning.cuts import find_cut
from billhook.pruning.plan import UnitPlan
from billhook.pruning.repair import repair as repair_weights
from billhook.pruning.target import Search
from billhook.repairs.repair import Repair
from billhook.running.batches import runs_of
from billhook.shrinking.alone import CALLED, fewer_blocks, of_one_kind
from billhook.shrinking.choose import Frontier, Levels, between, cost, filled, loss, widest
from billhook.shrinking.damages import damages, groups, make_slots
from billhook.shrinking.divergence import Divergence
from billhook.shrinking.levels import Place, find_places, gone, removed
from billhook.shrinking.library import Library, key_of
from billhook.shrinking.search import evolve
from billhook.shrinking.shrunk import UNITS, Choice, Shrunk, Times
from billhook.shrinking.variants import fill_library

CURVE = 9
"""How many sizes the curve shows."""


@dataclass(eq=False)
class Work:
    """A model on its way to a smaller one: `begun`, `measure`, `chosen`, `planned`, and `finished` once it has been cut.

    Attributes:
        model: The model.
        search: Its units, and what it costs.
        target: What the budget limits.
        now: What there is of it now.
        limit: The most that may be left of it.
        uniform: Whether all places of one kind and size keep as many units.
        places: The places that may keep less.
        levels: By place, how many units it keeps at each level.
        progress: Called with how many steps are done, and of how many at most.
        steps: How many there are at most.
        done: How many are done.
        known: What has been measured, by the levels of all slots.
        alone: By the name of a kind of unit, what is left of the target, and lost, without units of this kind alone.
    """

    model: PreTrainedModel
    search: Search
    target: str
    now: int
    limit: int
    uniform: bool
    places: list[Place]
    levels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    progress: Callable[[int, int], None] | None = None
    steps: int = 0
    done: int = 0
    known: dict[Levels, float] = field(default_factory=dict)
    alone: dict[str, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def begun(cls, model: PreTrainedModel, amount: Amount, uniform: bool) -> "Work":
        """Finds places and levels; refuses a budget that cannot be reached."""
        search, target = Search(model, amount), amount.target or ""
        limit = search.limit(target)
        now = int(getattr(search.now, target))
        work = cls(model, search, target, now, limit, uniform, find_places(search, target))
        work.divide(getattr(amount, target))
        return work

    def divide(self, asked: float) -> None:
        """Divides places into levels; refuses a budget that none of them reach."""
        self.levels = {place.name: place.levels() for place in self.places}
        if self.least > self.limit:
            limit = f"{self.limit:,} {UNITS.get(self.target, '')}".strip()
            raise ValueError(
                f"{self.target}={asked}: {limit} cannot be reached; with what may be removed, {self.least:,} to {self.now:,} can"
            )
        for number, kept in self._widths().items():
            for place in groups(self.places, self.uniform)[number]:
                self.levels[place.name] = tuple(sorted({*self.levels[place.name], *kept}, reverse=True))

    @property
    def least(self) -> int:
        """The least that can be left: with all places at their last level."""
        return self.now - sum(place.saves(self.levels[place.name][-1]) for place in self.places)

    @property
    def within(self) -> int:
        """The most that all places together may cost: the limit without the rest of the model."""
        return self.limit - self.now + sum(place.cost(place.count) for place in self.places)

    @property
    def widest(self) -> int:
        """How many inputs the widest linear has that reads units of a place."""
        readers = {reader for place in self.places for name in place.names for reader in self.search.units[name].readers}
        return max(matrix_of(self.model.get_submodule(reader))[0].shape[1] for reader in readers)

    def measure(
        self,
        fitted: Sequence[Any],
        held_out: Sequence[Any],
        importance: Importance,
        repair: Repair | None,
        folder: Path | None = None,
    ) -> None:
        """Scores units, makes the variants, in a folder or in memory, and measures what they cost the model."""
        self.divergence = Divergence(self.model, runs_of(self.model, held_out))
        units = self.search.units
        own = {name: units[name] for place in self.places for name in place.names}
        self.scores = score(self.model, own, importance, fitted, per="kv_head")
        runs = [run_of(self.model, own, batch) for batch in fitted]
        key = folder and key_of(self.model, [str(repair), self.search.amount.round_to], self.scores, [*fitted, *held_out])
        self.library = Library(self.model, folder / key if folder and key else None)
        fill_library(self.library, self.places, self.levels, units, self._gone, runs, repair, self.advance)
        losses = {place.name: self._damages(place) for place in self.places}
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
        kept = filled(self.slots, best, self.within, self._costs())
        self.steps = self.done + CURVE
        ranked = sorted(found, key=lambda levels: found[levels])
        curve = [self._choice(levels, self._measure(levels)) for levels in frontier.spread(CURVE)]
        return self._by_place(kept), curve, [self._choice(levels, found[levels]) for levels in ranked]

    def sum_chosen(self) -> dict[str, int]:
        """Returns how many units places keep by what they lose alone, added up; as few as may be where none fits."""
        levels = Frontier(self.slots).within(self.within) or tuple(len(slot.kept) - 1 for slot in self.slots)
        return self._by_place(filled(self.slots, levels, self.within, self._costs()))

    def compare(self, fitted: Sequence[Any]) -> None:
        """Measures what would be lost within the budget without channels alone, KV heads alone, or whole blocks."""
        kinds = {place.name: place.kind for place in self.places}
        for kind, levels in of_one_kind(self.slots, [kinds[slot.names[0]] for slot in self.slots], self.within).items():
            one = self._choice(levels, self._measure(levels))
            self.alone[CALLED[kind]] = (one.left, one.measured)
        ends = self.search.amount.first, self.search.amount.last
        if self.target == "params" and (found := fewer_blocks(self.model, fitted, self.divergence, self.now - self.limit, ends)):
            self.alone[CALLED["block"]] = (self.now - found[0], found[1])

    def planned(self, fitted: Sequence[Any], repair: Repair | None, kept: Mapping[str, int]) -> tuple[UnitPlan, Weights | None]:
        """Plans what was chosen, and repairs it from front to back; the model stays as it is."""
        numbers = removed(self.places, self.search.units, self.scores, kept)
        cut = find_cut(self.model, self.search.structure, self.search.units, numbers)
        if self.target in TARGETS and (left := self.search.cost(cut, self.target)) > self.limit:
            raise ValueError(
                f"{self.target}: {left:,} would be left, more than {self.limit:,}, as units do not all cost the same"
            )
        plan = UnitPlan.of(cut, self.search.costs(cut))
        return plan, repair_weights(self.model, plan, fitted, repair) if repair else None

    def finished(
        self,
        plan: UnitPlan,
        kept: Mapping[str, int],
        curve: Sequence[Choice],
        tried: Sequence[Choice],
        ratio: float | None = None,
        times: Times | None = None,
    ) -> Shrunk:
        """Measures the model once the plan of what was chosen has been carried out."""
        predicted = sum(between(slot, kept[slot.names[0]]) for slot in self.slots)
        counts = {name: (place.count, kept[place.name]) for place in self.places for name in place.names}
        left = round(1e9 * times.smaller) if times else int(getattr(figures_of(self.model), self.target))
        after, found = self.divergence.by_source(), (tuple(curve), tuple(tried), dict(self.alone), ratio, times)
        return Shrunk(plan, self.target, self.limit, left, counts, predicted, after, *found)

    def _gone(self, place: Place, kept: int) -> dict[str, list[int]]:
        return gone(place, self.search.units, self.scores, kept)

    def _widths(self) -> dict[int, set[int]]:
        """Finds further numbers to keep, where places of a kind keep as many, that just meet the budget."""
        if not self.uniform:
            return {}
        kept = [self.levels[group[0].name] for group in groups(self.places, self.uniform)]
        return widest(kept, self._costs(), self.within)

    def _costs(self) -> list[dict[int, int]]:
        """Returns by slot, and by all numbers of units that its places may keep, what they cost."""
        own = groups(self.places, self.uniform)
        return [{kept: sum(place.cost(kept) for place in group) for kept in group[0].allowed} for group in own]

    def _as_uniform(self) -> Levels | None:
        """Returns the best choice in which places of a kind keep as many, as levels of this search's slots."""
        found = Frontier(self.shared).within(self.within)
        if found is None:
            return None
        level = {name: one for slot, one in zip(self.shared, found, strict=True) for name in slot.names}
        return tuple(level[slot.names[0]] for slot in self.slots)

    def _damages(self, place: Place) -> list[float]:
        self.advance()
        return damages(self.library, self.divergence, place, self.levels[place.name])

    def advance(self) -> None:
        """Counts a step as done."""
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.steps), self.steps)

    def _measure(self, levels: Levels) -> float:
        self.advance()
        if levels not in self.known:
            with self.library.assembled(self.kept_at(levels)):
                self.known[levels] = self.divergence.mean()
        return self.known[levels]

    def kept_at(self, levels: Levels) -> dict[str, int]:
        """Returns how many units each place keeps at levels of the slots."""
        return self._by_place([slot.kept[level] for slot, level in zip(self.slots, levels, strict=True)])

    def _choice(self, levels: Levels, measured: float) -> Choice:
        kept = self.kept_at(levels)
        left = self.limit - self.within + cost(self.slots, levels)
        return Choice(kept, left, loss(self.slots, levels), measured)

    def _by_place(self, kept: Sequence[int]) -> dict[str, int]:
        return {name: own for slot, own in zip(self.slots, kept, strict=True) for name in slot.names}
