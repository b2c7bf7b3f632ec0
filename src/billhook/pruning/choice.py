"""Which heads go: those of the lowest importance, per layer or over all layers, as far as they may."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from billhook.model.find import find_transformer
from billhook.pruning.amount import RATIOS, Amount, Ranking
from billhook.pruning.plan import PLURAL, coupled
from billhook.units.blocks import block_of, find_blocks
from billhook.units.channels import of_kind
from billhook.units.heads import find_heads
from billhook.units.units import Per, Units


@dataclass(frozen=True)
class _Step:
    """Heads that go at once.

    Attributes:
        score: Of all of them together.
        heads: Which, by attention.
        size: How many these are.
    """

    score: float
    heads: dict[str, list[int]]
    size: int


def choose_heads(
    model: nn.Module,
    importance: Mapping[str, Tensor],
    ratio: float,
    ranking: Ranking = "layer",
    min_heads: int = 1,
    per: Per = "head",
    remove: bool = True,
) -> dict[str, list[int]]:
    """The least important heads of a model, for `mask_heads` or `prune_heads`.

    Args:
        model: A Hugging Face model, or a module that holds one.
        importance: What `head_importance` has found, with the same `per`.
        ratio: Fraction of the heads that go, in [0, 1), rounded down.
        ranking: `"layer"`: as many in each layer, so that layers stay alike; `"global"`: the lowest of all layers, as the paper
            does.
        min_heads: How many stay in each layer, at least.
        per: Whether heads are query heads, or KV heads with the query heads that they serve.
        remove: Whether they can be removed, not only masked: then all KV heads keep as many query heads, and layers that share a
            position bias lose the same heads.

    Returns:
        By attention, the heads that go, ascending; attentions that lose none are left out.

    Raises:
        ValueError: If an argument is not legal, or the ratio would leave a layer fewer than `min_heads`: then with what is legal.
    """
    return choose(find_heads(find_transformer(model)), importance, ratio, ranking, min_heads, per, remove)


def check_choice(ratio: float, ranking: str, min_heads: int, per: str) -> None:
    """Refuses what no model could do.

    Raises:
        ValueError: With what is legal.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio!r} must be a fraction of the heads in [0, 1)")
    if ranking not in get_args(Ranking):
        raise ValueError(f"ranking={ranking!r} must be one of {', '.join(get_args(Ranking))}")
    if type(min_heads) is not int or min_heads < 0:
        raise ValueError(f"min_heads={min_heads!r} must be a whole number, 0 at least")
    if per not in get_args(Per):
        raise ValueError(f"per={per!r} must be one of {', '.join(get_args(Per))}")


def choose(
    heads: Mapping[str, Units],
    importance: Mapping[str, Tensor],
    ratio: float,
    ranking: Ranking = "layer",
    min_heads: int = 1,
    per: Per = "head",
    remove: bool = True,
) -> dict[str, list[int]]:
    """What `choose_heads` does, of heads that have been found.

    Raises:
        ValueError: As `choose_heads`.
    """
    check_choice(ratio, ranking, min_heads, per)
    if remove and min_heads < 1:
        raise ValueError(f"min_heads={min_heads}: where heads are removed, one at least stays in each layer")
    what = PLURAL[next((one.kind for one in heads.values()), "head")]
    for name, one in heads.items():
        if name not in importance or len(importance[name]) != one.count(per):
            raise ValueError(f"importance: a score for each of the {one.count(per)} {what} of {name} is needed (per={per!r})")
        if importance[name].isnan().any():
            raise ValueError(f"importance: a score of {name} is NaN")
    sets = coupled(heads) if remove else [[name] for name in heads]
    steps = [_steps(heads, own, importance, per, remove, min_heads) for own in sets]
    totals = [sum(heads[name].count(per) for name in own) for own in sets]
    if ranking == "layer":
        taken = [_take(one, ratio, total, own[0], what) for one, total, own in zip(steps, totals, sets, strict=True)]
        flat = [step for own in taken for step in own]
    else:
        every = sorted((step for own in steps for step in own), key=lambda step: step.score)
        flat = _take(every, ratio, sum(totals), "all layers", what)
    gone: dict[str, list[int]] = {}
    for step in flat:
        for name, numbers in step.heads.items():
            gone.setdefault(name, []).extend(numbers)
    return {name: sorted(gone[name]) for name in heads if name in gone}


def _steps(
    heads: Mapping[str, Units], own: Sequence[str], importance: Mapping[str, Tensor], per: Per, remove: bool, min_heads: int
) -> list[_Step]:
    """What may go one after the other, the least important first, in attentions that lose heads together."""
    score = torch.stack([importance[name].detach().double().cpu() for name in own]).mean(0)
    one = heads[own[0]]
    size = one.count(per)
    if remove and per == "head" and one.count("kv_head") < size:  # the lowest of each KV head, then the next of each
        rows = [np.flatnonzero(one.kv_of == kv) for kv in range(one.count("kv_head"))]
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"per='head': the KV heads of {own[0]} serve different numbers of query heads; per='kv_head' works")
        ranked = [row[np.argsort(score.numpy()[row], kind="stable")] for row in rows]
        units = [sorted(int(row[j]) for row in ranked) for j in range(len(ranked[0]))]
    else:
        units = [[int(head)] for head in np.argsort(score.numpy(), kind="stable")]
    stay = -(-min_heads // len(units[0]))
    values = score.tolist()
    steps = [_Step(fmean(values[one] for one in unit), dict.fromkeys(own, unit), len(unit) * len(own)) for unit in units]
    return steps[: max(len(steps) - stay, 0)]


def _take(steps: Sequence[_Step], ratio: float, total: int, where: str, what: str) -> list[_Step]:
    """The first steps that come to at most this part of the units."""
    target, taken, size = int(ratio * total + 1e-9), list[_Step](), 0
    most = sum(step.size for step in steps)
    if target > most:
        raise ValueError(
            f"ratio={ratio}: {target} of {total} {what} of {where} would go, and at most {most} may: {most / total:g}"
        )
    for step in steps:
        if size + step.size <= target:
            taken.append(step)
            size += step.size
    return taken


def choose_units(
    units: Mapping[str, Units],
    scores: Mapping[str, Tensor],
    amount: Amount,
    ratios: Mapping[str, float],
    protected: frozenset[str] = frozenset(),
) -> dict[str, list[int]]:
    """The units of the lowest scores.

    Args:
        units: The units of a model, by place.
        scores: By place, one for each unit; of attentions, one for each head or KV head, as the ratio is of one or the other.
        amount: How they are compared and rounded.
        ratios: How much of each kind, by the names that they have in `Amount`.
        protected: Places that keep all of theirs.

    Returns:
        By place, the units that go, ascending; of attentions, query heads. Places that lose none are left out.

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
            why = "all are in protected blocks" if of_kind(units, kind) else "the model has none that may go"
            raise ValueError(f"{name}={ratio:g}: {why}")
        chosen = choose(own, scores, ratio, amount.ranking, amount.min_units, per)
        for place, numbers in chosen.items():
            kept = _rounded(own[place], scores[place], numbers, amount.round_to)
            gone |= {place: query_heads(own[place], kept, per)} if kept else {}
    return gone


def free(units: Mapping[str, Units], protected: frozenset[str]) -> dict[str, Units]:
    """The places that may lose units: neither protected nor bound to one that is, as by a position bias that both have."""
    bound = {place for own in coupled(units) if protected & set(own) for place in own}
    return {place: one for place, one in units.items() if place not in bound}


def query_heads(units: Units, numbers: list[int], per: Per) -> list[int]:
    """The query heads that go with KV heads; other units as they are."""
    return np.flatnonzero(np.isin(units.kv_of, numbers)).tolist() if per == "kv_head" else numbers


def _rounded(units: Units, scores: Tensor, gone: list[int], multiple: int) -> list[int]:
    """Of the channels that go, as many fewer as leaves a multiple: those of the highest scores stay."""
    if units.kind not in ("channel", "residual") or multiple == 1:
        return gone
    stay = -(-(units.count() - len(gone)) // multiple) * multiple
    ranked = sorted(gone, key=lambda unit: float(scores[unit]))
    return sorted(ranked[: max(units.count() - stay, 0)])


def most(units: Mapping[str, Units], name: str, amount: Amount, protected: frozenset[str]) -> float:
    """The highest ratio of a kind that leaves `min_units` everywhere; 0 where none may go."""
    kind, per = RATIOS[name]
    own = free(of_kind(units, kind), protected)
    counts = [one.count(per) for one in own.values()]
    return min((max(count - amount.min_units, 0) / count for count in counts), default=0.0)


def protected_places(model: nn.Module, units: Mapping[str, Units], amount: Amount) -> frozenset[str]:
    """The places in the first and last blocks of a stack."""
    if not amount.first and not amount.last:
        return frozenset()
    stacks = find_blocks(model)
    found = set[str]()
    for name, one in units.items():
        where = block_of(one.name, stacks)
        if one.kind != "residual" and where is not None:
            stack, place = where
            if place < amount.first or place >= len(stacks[stack]) - amount.last:
                found.add(name)
    return frozenset(found)
