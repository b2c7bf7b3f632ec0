"""How much of an amount is due, as it goes in parts: always of what there was at first, so that parts do not compound."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.model.figures import figures_of
from billhook.pruning.amount import RATIOS, Amount
from billhook.pruning.choice import choose_units, free, protected_places
from billhook.units.channels import find_units, of_kind
from billhook.units.units import Per, Units


@dataclass(frozen=True)
class First:
    """What a model was before any of an amount had gone.

    Attributes:
        counts: By ratio and place, how many units there were of those that may go.
        figure: What the target counts, if there is one.
    """

    counts: dict[str, dict[str, int]]
    figure: int | None

    @classmethod
    def of(cls, model: PreTrainedModel, amount: Amount) -> "First":
        """What a model is now."""
        figure = getattr(figures_of(model), amount.target) if amount.target else None
        units = _units(model, amount)
        return cls(_counts(units, amount, protected_places(model, units, amount)), figure)

    def part(self, model: PreTrainedModel, amount: Amount, progress: float) -> Amount | None:
        """What is due of an amount, in terms of the model as it is; None if nothing is.

        Args:
            model: The model, of which some may have gone already.
            amount: The whole amount.
            progress: How much of it is due, in 0..1.

        Returns:
            What is due in ratios of what is left. Parts add up to the whole where the places of a kind have as many units each;
            else a place may have lost one more or less.
        """
        units = _units(model, amount)
        protected, changes = protected_places(model, units, amount), dict[str, Any]()
        now = _counts(units, amount, protected)
        for name, ratio in amount.ratios.items():
            first, left = sum(self.counts[name].values()), sum(now[name].values())
            changes[name] = max(0.0, progress * ratio * first - (first - left)) / left
        if amount.target is not None and self.figure is not None:
            asked = getattr(amount, amount.target)
            goal = int(asked * self.figure) if isinstance(asked, float) else int(asked)
            limit = goal if progress >= 1 else int(self.figure - progress * (self.figure - goal))
            if limit >= getattr(figures_of(model), amount.target):
                return None
            changes[amount.target] = limit
        elif not any(changes.values()):
            return None
        due = replace(amount, **changes)
        per: Per = "head" if "heads" in amount.asked else "kv_head"
        flat = {name: torch.zeros(one.count(per)) for name, one in units.items()}
        return due if amount.target is not None or choose_units(units, flat, due, due.ratios, protected) else None


def _units(model: PreTrainedModel, amount: Amount) -> dict[str, Units]:
    return find_units(model, dict.fromkeys(kind for kind, _ in amount.asked.values()))


def _counts(units: Mapping[str, Units], amount: Amount, protected: frozenset[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name in amount.ratios:
        kind, per = RATIOS[name]
        found[name] = {place: one.count(per) for place, one in free(of_kind(units, kind), protected).items()}
    return found


def first_from(plain: Mapping[str, Any] | None) -> First | None:
    """What was saved of it."""
    return None if plain is None else First(plain["counts"], plain["figure"])
