"""Leads a model through the steps of a search: levels, variants, damage, choice, and the cut and repair of what is chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from billhook.arguments import as_percentage
from billhook.engine.batches import runs_of
from billhook.importance.score import Importance, run_of, score
from billhook.model.figures import figure_of
from billhook.model.linears import matrix_of
from billhook.pruning.amount import Amount
from billhook.pruning.target import Search
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.blocks import Block, Blocks, find_blocks
from billhook.shrinking.choose import Levels, Slot, between, cost, evolve, kept_at
from billhook.shrinking.damages import CALLED, damage_without, damages, fewer_blocks, groups, make_slots, of_one_kind
from billhook.shrinking.divergence import Agreed, Divergence
from billhook.shrinking.levels import Place, find_places, gone, query_scores, removed, told
from billhook.shrinking.merging import Merging, find_merging
from billhook.shrinking.planned import Planned, plan_choice, refitted_if_enough
from billhook.shrinking.shrunk import Choice, Shrunk, Times, in_words
from billhook.shrinking.space import (
    SEVERAL,
    Point,
    as_uniform,
    best_point,
    coarser,
    filled_up,
    finalists,
    free_space,
    just_met,
    kinds_cut,
    moved,
    spread,
    starts,
    uniform_spaces,
)
from billhook.shrinking.variants import Library, fill_library, key_of
from billhook.units.units import UnitKind

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
        blocks: The whole blocks that may go.
        progress: Called with how many steps are done, and of how many at most.
        reused: Called with how many variants a library on disk holds from an earlier search.
        entered: Called with what is done from now on, in words.
        steps: How many there are at most.
        done: How many are done.
        known: What has been measured, by how many units are kept.
        alone: By the name of a kind of unit, what is left of the target, and lost, without units of this kind alone.
        merges: Whether KV heads may merge, for a budget of their cache, wherever that loses less than removal.
        merging: Those that may; None where none may, or before it is known.
        not_repaired: Why nothing is refitted though `"auto"` was asked for; empty if that was not so.
        agreed: Returns, of what several ranks have found alike but for rounding, that of the first, by which all decide.
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
    reused: Callable[[int], None] | None = None
    entered: Callable[[str], None] | None = None
    steps: int = 0
    done: int = 0
    known: dict[frozenset[tuple[str, int]], float] = field(default_factory=dict)
    alone: dict[str, tuple[int, float]] = field(default_factory=dict)
    merges: bool = True
    merging: Merging | None = None
    not_repaired: str = ""
    agreed: Agreed = lambda value: value

    @classmethod
    def begun(cls, model: PreTrainedModel, amount: Amount, uniform: bool, timed: bool = False) -> "Work":
        """Finds what may go, less of it for a budget of time; refuses a budget that cannot be reached."""
        search, target = Search(model, amount), amount.target or ""
        limit = search.limit(target)
        now = int(getattr(search.now, target))
        places = find_places(search, target, query_heads=not timed, alike=uniform)
        blocks = find_blocks(search, target, places)
        work = cls(model, search, target, now, limit, uniform, places, blocks)
        work.divide(getattr(amount, target))
        return work

    def divide(self, asked: float) -> None:
        """Divides places into levels; refuses a budget that none of them reach."""
        self.levels = {place.name: place.levels() for place in self.places}
        if self.least > self.limit:
            limit, least, now = (in_words(self.target, one) for one in (self.limit, self.least, self.now))
            limit += " ms" * (self.target == "latency")
            raise ValueError(
                f"{self.target}={asked}: {limit} cannot be reached; with what may be removed, {least} to {now} can"
                f"{as_percentage(asked)}"
            )
        more = just_met(self.places, self.blocks.able, self.now, self.levels, self.limit) if self.uniform else {}
        for name, kept in more.items():
            own = {self._rounded({name: one})[name] for one in kept}
            self.levels[name] = tuple(sorted({*self.levels[name], *own}, reverse=True))

    @property
    def least(self) -> int:
        """The least that may be left: without all blocks that may go, and all other places at their lowest."""
        saved = {place.name: place.saves(self.levels[place.name][-1]) for place in self.places}
        more = (max(block.cost - sum(saved[name] for name in block.places), 0) for block in self.blocks.able)
        return self.now - sum(saved.values()) - sum(more)

    def most_steps(self, generations: int, candidates: int) -> int:
        """Returns how many steps a search has at most."""
        probed = sum(2 + bool(place.merges) for place in self.places) + len(self.blocks.able)
        return probed + len(SEVERAL) + 2 + generations * candidates + CURVE

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
        repair: RepairConfig | None,
        folder: Path | None = None,
    ) -> None:
        """Scores units, makes the variants, in a folder or in memory, and measures what they cost the model."""
        self.enter("scoring")
        self.divergence = Divergence(self.model, runs_of(self.model, held_out), self.agreed)
        units = self.search.units
        own = {name: units[name] for place in self.places for name in place.names}
        self.scores = score(self.model, own, importance, fitted, per="kv_head")
        pairs = {name: place.pairs for place in self.places if place.pairs for name in place.names}
        self.scores = self.agreed(self.scores | query_scores(self.model, units, pairs, importance, fitted))
        runs = [run_of(self.model, own, batch) for batch in fitted]
        how = [str(repair), self.search.amount.round_to, pairs, len(fitted)]
        own_folder = folder and folder / key_of(self.model, how, self.scores, [*fitted, *held_out])
        self.library = Library(self.model, own_folder, self.blocks.writers)
        if self.reused is not None:
            self.reused(len(self.library.errors))
        self.enter("refitting variants of places")
        fill_library(self.library, self.places, self.levels, units, self._gone, runs, repair, self.advance)
        self.enter("measuring what they lose")
        self.losses = self.agreed({place.name: self._damages(place) for place in self.places})
        self._merge(fitted, repair)
        self.losses |= {block.name: [0.0, self._damage_without(block)] for block in self.blocks.able}
        self.losses = self.agreed(self.losses)
        make = uniform_spaces if self.uniform else free_space
        self.spaces = make(self.places, self.levels, self.losses, self.blocks.able, self.now)

    def chosen(self, generations: int, candidates: int, seed: int) -> tuple[list[dict[str, int]], list[Choice], list[Choice]]:
        """Returns how many units places keep, the choices of other sizes, and what has been measured within the budget.

        Where layers stay alike there may be several choices, the best first, of which repair is to tell which one it is.
        """
        self.enter("searching")
        ranked = sorted(self.blocks.able, key=lambda block: self.losses[block.name][-1])
        start = starts(self.spaces, self.limit, ranked)
        if self.uniform:
            start += [(0, levels) for levels in self._of_one_kind(self._slots(self.places)).values()]
        else:
            start += as_uniform(self.spaces[0], self.places, self.levels, self.losses, self.limit - self.now)
        found = evolve(start, partial(moved, self.spaces, self.limit), self._measure, generations, candidates, seed)
        order = sorted(found, key=lambda point: found[point])
        kept = [self._filled(point) for point in self._finalists(order, found)]
        self.steps = self.done + CURVE
        curve = [self._choice(point, self._measure(point)) for point in spread(self.spaces, CURVE)]
        return kept, curve, [self._choice(point, found[point]) for point in order]

    def sum_chosen(self) -> dict[str, int]:
        """Returns how many units places keep by what they lose alone, added up; as few as may be where none fits."""
        point = best_point(self.spaces, self.limit) or best_point(self.spaces, self.least)
        assert point is not None
        return self._filled(point)

    def compare(self, fitted: Sequence[Any]) -> None:
        """Measures what would be lost within the budget without one kind of unit alone; variants are let go of after that."""
        self.enter("comparing with one kind of unit")
        slots = self._slots(self.places)
        whole = cost(slots, (0,) * len(slots))
        for kind, levels in self._of_one_kind(slots).items():
            kept = kept_at(slots, levels)
            self.alone[CALLED[kind]] = (self.now - whole + cost(slots, levels), self._measured(kept))
        ends = self.search.amount.first, self.search.amount.last
        if self.target == "params" and (found := fewer_blocks(self.model, fitted, self.divergence, self.now - self.limit, ends)):
            self.alone[CALLED["block"]] = (self.now - found[0], found[1])
        self.library.forget()

    def _of_one_kind(self, slots: Sequence[Slot]) -> dict[UnitKind, Levels]:
        """Finds the levels that meet the budget if places of one kind alone keep less, by kind, where that is enough."""
        kinds, whole = {place.name: place.kind for place in self.places}, cost(slots, (0,) * len(slots))
        return of_one_kind(slots, [kinds[slot.names[0]] for slot in slots], self.limit - self.now + whole)

    def planned(self, fitted: Sequence[Any], repair: RepairConfig | None, kept: Mapping[str, int]) -> Planned:
        """Plans what was chosen, and repairs it from front to back; the model stays as it is."""
        if repair is not None:
            self.enter("repairing what was chosen")
        blocks, cut = self.blocks.gone(kept), dict(kept)
        for group in groups(self.places, self.uniform):  # what goes with its block has no number, or one with those that stay
            number = max(kept[place.name] for place in group) or group[0].count
            cut |= {place.name: number for place in group if not kept[place.name]}
        numbers = removed(self.places, self.search.units, self.scores, cut)
        if self.merging is not None and (merged := self.merging.merged(self.places, cut, kept)) is not None:
            return merged.planned(self.limit, numbers, self.blocks, blocks, fitted, repair)
        planned = plan_choice(self.search, self.target, self.limit, numbers, self.blocks, blocks)
        behind = self.blocks.behind(blocks) if blocks else []
        if repair is None or not (planned.units.units or behind):
            return planned
        weights, left = refitted_if_enough(self.model, planned.units, fitted, repair, self.blocks.zeros(blocks), behind)
        return replace(planned, weights=weights or None, not_refitted=left)

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
        counts = told(self.places, kept)
        left = round(times.ratio * self.now) if times else int(figure_of(self.model, self.target) or 0)
        found = tuple(curve), tuple(tried), dict(self.alone), ratio, times
        own = planned.blocks, self.blocks.why, planned.merged, planned.not_refitted or self.not_repaired
        return Shrunk(planned.units, self.target, self.limit, left, counts, predicted, self.divergence.by_source(), *found, *own)

    def _merge(self, fitted: Sequence[Any], repair: RepairConfig | None) -> None:
        """Makes variants in which KV heads merge, and takes those that lose less than removal."""
        self.merging = find_merging(self.search, self.places, self.uniform, self.library) if self.merges else None
        if self.merging is None:
            return
        self.merging.fill(self.places, fitted, repair, self.advance)
        scale = self.places, self.levels, self.losses
        self.places, self.levels, self.losses = self.merging.choose(self.divergence, scale, self.uniform)

    def _finalists(self, order: Sequence[Point], measured: Mapping[Point, float]) -> list[Point]:
        """Returns the best choice whose blocks can go together, and others that repair may make better; refuses if none can."""
        first = next((number for number, point in enumerate(order) if not self._refusal(point)), None)
        if first is None:
            raise ValueError(self._refusal(order[-1]))
        if not self.uniform or self.merging is not None:
            return [order[first]]
        own = finalists(order[first:], measured, lambda one: kinds_cut(self.spaces[one[0]], one[1], self.places))
        return [point for point in own if not self._refusal(point)]

    def _refusal(self, point: Point) -> str:
        """Says why the blocks of a choice cannot go together; empty if they can, or none goes."""
        gone = self.blocks.gone(self.spaces[point[0]].kept(point[1]))
        return self.blocks.refusal(gone) if gone else ""

    def _filled(self, point: Point) -> dict[str, int]:
        """Lets places keep more, between levels too, as far as the budget goes."""
        space, levels = self.spaces[point[0]], point[1]
        before = space.kept(levels)
        kept = filled_up(space, levels, self.limit, self.places, self.levels, self.losses, self.uniform)
        more = sum(place.cost(kept[place.name]) - place.cost(before[place.name]) for place in self.places)
        return self._rounded(kept, self.limit - space.left(levels) - more)

    def _rounded(self, kept: Mapping[str, int], spare: int = 0) -> dict[str, int]:
        """Rounds numbers of channels down, where layers stay alike and that is left to us."""
        left_to_us = self.uniform and self.search.amount.round_to == "auto"
        return coarser(self.places, kept, spare) if left_to_us else dict(kept)

    def _present(self, kept: Mapping[str, int]) -> list[Place]:
        """Returns the places that do not go with their block."""
        return [place for place in self.places if kept[place.name]]

    def _slots(self, places: Sequence[Place]) -> list[Slot]:
        return make_slots(places, self.levels, self.losses, self.uniform)

    def _gone(self, place: Place, kept: int) -> dict[str, list[int]]:
        return gone(place, self.search.units, self.scores, kept)

    def _damages(self, place: Place) -> list[float]:
        self.advance()
        return damages(self.library, self.divergence, place, self.levels[place.name])

    def _damage_without(self, block: Block) -> float:
        self.advance()
        return damage_without(self.library, self.divergence, block.name)

    def enter(self, what: str) -> None:
        """Says what is done from now on, beside how many steps are done."""
        if self.entered is not None:
            self.entered(what)
        if self.progress is not None:
            self.progress(min(self.done, self.steps), self.steps)

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
        kept = space.kept(levels) | {name: now for name, (_, now) in told(self.places, space.kept(levels)).items()}
        return Choice(kept, space.left(levels), space.predicted(levels), measured)
