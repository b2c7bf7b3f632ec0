"""Chooses the units of the lowest importance, in each layer or over all layers, as far as they may be removed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from billhook.arguments import fraction, one_of, whole
from billhook.model.handed import Indices
from billhook.pruning.amount import RATIOS, Amount, Ranking, length_of, rounded
from billhook.pruning.cuts import coupled
from billhook.units.blocks import block_of, find_blocks
from billhook.units.find import of_kind
from billhook.units.units import Per, Units, plural

Counts = Mapping[str, Mapping[str, int]]
"""By the name of a ratio, and by place, numbers of units."""


@dataclass(frozen=True)
class _Order:
    """The units of places that lose the same ones, in the order in which they go: some of each place in each step.

    Attributes:
        places: These places.
        units: Those that go in each step: int64, `[steps, units]`.
        scores: The score of each step, float64.
    """

    places: Sequence[str]
    units: Indices
    scores: np.ndarray

    @property
    def sizes(self) -> list[int]:
        """How many units go in each step."""
        return [self.units.shape[1] * len(self.places)] * len(self.units)


def check_choice(ratio: float, ranking: str, least: int, per: str, what: str = "units") -> None:
    """Refuses arguments that no model allows; `what` names the units in messages, and `least` there is `min_heads` of heads."""
    fraction("ratio", ratio, of=f"the {what}")
    one_of("ranking", ranking, Ranking)
    whole(f"min_{what}", least, 0)
    one_of("per", per, Per)


def among_others(
    take: Callable[[Mapping[str, Tensor]], dict[str, list[int]]],
    before: Mapping[str, Sequence[int]],
    scores: Mapping[str, Tensor],
) -> dict[str, list[int]]:
    """Chooses units by their scores, among them all that have been chosen before."""
    lowest = {name: own.clone() for name, own in scores.items()}
    for name, chosen in before.items():
        lowest[name][list(chosen)] = -torch.inf
    return take(lowest)


def choose(
    units: Mapping[str, Units],
    scores: Mapping[str, Tensor],
    ratio: float,
    ranking: Ranking = "layer",
    min_units: int = 1,
    per: Per = "head",
    remove: bool = True,
    ends: tuple[int, int] = (0, 0),
    name: str = "ratio",
) -> dict[str, list[int]]:
    """Chooses the units of the lowest scores, of one kind; by place, ascending, places without any are left out.

    Args:
        units: The units by place.
        scores: By place, one for each unit; of attentions, for each query head or KV head, as `per` says.
        ratio: Fraction of the units, in [0, 1), rounded down; of blocks also the number in each stack (int).
        ranking: `"layer"`: as many in each place; `"global"`: the lowest of all places.
        min_units: The fewest that remain in each place.
        per: For heads, whether scores and chosen units are of query heads, or KV heads.
        remove: Whether they can be removed, not only masked: then all KV heads keep as many query heads, and layers that share a
            position bias lose the same heads.
        ends: How many units at the beginning and at the end of each place are kept.
        name: The name of `ratio` in messages.

    Raises:
        ValueError: If a score is missing or NaN, or a place would keep fewer than `min_units`: then with the legal ratio.
    """
    what = plural(one.kind for one in units.values())
    check_choice(0 if what == "blocks" and type(ratio) is int else ratio, ranking, min_units, per)
    if remove and min_units < 1:
        raise ValueError(f"min_units={min_units}: where units are removed, one at least stays in each place")
    for place, one in units.items():
        if place not in scores or len(scores[place]) != one.count(per):
            raise ValueError(f"scores: a score for each of the {one.count(per)} {what} of {place} is needed (per={per!r})")
        if scores[place].isnan().any():
            raise ValueError(f"scores: a score of {place} is NaN")
    sets = coupled(units) if remove else [[place] for place in units]
    orders = [_order(units, own, scores, per, remove, min_units, ends) for own in sets]
    totals = [sum(units[place].count(per) for place in own) for own in sets]
    if ranking == "layer":
        taken = [_take(one.sizes, ratio, total, one.places[0], what, name) for one, total in zip(orders, totals, strict=True)]
    else:
        taken = _take_lowest(orders, ratio, sum(totals), what, name)
    gone: dict[str, list[int]] = {}
    for order, steps in zip(orders, taken, strict=True):
        if len(steps):
            gone |= dict.fromkeys(order.places, np.sort(order.units[steps].flatten()).tolist())
    return {place: list(gone[place]) for place in units if place in gone}


def ranked(units: Units, scores: Tensor, ends: tuple[int, int] = (0, 0)) -> list[int]:
    """Orders the units of a place from the lowest score to the highest; of equal ones the first leads, of blocks the last."""
    values, count = scores.detach().cpu().double().numpy(), len(scores)
    order = count - 1 - np.argsort(values[::-1], kind="stable") if units.kind == "block" else np.argsort(values, kind="stable")
    return [unit for unit in order.tolist() if ends[0] <= unit < count - ends[1]]


def _order(
    units: Mapping[str, Units],
    own: Sequence[str],
    scores: Mapping[str, Tensor],
    per: Per,
    remove: bool,
    min_units: int,
    ends: tuple[int, int],
) -> _Order:
    """Returns what may be removed one after the other, the least important first, in places that lose units together."""
    score = torch.stack([scores[place].detach().cpu().double() for place in own]).mean(0)
    one, values = units[own[0]], score.numpy()
    size = one.count(per)
    if remove and per == "head" and one.count("kv_head") < size:  # the lowest of each KV head, then the next of each
        rows = [np.flatnonzero(one.kv_of == kv) for kv in range(one.count("kv_head"))]
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"per='head': the KV heads of {own[0]} serve different numbers of query heads; per='kv_head' works")
        order = [row[np.argsort(values[row], kind="stable")] for row in rows]
        together = np.sort(np.stack(order, axis=1), axis=1)
        means = np.array([fmean(row) for row in values[together].tolist()])
    else:
        together = np.array(ranked(one, score, ends), dtype=np.int64)[:, None]
        means = values[together[:, 0]]
    each = together.shape[1]
    most = max(size // each - -(-min_units // each), 0)
    return _Order(own, together[:most], means[:most])


def _take(sizes: Sequence[int], ratio: float, total: int, where: str, what: str, name: str) -> list[int]:
    """Returns the numbers of the first steps, of these sizes, that come to at most this part of the units."""
    target, taken, size = ratio if type(ratio) is int else int(ratio * total + 1e-9), list[int](), 0
    most = sum(sizes)
    if target > most:
        raise ValueError(
            f"{name}={ratio}: {target} of {total} {what} of {where} would be removed, and at most {most} may: {most / total:g}"
        )
    if len(set(sizes)) == 1:
        return list(range(min(target // sizes[0], len(sizes))))
    for number, step in enumerate(sizes):
        if size + step <= target:
            taken.append(number)
            size += step
    return taken


def _take_lowest(orders: Sequence[_Order], ratio: float, total: int, what: str, name: str) -> list[list[int]]:
    """Returns the numbers of the steps of the lowest scores of all, by where they are of."""
    places = [(number, step) for number, one in enumerate(orders) for step in range(len(one.units))]
    rank = np.argsort(np.concatenate([one.scores for one in orders]), kind="stable").tolist()
    every = [size for one in orders for size in one.sizes]
    taken: list[list[int]] = [[] for _ in orders]
    for step in _take([every[step] for step in rank], ratio, total, "all layers", what, name):
        where, number = places[rank[step]]
        taken[where].append(number)
    return taken


def choose_units(
    units: Mapping[str, Units],
    scores: Mapping[str, Tensor],
    amount: Amount,
    ratios: Mapping[str, float],
    protected: frozenset[str] = frozenset(),
    steps: Mapping[str, int] | None = None,
    first: Counts | None = None,
) -> dict[str, list[int]]:
    """Chooses the units of the lowest scores, of several kinds; by place, ascending, of attentions query heads.

    The scores are of heads or KV heads as the ratio is, by its name in `Amount`; protected places keep all of their units.

    Args:
        units: The units by place.
        scores: Their scores.
        amount: Says how they are ranked, how many stay, and to what numbers are rounded.
        ratios: By name, which part of them goes.
        protected: Places that keep all.
        steps: By place, a number of which a multiple stays.
        first: By name and place, how many units there were before parts of the amount were removed; given ratios are of those.

    Raises:
        ValueError: If a score is missing or NaN, or a ratio would leave a place with fewer than `min_units`.
    """
    gone: dict[str, list[int]] = {}
    for name, ratio in ratios.items():
        kind, per = RATIOS[name]
        own = free(of_kind(units, kind), protected)
        if not ratio:
            continue
        if not own:
            why = "all are in protected blocks" if of_kind(units, kind) else "the model has none that may be removed"
            raise ValueError(f"{name}={ratio:g}: {why}")
        ends = (amount.first, amount.last) if kind == "block" else (0, 0)
        take = partial(choose, scores=scores, min_units=amount.min_units, per=per, ends=ends, name=name)
        before = {place: (first or {}).get(name, {}).get(place, one.count(per)) for place, one in own.items()}
        chosen: dict[str, list[int]] = {}
        for some, part in _parts(own, ratio, before, per, amount.ranking) if name in amount.ratios else [(own, ratio)]:
            chosen |= take(some, ratio=part, ranking=amount.ranking)
        stay = partial(_stay, per=per, amount=amount, at_most=name in amount.open)
        stays = {
            place: stay(
                own[place], asked=own[place].count(per) - len(some), first=before[place], step=(steps or {}).get(place, 1)
            )
            for place, some in chosen.items()
        }
        chosen |= _again(own, chosen, stays, per, take)
        gone |= {place: own[place].query_heads(some) if per == "kv_head" else some for place, some in chosen.items() if some}
    return gone


def _parts(
    units: Mapping[str, Units], ratio: float, before: Mapping[str, int], per: Per, ranking: Ranking
) -> list[tuple[dict[str, Units], float]]:
    """Divides places by the part of what is left in them that goes, for a ratio of what there was at first."""
    found: dict[float, dict[str, Units]] = {}
    for places in [list(units)] if ranking == "global" else [[place] for place in units]:
        first, now = sum(before[place] for place in places), sum(units[place].count(per) for place in places)
        part = ratio if first == now else max(0.0, ratio * first - (first - now)) / now
        found.setdefault(part, {}).update({place: units[place] for place in places})
    return [(own, part) for part, own in found.items()]


def _stay(units: Units, asked: int, first: int, step: int, per: Per, amount: Amount, at_most: bool) -> int:
    """Returns how many units stay in a place that was asked to keep so many."""
    now, channels, each = units.count(per), units.kind in ("channel", "residual"), length_of(units, per)
    if amount.round_to == "auto" and each and (channels or not at_most):
        grouped = per == "head" and units.count("kv_head") < now
        together = units.count("kv_head") if grouped and not channels else 1  # as many go of each KV head
        near = rounded(asked, first, now, amount.min_units, each, math.lcm(step, together), more=not at_most)
        if near is not None:
            return near
    multiple = math.lcm(1 if amount.round_to == "auto" else amount.round_to, step) if channels else 1
    return min(-(-asked // multiple) * multiple, now)


def _again(
    units: Mapping[str, Units],
    chosen: Mapping[str, Sequence[int]],
    stays: Mapping[str, int],
    per: Per,
    take: Callable[..., dict[str, list[int]]],
) -> dict[str, list[int]]:
    """Chooses units again where other numbers stay; of a place that keeps all then, none."""
    found: dict[str, list[int]] = {}
    for places in coupled({place: units[place] for place in chosen}):
        now, stay = units[places[0]].count(per), stays[places[0]]
        if stay != now - len(chosen[places[0]]):
            some = {place: units[place] for place in places}
            found |= dict.fromkeys(places, []) | take(some, ratio=(now - stay) / now, ranking="layer")
    return found


def free(units: Mapping[str, Units], protected: frozenset[str]) -> dict[str, Units]:
    """Returns the places that may lose units: neither protected nor bound to one that is, as by a common position bias."""
    bound = {place for own in coupled(units) if protected & set(own) for place in own}
    return {place: one for place, one in units.items() if place not in bound}


def most(units: Mapping[str, Units], name: str, amount: Amount, protected: frozenset[str]) -> float:
    """Returns the highest ratio of a kind that leaves `min_units` everywhere; 0 where none may be removed."""
    kind, per = RATIOS[name]
    own = free(of_kind(units, kind), protected)
    counts = [one.count(per) for one in own.values()]
    return min((max(count - amount.min_units, 0) / count for count in counts), default=0.0)


def protected_places(model: nn.Module, units: Mapping[str, Units], amount: Amount) -> frozenset[str]:
    """Returns the places in the first and last blocks of a stack."""
    if not amount.first and not amount.last:
        return frozenset()
    stacks = find_blocks(model)
    found = set[str]()
    for name, one in units.items():
        where = block_of(one.name, stacks)
        if one.kind not in ("residual", "block") and where is not None:
            stack, place = where
            if place < amount.first or place >= len(stacks[stack]) - amount.last:
                found.add(name)
    return frozenset(found)
