"""Finds where KV heads may merge, makes the variants in which they do, and takes these where they lose less than removal."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any

from billhook.engine.batches import Run
from billhook.engine.lazy import LazyTensors, by_parameter
from billhook.engine.memory import memory_to_hold
from billhook.engine.store import store_of
from billhook.kv_heads.attentions import Attentions
from billhook.kv_heads.basis import find_bases, pooled
from billhook.kv_heads.layout import read, written
from billhook.kv_heads.moments import Moments, gather
from billhook.model.figures import kv_cache_bytes
from billhook.model.linears import matrix_of
from billhook.pruning.target import Search
from billhook.repairs.repair import RepairConfig
from billhook.shrinking.damages import groups
from billhook.shrinking.divergence import Divergence
from billhook.shrinking.levels import Place
from billhook.shrinking.merged import METHOD, Merged, plans_of, refit_readers
from billhook.shrinking.variants import UNFITTED, Library, resting

Scale = tuple[list[Place], dict[str, tuple[int, ...]], dict[str, list[float]]]
"""Places, and by place the numbers of units that it may keep, and what it loses at each."""
ByNumber = dict[str, dict[int, LazyTensors]]
"""Parameters by attention and number of KV heads."""


@dataclass(eq=False)
class Merging:
    """The KV heads of a model that may merge.

    Attributes:
        search: The model, and what it costs.
        attentions: Its attentions.
        library: Where the variants in which they do are held.
        able: By place, the numbers of KV heads to which its own can merge.
        chosen: The places and numbers where they do.
    """

    search: Search
    attentions: Attentions
    library: Library
    able: dict[str, list[int]]
    chosen: set[tuple[str, int]] = field(default_factory=set)

    def fill(
        self, places: Sequence[Place], batches: Sequence[Any], repair: RepairConfig | None, done: Callable[[], None]
    ) -> None:
        """Makes the variants in which KV heads merge, except those that the library holds.

        What reads heads is refitted in them, as where heads are removed; what it is in all that is planned, which is repaired as
        a whole, the library holds beside.

        Args:
            places: The places.
            batches: Batches that show what heads do; runs know which tokens count for each linear.
            repair: How linears are refitted; None: not at all.
            done: Called after each place.
        """
        own, library = self.attentions, self.library
        trials = [batch if isinstance(batch, Run) else own.trial(batch) for batch in batches]
        missing = {p.name: [kept for kept in self.able.get(p.name, ()) if (held(p), kept) not in library.errors] for p in places}
        parts = len({trial.source for trial in trials}) + 2 if repair is not None else 0
        places = [place for place in places if missing[place.name]]
        most = memory_to_hold(self.search.model.device)
        for some in _passes(places, lambda place: _size(own, place, missing[place.name], parts), most):
            numbers = {name: missing[place.name] for place in some for name in place.names}
            try:
                equal, readers = _variants(own, numbers, trials, repair)
            except ValueError:  # of an attention that cannot be watched: removal remains
                self.able = {}
                return
            for place in some:
                for kept in missing[place.name]:
                    weights, fitted = _joined(equal, place, kept), _joined(readers, place, kept)
                    if fitted:
                        library.add(unfitted(place), kept, 0.0, weights.under(fitted.modules))
                    library.add(held(place), kept, 0.0, weights | fitted)
                done()

    def choose(self, divergence: Divergence, scale: Scale, uniform: bool) -> Scale:
        """Takes the merged variants that lose less than those in which heads are removed; each is measured.

        It is decided for places that take one level together, as the whole model then loses. Levels at which more is kept, and
        more lost, than at another one go.
        """
        places, levels, losses, library = scale[0], dict(scale[1]), dict(scale[2]), self.library
        found = {place.name: place for place in places}
        for group in groups(places, uniform):
            own = {place.name: dict(zip(levels[place.name], losses[place.name], strict=True)) for place in group}
            able = [kept for kept in levels[group[0].name] if all(kept in self.able.get(name, ()) for name in own)]
            better = [kept for kept in able if _is_better(library, divergence, group, kept, own)]
            for name, kept in ((place.name, kept) for place in group for kept in better):
                own[name][kept] = library.measured[held(found[name]), kept]
                library.instead[name, kept] = held(found[name])
                self.chosen.add((name, kept))
            for place in group if better else ():
                stay = unbeaten({kept: sum(one[kept] for one in own.values()) for kept in levels[place.name]})
                found[place.name] = replace(place, allowed=stay)
                losses[place.name] = [own[place.name][kept] for kept in stay]
            levels |= {place.name: found[place.name].allowed for place in group if better}
        return list(found.values()), levels, losses

    def merged(self, places: Sequence[Place], kept: Mapping[str, int], stay: Mapping[str, int]) -> Merged | None:
        """Returns the KV heads that merge; None where none do.

        Args:
            places: The places.
            kept: By place, how many units it keeps, also where it goes with its block after that.
            stay: The same, 0 where it does.
        """
        own = [place for place in places if (place.name, kept[place.name]) in self.chosen]
        heads = {name: kept[place.name] for place in own for name in place.names}
        weights = [
            self.library.weights(name, kept[place.name])
            for place in own
            for name in (held(place), unfitted(place))
            if stay[place.name]
        ]
        new = reduce(or_, weights, LazyTensors({}))
        return Merged(self.search, heads, new) if heads else None


def find_merging(search: Search, places: Sequence[Place], uniform: bool, library: Library) -> Merging | None:
    """Finds the KV heads that may merge, as has been tried on meta tensors; None where none may."""
    places = [place for place in places if place.merges]
    counts = {name: place.count for place in places for name in place.names}
    if not counts:
        return None
    try:
        attentions = Attentions(search.model, dict.fromkeys(counts, 1))
        if {name: one.kv_heads for name, one in attentions.projections.items()} != counts:
            return None
        attentions.check(METHOD)
    except ValueError:
        return None
    able: dict[str, list[int]] = {}
    for group in groups(places, uniform=True):
        tried = [group] if uniform else [group, group[-1:]]
        numbers = [kept for kept in group[0].merges if all(_saves(search, own, kept) for own in tried)]
        able |= {place.name: numbers for place in group}
    return Merging(search, attentions, library, able)


def held(place: Place) -> str:
    """Returns the name under which a library holds the variants of a place in which KV heads merge."""
    return f"{place.name} merged"


def unfitted(place: Place) -> str:
    """Returns the name under which a library holds what reads the merged heads of a place as it is before it is refitted."""
    return held(place) + UNFITTED


def unbeaten(losses: Mapping[int, float]) -> tuple[int, ...]:
    """Returns the numbers of units, falling, at which no more is lost than at any smaller one.

    >>> unbeaten({4: 0.0, 3: 0.5, 2: 0.25, 1: 1.0})
    (4, 2, 1)
    """
    return tuple(kept for kept in losses if all(losses[kept] <= lost for fewer, lost in losses.items() if fewer < kept))


def _saves(search: Search, places: Sequence[Place], kept: int) -> bool:
    """Tells whether places can merge their heads to so many, and the cache is then as small as if the others were removed."""
    try:
        _, smaller = plans_of(search.model, {name: kept for place in places for name in place.names})
    except ValueError:
        return False
    saved = (kv_cache_bytes(search.model) or 0) - (kv_cache_bytes(smaller) or 0)
    return saved == sum(place.saves(kept) for place in places)


def _passes(places: Sequence[Place], size: Callable[[Place], int], most: int) -> Iterator[list[Place]]:
    """Yields places whose moments fit into memory together: for each of these there is a pass over the batches.

    Args:
        places: The places.
        size: Returns how many bytes the moments of a place take.
        most: How many bytes there may be at a time.
    """
    some, used = list[Place](), 0
    for place in places:
        if some and used + size(place) > most:
            yield some
            some, used = [], 0
        some, used = [*some, place], used + size(place)
    if some:
        yield some


def _variants(
    attentions: Attentions, numbers: Mapping[str, Sequence[int]], trials: Sequence[Run], repair: RepairConfig | None
) -> tuple[ByNumber, ByNumber]:
    """Returns parameters with which the heads of each group are equal, and those of what reads them, refitted."""
    model, places = attentions.model, {name: attentions.projections[name] for name in numbers}
    moments = gather(model, places, numbers, trials)
    equal = {name: {kept: _equal(attentions, name, one) for kept, one in own.items()} for name, own in moments.items()}
    if repair is None:
        return equal, {name: {kept: LazyTensors({}) for kept in own} for name, own in equal.items()}
    return equal, refit_readers(model, places, equal, trials, repair)


def _joined(found: ByNumber, place: Place, kept: int) -> LazyTensors:
    """Returns the parameters of all attentions of a place."""
    return reduce(or_, (found[name][kept] for name in place.names))


def _equal(attentions: Attentions, name: str, moments: Moments) -> LazyTensors:
    """Returns the parameters of an attention with which the heads of each group are equal."""
    model, place = attentions.model, attentions.projections[name]
    store_of(model).load(model.get_submodule(name))
    stacks = read(model, place)
    found = written(model, place, pooled(stacks, *find_bases(stacks, moments, attentions.symmetries[name], METHOD)))
    return resting(model, by_parameter(found))


def _is_better(
    library: Library, divergence: Divergence, group: Sequence[Place], kept: int, removed: Mapping[str, Mapping[int, float]]
) -> bool:
    """Measures merged variants, each alone, and tells whether they lose less than those in which heads are removed, together."""
    for place in group:
        if (held(place), kept) not in library.measured:
            with library.assembled({held(place): kept}):
                lost = divergence.mean(library.weights(held(place), kept))
            library.note(held(place), kept, max(lost, 0.0))
    if len(group) == 1:
        return library.measured[held(group[0]), kept] < removed[group[0].name][kept]
    found = list[float]()
    for names in ([held(place) for place in group], [place.name for place in group]):
        with library.assembled(dict.fromkeys(names, kept)):
            found.append(divergence.mean())
    return found[0] < found[1]


def _size(own: Attentions, place: Place, numbers: Sequence[int], parts: int) -> int:
    """Returns how many bytes moments take, of heads and of what reads them, for each number of KV heads and part of the data."""
    widths = [rows.index.size for name in place.names for rows in (own.projections[name].k, own.projections[name].v)]
    heads = sum(8 * width**2 // number for width in widths for number in numbers)
    readers = [matrix_of(own.model.get_submodule(own.projections[name].o.linear))[0].shape for name in place.names]
    return heads + len(numbers) * parts * sum(8 * columns * (rows + columns) for rows, columns in readers)
