"""Chooses the units of the lowest importance, in each layer or over all layers, as far as they may be removed."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from billhook.arguments import check_fraction, check_int, check_one_of, check_types
from billhook.model.repeat_kv import Indices
from billhook.pruning.amount import RATIOS, Amount, Ranking, round_units, unit_length
from billhook.pruning.cut import coupled_modules
from billhook.units.blocks import block_of, find_blocks
from billhook.units.find import of_kind
from billhook.units.units import Per, Units, plural

Counts = Mapping[str, Mapping[str, int]]
"""By the name of a ratio, and by place, numbers of units."""


@dataclass(frozen=True)
class _Order:
    """The units of layers that lose the same ones, in the order in which they go: some of each layer in each step.

    Attributes:
        layers: The names of these layers.
        units: Those that go in each step: int64, `[steps, units]`.
        scores: The score of each step, float64, ascending.
    """

    layers: Sequence[str]
    units: Indices
    scores: np.ndarray


@dataclass(frozen=True)
class HeadOptions:
    """Says how attention heads are compared and how many stay.

    Args:
        ranking: `"layer"`: as many heads from each layer; `"global"`: the lowest of all layers, as in Michel et al., 2019.
        per: Whether heads are query heads (`"head"`), or KV heads with the query heads that they serve (`"kv_head"`).
        min_heads: The least number of heads in each layer; 0 only if heads are masked and never removed.
        normalize: True to divide the scores of each layer by their L2 norm, as the paper does.

    Raises:
        ValueError: If an argument is not legal.

    >>> import billhook as bh
    >>> callback = bh.HeadPruning(0.25, options=bh.HeadOptions(ranking="global"))
    """

    ranking: Ranking = "layer"
    per: Per = "head"
    min_heads: int = 1
    normalize: bool = True

    def __post_init__(self) -> None:
        check_choice(0, self.ranking, self.min_heads, self.per, "heads")
        check_types(HeadOptions, vars(self))


def check_choice(ratio: float, ranking: str, least: int, per: str, what: str = "units") -> None:
    """Refuses arguments that no model allows; `what` names the units in messages, and `least` there is `min_heads` of heads."""
    check_fraction("ratio", ratio, of=f"the {what}")
    check_one_of("ranking", ranking, Ranking)
    check_int(f"min_{what}", least, 0)
    check_one_of("per", per, Per)


def choose_including(
    take: Callable[[Mapping[str, Tensor]], dict[str, list[int]]],
    before: Mapping[str, Sequence[int]],
    scores: Mapping[str, Tensor],
) -> dict[str, list[int]]:
    """Chooses units by their scores, among them all that have been chosen before."""
    lowest = {name: values.clone() for name, values in scores.items()}
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
    what = plural(layer.kind for layer in units.values())
    check_choice(0 if what == "blocks" and type(ratio) is int else ratio, ranking, min_units, per)
    if remove and min_units < 1:
        raise ValueError(f"min_units={min_units}: where units are removed, one at least stays in each place")
    counts = {layer: of_layer.count(per) for layer, of_layer in units.items()}
    for layer, count in counts.items():
        if layer not in scores or len(scores[layer]) != count:
            raise ValueError(f"scores: a score for each of the {count} {what} of {layer} is needed (per={per!r})")
        if scores[layer].isnan().any():
            raise ValueError(f"scores: a score of {layer} is NaN")
    sets = coupled_modules(units) if remove else [[layer] for layer in units]
    orders = [_order(units, layers, scores, per, remove, min_units, ends) for layers in sets]
    removed: dict[str, list[int]] = {}
    for ranked_together in [[order] for order in orders] if ranking == "layer" else [orders]:
        total = sum(counts[layer] for order in ranked_together for layer in order.layers)
        where = ranked_together[0].layers[0] if ranking == "layer" else "all layers"
        steps = _lowest_steps(ranked_together, ratio, total, f"{what} of {where}", name)
        for order, numbers in zip(ranked_together, steps, strict=True):
            removed |= dict.fromkeys(order.layers, np.sort(order.units[numbers].flatten()).tolist())
    return {layer: list(removed[layer]) for layer in units if removed.get(layer)}


def rank_units(units: Units, scores: Tensor, ends: tuple[int, int] = (0, 0)) -> list[int]:
    """Orders the units of a place from the lowest score to the highest; of equal ones the first leads, of blocks the last."""
    values, count = scores.detach().cpu().double().numpy(), len(scores)
    order = count - 1 - np.argsort(values[::-1], kind="stable") if units.kind == "block" else np.argsort(values, kind="stable")
    return [unit for unit in order.tolist() if ends[0] <= unit < count - ends[1]]


def _order(
    units: Mapping[str, Units],
    layers: Sequence[str],
    scores: Mapping[str, Tensor],
    per: Per,
    remove: bool,
    min_units: int,
    ends: tuple[int, int],
) -> _Order:
    """Orders the units that may be removed, the least important first, of layers that lose the same ones."""
    first, score = units[layers[0]], torch.stack([scores[layer].detach().cpu().double() for layer in layers]).mean(0)
    values, count = score.numpy(), first.count(per)
    if remove and per == "head" and first.count("kv_head") < count:  # the lowest of each KV head, then the next of each
        queries_of = [np.flatnonzero(first.kv_of == kv) for kv in range(first.count("kv_head"))]
        if len({len(queries) for queries in queries_of}) > 1:
            raise ValueError(
                f"per='head': the KV heads of {layers[0]} serve different numbers of query heads; per='kv_head' works"
            )
        order = [queries[np.argsort(values[queries], kind="stable")] for queries in queries_of]
        steps = np.sort(np.stack(order, axis=1), axis=1)
        # fmean rounds once, so that a step's mean does not depend on the order of its heads
        means = np.array([fmean(step) for step in values[steps].tolist()])
    else:
        steps = np.array(rank_units(first, score, ends), dtype=np.int64)[:, None]
        means = values[steps[:, 0]]
    in_step = steps.shape[1]
    most = max(count // in_step - -(-min_units // in_step), 0)
    return _Order(layers, steps[:most], means[:most])


def _lowest_steps(orders: Sequence[_Order], ratio: float, total: int, what: str, name: str) -> list[list[int]]:
    """Returns for each order the steps of the lowest scores of all that come to at most this part of the units."""
    steps = [(number, step) for number, order in enumerate(orders) for step in range(len(order.units))]
    sizes = [order.units.shape[1] * len(order.layers) for order in orders]
    num_most = sum(sizes[number] for number, _ in steps)
    target = ratio if type(ratio) is int else int(ratio * total + 1e-9)  # 0.3 of 10 is 3, though floats may say 2.9999
    if target > num_most:
        raise ValueError(
            f"{name}={ratio}: {target} of {total} {what} would be removed, and at most {num_most} may: {num_most / total:g}"
        )
    left, smallest = target, min(sizes, default=0)
    taken: list[list[int]] = [[] for _ in orders]
    for rank in np.argsort(np.concatenate([order.scores for order in orders]), kind="stable").tolist():
        number, step = steps[rank]
        if left < smallest:
            break
        if sizes[number] <= left:  # a smaller step that comes later may still fit
            taken[number].append(step)
            left -= sizes[number]
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
    removed: dict[str, list[int]] = {}
    for name, ratio in ratios.items():
        kind, per = RATIOS[name]
        if not ratio:
            continue
        layers = unprotected(of_kind(units, kind), protected)
        if not layers:
            why = "all are in protected blocks" if of_kind(units, kind) else "the model has none that may be removed"
            raise ValueError(f"{name}={ratio:g}: {why}")
        ends = (amount.first, amount.last) if kind == "block" else (0, 0)
        take = partial(choose, scores=scores, min_units=amount.min_units, per=per, ends=ends, name=name)
        num_first = {layer: (first or {}).get(name, {}).get(layer, layers[layer].count(per)) for layer in layers}
        parts = {ratio: list(layers)}
        if name in amount.ratios:
            parts = _parts_left(layers, ratio, num_first, per, amount.ranking)
        chosen: dict[str, list[int]] = {}
        for part, names in parts.items():
            chosen |= take({layer: layers[layer] for layer in names}, ratio=part, ranking=amount.ranking)
        for coupled_layers in coupled_modules({layer: layers[layer] for layer in chosen}):
            layer = coupled_layers[0]
            count, num_kept = layers[layer].count(per), layers[layer].count(per) - len(chosen[layer])
            step = (steps or {}).get(layer, 1)
            num_rounded = _rounded(
                layers[layer], num_kept, num_first[layer], step, per, amount, at_most=name in amount.open_ratios
            )
            if num_rounded != num_kept:
                again = take({layer: layers[layer] for layer in coupled_layers}, ratio=(count - num_rounded) / count)
                chosen |= dict.fromkeys(coupled_layers, []) | again
        for layer, numbers in chosen.items():
            if numbers:
                removed[layer] = layers[layer].query_heads(numbers) if per == "kv_head" else numbers
    return removed


def _parts_left(
    layers: Mapping[str, Units], ratio: float, num_first: Mapping[str, int], per: Per, ranking: Ranking
) -> dict[float, list[str]]:
    """Groups layers by the part of what is left in them that goes, for a ratio of what there was at first."""
    parts: dict[float, list[str]] = {}
    for names in [list(layers)] if ranking == "global" else [[name] for name in layers]:
        first, now = sum(num_first[name] for name in names), sum(layers[name].count(per) for name in names)
        part = ratio if first == now else max(0.0, ratio * first - (first - now)) / now
        parts.setdefault(part, []).extend(names)
    return parts


def _rounded(units: Units, num_kept: int, num_first: int, step: int, per: Per, amount: Amount, at_most: bool) -> int:
    """Returns how many units stay in a layer that was to keep so many."""
    count, channels, length = units.count(per), units.kind in ("channel", "residual"), unit_length(units, per)
    if amount.round_to == "auto" and length and (channels or not at_most):
        grouped = per == "head" and units.count("kv_head") < count and not channels
        in_step = units.count("kv_head") if grouped else 1  # as many go of each KV head
        near = round_units(num_kept, num_first, count, amount.min_units, length, math.lcm(step, in_step), more=not at_most)
        if near is not None:
            return near
    multiple = math.lcm(1 if amount.round_to == "auto" else amount.round_to, step) if channels else 1
    return min(-(-num_kept // multiple) * multiple, count)


def unprotected(units: Mapping[str, Units], protected: Iterable[str]) -> dict[str, Units]:
    """Returns the places that may lose units: neither protected nor bound to one that is, as by a common position bias."""
    bound = {layer for layers in coupled_modules(units) if not set(layers).isdisjoint(protected) for layer in layers}
    return {name: layer for name, layer in units.items() if name not in bound}


def protected_modules(model: nn.Module, units: Mapping[str, Units], amount: Amount) -> frozenset[str]:
    """Returns the places in the first and last blocks of a stack."""
    stacks = find_blocks(model) if amount.first or amount.last else {}
    protected = set[str]()
    for name, layer in units.items():
        if layer.kind not in ("residual", "block") and (block := block_of(layer.name, stacks)) is not None:
            stack, number = block
            if not amount.first <= number < len(stacks[stack]) - amount.last:
                protected.add(name)
    return frozenset(protected)
