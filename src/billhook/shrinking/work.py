"""Leads a model through the steps of a search: levels, variants, damage, choice, and the cut and repair of what is chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from billhook.importance.base import Importance
from billhook.importance.score import run_of, score
from billhook.model.figures import figures_of
from billhook.model.linears import matrix_of
from billhook.pruning.amount import Amount
from billhook.pruning.target import Search
from billhook.repairs.repair import Repair
from billhook.running.batches import runs_of
from billhook.shrinking.alone import CALLED, fewer_blocks, of_one_kind
from billhook.shrinking.choose import Frontier, Slot, between, cost, filled, kept_at, widest
from billhook.shrinking.damages import damage_without, damages, groups, make_slots
from billhook.shrinking.divergence import Divergence
from billhook.shrinking.levels import Place, find_places, gone, removed
from billhook.shrinking.library import Library, key_of
from billhook.shrinking.search import evolve
from billhook.shrinking.shrunk import UNITS, Choice, Shrunk, Times
from billhook.shrinking.spaces.blocks import Block, Blocks, find_blocks
from billhook.shrinking.spaces.planned import Planned, plan_choice, repaired
from billhook.shrinking.spaces.space import SEVERAL, Point, Space, best_point, free_space, moved, spread, starts, uniform_spaces
from billhook.shrinking.variants import fill_library

CURVE = 9
"""How many sizes the curve shows."""
WIDTHS = (0, 1, 2, 4)
"""For how many blocks that go there are levels that just meet the budget, where layers stay alike."""


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
        blocks: The whole blocks that may go.
        progress: Called with how many steps are done, and of how many at most.
        steps: How many there are at most.
        done: How many are done.
        known: What has been measured, by how many units are kept.
        alone: By the name of a kind of unit, what is left of the target, and lost, without units of this kind alone.
    """

    model: PreTrainedModel
    search: Search
    target: str
    now: int
    limit: int
    uniform: bool
    places: list[Place]
    blocks: Blocks
    levels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    progress: Callable[[int, int], None] | None = None
    steps: int = 0
    done: int = 0
    known: dict[frozenset[tuple[str, int]], float] = field(default_factory=dict)
    alone: dict[str, tuple[int, float]] = field(default_factory=dict)

    @classmethod
    def begun(cls, model: PreTrainedModel, amount: Amount, uniform: bool) -> "Work":
        """Finds places, levels and blocks; refuses a budget that cannot be reached."""
        search, target = Search(model, amount), amount.target or ""
        limit = search.limit(target)
        now = int(getattr(search.now, target))
        places = find_places(search, target)
        work = cls(model, search, target, now, limit, uniform, places, find_blocks(search, target, places))
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
        for name, kept in self._widths().items():
            self.levels[name] = tuple(sorted({*self.levels[name], *kept}, reverse=True))

    @property
    def least(self) -> int:
        """The least that may be left: without all blocks that may go, and all other places at their lowest levels."""
        saved = {place.name: place.saves(self.levels[place.name][-1]) for place in self.places}
        more = (max(block.cost - sum(saved[name] for name in block.places), 0) for block in self.blocks.able)
        return self.now - sum(saved.values()) - sum(more)

    def most_steps(self, generations: int, candidates: int) -> int:
        """Returns how many steps a search has at most."""
        return 2 * len(self.places) + len(self.blocks.able) + len(SEVERAL) + 2 + generations * candidates + CURVE

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
        self.library = Library(self.model, folder / key if folder and key else None, self.blocks.writers)
        fill_library(self.library, self.places, self.levels, units, self._gone, runs, repair, self.advance)
        self.losses = {place.name: self._damages(place) for place in self.places}
        self.losses |= {block.name: [0.0, self._damage_without(block)] for block in self.blocks.able}
        make = uniform_spaces if self.uniform else free_space
        self.spaces: list[Space] = make(self.places, self.levels, self.losses, self.blocks.able, self.now)

    def chosen(self, generations: int, candidates: int, seed: int) -> tuple[dict[str, int], list[Choice], list[Choice]]:
        """Returns how many units places keep, the choices of other sizes, and what has been measured within the budget."""
        ranked = sorted(self.blocks.able, key=lambda block: self.losses[block.name][-1])
        start = [*starts(self.spaces, self.limit, ranked), *self._as_uniform()]
        found = evolve(start, partial(moved, self.spaces, self.limit), self._measure, generations, candidates, seed)
        order = sorted(found, key=lambda point: found[point])
        kept = self._filled(self._first_possible(order))
        self.steps = self.done + CURVE
        curve = [self._choice(point, self._measure(point)) for point in spread(self.spaces, CURVE)]
        return kept, curve, [self._choice(point, found[point]) for point in order]

    def sum_chosen(self) -> dict[str, int]:
        """Returns how many units places keep by what they lose alone, added up; as few as may be where none fits."""
        point = best_point(self.spaces, self.limit) or best_point(self.spaces, self.least)
        assert point is not None
        return self._filled(point)

    def compare(self, fitted: Sequence[Any]) -> None:
        """Measures what would be lost within the budget without channels alone, KV heads alone, or whole blocks."""
        kinds, slots = {place.name: place.kind for place in self.places}, self._slots(self.places)
        whole = cost(slots, (0,) * len(slots))
        for kind, levels in of_one_kind(slots, [kinds[slot.names[0]] for slot in slots], self.limit - self.now + whole).items():
            kept = kept_at(slots, levels)
            self.alone[CALLED[kind]] = (self.now - whole + cost(slots, levels), self._measured(kept))
        ends = self.search.amount.first, self.search.amount.last
        if self.target == "params" and (found := fewer_blocks(self.model, fitted, self.divergence, self.now - self.limit, ends)):
            self.alone[CALLED["block"]] = (self.now - found[0], found[1])

    def planned(self, fitted: Sequence[Any], repair: Repair | None, kept: Mapping[str, int]) -> Planned:
        """Plans what was chosen, and repairs it from front to back; the model stays as it is."""
        blocks, cut = self.blocks.gone(kept), dict(kept)
        for group in groups(self.places, self.uniform):  # what goes with its block has no number, or one with those that stay
            number = max(kept[place.name] for place in group) or group[0].count
            cut |= {place.name: number for place in group if not kept[place.name]}
        numbers = removed(self.places, self.search.units, self.scores, cut)
        made = plan_choice(self.search, self.target, self.limit, numbers, self.blocks, blocks)
        return repaired(made, self.blocks, blocks, fitted, repair)

    def finished(
        self,
        planned: Planned,
        kept: Mapping[str, int],
        curve: Sequence[Choice],
        tried: Sequence[Choice],
        ratio: float | None = None,
        times: Times | None = None,
    ) -> Shrunk:
        """Measures the model once the plans of what was chosen have been carried out."""
        predicted = sum(between(slot, kept[slot.names[0]]) for slot in self._slots(self._present(kept)))
        predicted += sum(self.losses[block.name][-1] for block in self.blocks.gone(kept))
        counts = {name: (place.count, kept[place.name]) for place in self.places for name in place.names}
        left = round(times.ratio * self.now) if times else int(getattr(figures_of(self.model), self.target))
        found = tuple(curve), tuple(tried), dict(self.alone), ratio, times, planned.blocks, self.blocks.why
        return Shrunk(planned.units, self.target, self.limit, left, counts, predicted, self.divergence.by_source(), *found)

    def _first_possible(self, points: Sequence[Point]) -> Point:
        """Returns the first choice whose blocks can go together; refuses them if there is none."""
        why = ""
        for number, levels in points:
            gone = self.blocks.gone(self.spaces[number].kept(levels))
            if not gone or not (why := self.blocks.refusal(gone)):
                return number, levels
        raise ValueError(why)

    def _filled(self, point: Point) -> dict[str, int]:
        """Lets places keep more, between levels too, as far as the budget goes."""
        space, levels = self.spaces[point[0]], point[1]
        kept, spare = space.kept(levels), self.limit - space.left(levels)
        present = self._present(kept)
        slots = self._slots(present)
        own = tuple(slot.kept.index(kept[slot.names[0]]) for slot in slots)
        more = filled(slots, own, cost(slots, own) + max(spare, 0), self._costs(present))
        return kept | {name: number for slot, number in zip(slots, more, strict=True) for name in slot.names}

    def _present(self, kept: Mapping[str, int]) -> list[Place]:
        """Returns the places that do not go with their block."""
        return [place for place in self.places if kept[place.name]]

    def _slots(self, places: Sequence[Place]) -> list[Slot]:
        return make_slots(places, self.levels, self.losses, self.uniform)

    def _gone(self, place: Place, kept: int) -> dict[str, list[int]]:
        return gone(place, self.search.units, self.scores, kept)

    def _widths(self) -> dict[str, set[int]]:
        """Finds further numbers to keep, where places of a kind keep as many, that just meet the budget.

        That is for several numbers of blocks that go, as if all were alike.
        """
        found: dict[str, set[int]] = {}
        for count in (one for one in WIDTHS if self.uniform and one <= len(self.blocks.able)):
            gone = self.blocks.able[:count]
            inside = {name for block in gone for name in block.places}
            places = [place for place in self.places if place.name not in inside]
            own, whole = groups(places, self.uniform), sum(place.cost(place.count) for place in places)
            within = self.limit - self.now + sum(block.cost for block in gone) + whole
            more = widest([self.levels[group[0].name] for group in own], self._costs(places), within) if own else {}
            for number, kept in more.items():
                alike = next(group for group in groups(self.places, self.uniform) if own[number][0] in group)
                for place in alike:
                    found.setdefault(place.name, set()).update(kept)
        return found

    def _costs(self, places: Sequence[Place]) -> list[dict[int, int]]:
        """Returns by slot, and by all numbers of units that its places may keep, what they cost."""
        own = groups(places, self.uniform)
        return [{kept: sum(place.cost(kept) for place in group) for kept in group[0].allowed} for group in own]

    def _as_uniform(self) -> list[Point]:
        """Returns the best choice in which places of a kind keep as many, as levels of free slots; none if there is none."""
        if self.uniform:
            return []
        shared = make_slots(self.places, self.levels, self.losses, uniform=True)
        found = Frontier(shared).within(self.limit - self.now + cost(shared, (0,) * len(shared)))
        if found is None:
            return []
        kept = kept_at(shared, found)
        saved = {place.name: place.saves(kept[place.name]) for place in self.places}
        return [(0, self.spaces[0].nearest(saved))]

    def _damages(self, place: Place) -> list[float]:
        self.advance()
        return damages(self.library, self.divergence, place, self.levels[place.name])

    def _damage_without(self, block: Block) -> float:
        self.advance()
        return damage_without(self.library, self.divergence, block.name)

    def advance(self) -> None:
        """Counts a step as done."""
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.steps), self.steps)

    def _measure(self, point: Point) -> float:
        return self._measured(self.spaces[point[0]].kept(point[1]))

    def _measured(self, kept: Mapping[str, int]) -> float:
        self.advance()
        key = frozenset(kept.items())
        if key not in self.known:
            with self.library.assembled(kept):
                self.known[key] = self.divergence.mean()
        return self.known[key]

    def _choice(self, point: Point, measured: float) -> Choice:
        space, levels = self.spaces[point[0]], point[1]
        return Choice(space.kept(levels), space.left(levels), space.predicted(levels), measured)
