"""Which units go, by their scores: the lowest of each place or of all, as far as they may."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn

from billhook.structure.amount import RATIOS, Amount
from billhook.structure.channels import of_kind
from billhook.structure.head_choice import choose
from billhook.structure.layers import block_of, find_blocks
from billhook.structure.plan import coupled
from billhook.structure.units import Per, Units


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
