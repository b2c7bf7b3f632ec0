"""Chooses the units with the lowest importance scores, within each layer or globally."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from billhook.arguments import check_fraction, check_int, check_one_of, check_types
from billhook.linalg import Indices, TensorsByName
from billhook.pruning.amount import Amount, Ranking
from billhook.pruning.cut import coupled_modules
from billhook.units import Per, UnitNumbers, Units, UnitsByModule, block_of, find_blocks, plural


@dataclass(frozen=True)
class _Order:
    """Units of modules that lose the same units, in order of removal.

    Attributes:
        layers: Names of the modules.
        units: Units of each step: int64, `[steps, units]`.
        scores: Score of each step: float64, ascending.
    """

    layers: Sequence[str]
    units: Indices
    scores: np.ndarray


@dataclass(frozen=True)
class HeadOptions:
    """Options for comparing attention heads and for how many remain.

    Args:
        ranking: `"layer"` removes the same number from every layer; `"global"` the lowest of all, as in Michel et al. (2019).
        per: Unit to prune: query heads (`"head"`), or KV heads together with their query heads (`"kv_head"`).
        min_heads: Fewest heads that remain in each layer. 0 is legal only if heads are masked and never removed.
        normalize: If True, divides the scores of each layer by their L2 norm, as in the paper.

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


def check_choice(ratio: float, ranking: str, min_units: int, per: str, what: str = "units") -> None:
    """Raises for arguments that are illegal for every model; messages name the units."""
    check_fraction("ratio", ratio, of=f"the {what}")
    check_one_of("ranking", ranking, Ranking)
    check_int(f"min_{what}", min_units, 0)
    check_one_of("per", per, Per)


def choose_including(
    choose_by: Callable[[TensorsByName], UnitNumbers],
    earlier: UnitNumbers,
    scores: TensorsByName,
) -> UnitNumbers:
    """Chooses units by their scores, including all that were chosen before."""
    lowest = {name: values.clone() for name, values in scores.items()}
    for name, chosen in earlier.items():
        lowest[name][list(chosen)] = -torch.inf
    return choose_by(lowest)


def choose(
    units: UnitsByModule,
    scores: TensorsByName,
    ratio: float,
    ranking: Ranking = "layer",
    min_units: int = 1,
    per: Per = "head",
    remove: bool = True,
    ends: tuple[int, int] = (0, 0),
    name: str = "ratio",
) -> UnitNumbers:
    """Chooses the units with the lowest scores, of a single kind.

    Returns ascending unit numbers by module, without modules that lose none.

    Args:
        units: Units by module.
        scores: One score per unit, by module. For attention, per query head or KV head, as `per` says.
        ratio: Fraction of the units in [0, 1), rounded down. For blocks, also the number per stack (int).
        ranking: `"layer"` takes the same number from every module; `"global"` the lowest of all modules.
        min_units: Fewest units that remain in each module.
        per: Whether scores and chosen heads are query heads or KV heads.
        remove: If True, the units can be removed and not only masked: all KV heads keep the same number of query heads, and
            layers that share a position bias lose the same heads.
        ends: Numbers of units to protect at the start and end of each module.
        name: Name of `ratio` in messages.

    Raises:
        ValueError: If a score is missing or NaN, or a module would keep fewer than `min_units`. The message names the legal
            ratio.
    """
    what = plural(map(attrgetter("kind"), units.values()))
    check_choice(0 if what == "blocks" and type(ratio) is int else ratio, ranking, min_units, per)
    if remove and min_units < 1:
        raise ValueError(f"min_units={min_units} must be at least 1 if units are removed. Keep one unit per module.")
    for layer, of_layer in units.items():
        count = of_layer.count(per)
        if layer not in scores or len(scores[layer]) != count:
            raise ValueError(f"scores: {layer} needs one score for each of its {count} {what} (per={per!r})")
        if scores[layer].isnan().any():
            raise ValueError(f"scores: {layer} has a score that is NaN")
    competitions = list[list[_Order]]()  # units are ranked within each of these
    for layers in coupled_modules(units) if remove else zip(units, strict=True):
        first, score = units[layers[0]], torch.stack([scores[layer].detach().cpu().double() for layer in layers]).mean(0)
        values, count = score.numpy(), first.count(per)
        if remove and per == "head" and first.count("kv_head") < count:
            # steps of the next lowest query head of every KV head, with their mean scores
            sorted_queries = []
            for kv_head in range(first.count("kv_head")):
                queries = np.flatnonzero(first.kv_of == kv_head)
                sorted_queries.append(queries[np.argsort(values[queries], kind="stable")])
            if len(set(map(len, sorted_queries))) > 1:
                raise ValueError(
                    f"per='head' is not supported: the KV heads of {layers[0]} have different numbers of query heads. Use "
                    "per='kv_head'."
                )
            steps = np.sort(np.stack(sorted_queries, axis=1), axis=1)
            # fmean rounds once, so that a step's mean does not depend on the order of its heads
            means = np.array([fmean(step) for step in values[steps].tolist()])
        else:
            steps = np.array(rank_units(first, score, ends), dtype=np.int64)[:, None]
            means = values[steps[:, 0]]
        in_step = steps.shape[1]
        most = max(count // in_step - -(-min_units // in_step), 0)
        if ranking == "layer" or not competitions:
            competitions.append([])
        competitions[-1].append(_Order(layers, steps[:most], means[:most]))
    removed: UnitNumbers = {}
    for orders in competitions:
        total = sum(units[layer].count(per) for order in orders for layer in order.layers)
        where = (orders[0].layers[0] or "the model") if ranking == "layer" else "all layers"
        for order, numbers in zip(orders, _lowest_steps(orders, ratio, total, f"{what} of {where}", name), strict=True):
            removed |= dict.fromkeys(order.layers, np.sort(order.units[numbers].flatten()).tolist())
    return {layer: list(removed[layer]) for layer in units if removed.get(layer)}


def rank_units(units: Units, scores: Tensor, ends: tuple[int, int] = (0, 0)) -> list[int]:
    """Orders units by finite score; of equal ones the first leads, or of blocks the last."""
    values, count = scores.detach().cpu().double().numpy(), len(scores)
    order = count - 1 - np.argsort(values[::-1], kind="stable") if units.kind == "block" else np.argsort(values, kind="stable")
    return [unit for unit in order.tolist() if ends[0] <= unit < count - ends[1] and values[unit] < np.inf]


def _lowest_steps(orders: Sequence[_Order], ratio: float, total: int, what: str, name: str) -> list[list[int]]:
    """Returns the steps of each order with the lowest scores that fit the ratio."""
    steps, sizes, scores = [], [], []
    num_most = 0
    for number, order in enumerate(orders):
        steps += [(number, step) for step in range(len(order.units))]
        sizes.append(order.units.shape[1] * len(order.layers))
        scores.append(order.scores)
        num_most += sizes[number] * len(order.units)
    target = ratio if type(ratio) is int else int(ratio * total + 1e-9)  # 0.3 of 10 is 3, though floats may say 2.9999
    if target > num_most:
        raise ValueError(
            f"{name}={ratio} would remove {target} of {total} {what}. At most {num_most} can be removed: "
            f"{name}={num_most if type(ratio) is int else f'{num_most / total:g}'}."
        )
    left, smallest = target, min(sizes, default=0)
    chosen: list[list[int]] = [[] for _ in orders]
    for rank in np.argsort(np.concatenate(scores), kind="stable").tolist():
        number, step = steps[rank]
        if left < smallest:
            break
        if sizes[number] <= left:  # a smaller step that comes later may still fit
            chosen[number].append(step)
            left -= sizes[number]
    return chosen


def protected_modules(model: nn.Module, units: UnitsByModule, amount: Amount) -> frozenset[str]:
    """Returns the modules in the first and last blocks of each stack."""
    stacks = find_blocks(model) if amount.first or amount.last else {}
    protected = set()
    for name, layer in units.items():
        if layer.kind not in ("residual", "block") and (block := block_of(layer.name, stacks)) is not None:
            stack, number = block
            if not amount.first <= number < len(stacks[stack]) - amount.last:
                protected.add(name)
    return frozenset(protected)
