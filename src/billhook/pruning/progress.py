"""Divides an amount into parts: always of what there was at first, so that parts do not compound."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.model.figures import figure_of
from billhook.pruning.amount import Amount
from billhook.pruning.choice import choose_units, free, protected_places
from billhook.tracing.trace import trace
from billhook.units.find import of_kind, units_of
from billhook.units.units import Units


@dataclass(frozen=True)
class First:
    """A model before any part of an amount was removed.

    Attributes:
        counts: By the name of a ratio, and by place, how many units there were that may be removed.
        figure: What there was of what the target limits.
    """

    counts: dict[str, dict[str, int]]
    figure: int | None

    @classmethod
    def of(cls, model: PreTrainedModel, amount: Amount, units: Mapping[str, Units] | None = None) -> "First":
        """Notes a model as it is now; its units of the amount's kinds, if they are known, are not looked for again."""
        figure = figure_of(model, amount.target) if amount.target else None
        units = units or _units(model, amount)
        return cls(_counts(units, amount, protected_places(model, units, amount)), figure)

    def part(
        self, model: PreTrainedModel, amount: Amount, progress: float, units: Mapping[str, Units] | None = None
    ) -> Amount | None:
        """Returns what of an amount is to be gone at a progress in 0..1, in ratios of what there was at first; None if it is.

        Its plan takes `counts`, by which each part is also rounded, so that parts add up to what the whole would be at once. The
        model's units of the amount's kinds, if they are known, are not looked for again.
        """
        units = units or _units(model, amount)
        protected = protected_places(model, units, amount)
        changes: dict[str, Any] = {name: progress * ratio for name, ratio in amount.ratios.items()}
        if amount.target is not None and self.figure is not None:
            asked = getattr(amount, amount.target)
            goal = int(asked * self.figure) if isinstance(asked, float) else int(asked)
            limit = goal if progress >= 1 else int(self.figure - progress * (self.figure - goal))
            if limit >= (figure_of(model, amount.target) or 0):
                return None
            changes[amount.target] = limit
        elif not any(changes.values()):
            return None
        due = replace(amount, **changes)
        flat = {name: torch.zeros(one.count(amount.per)) for name, one in units.items()}
        some = amount.target is not None or choose_units(units, flat, due, due.ratios, protected, first=self.counts)
        return due if some else None


def _units(model: PreTrainedModel, amount: Amount) -> dict[str, Units]:
    return units_of(model, trace(model), amount.kinds)


def _counts(units: Mapping[str, Units], amount: Amount, protected: frozenset[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, (kind, per) in amount.asked.items():
        found[name] = {place: one.count(per) for place, one in free(of_kind(units, kind), protected).items()}
    return found


def first_from(plain: Mapping[str, Any] | None) -> First | None:
    """Makes it from its saved fields."""
    return None if plain is None else First(plain["counts"], plain["figure"])
