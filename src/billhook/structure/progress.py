"""How much of an amount is due, as it goes in parts: always of what there was at first, so that parts do not compound."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from billhook.structure.amount import RATIOS, Amount
from billhook.structure.channels import find_units, of_kind
from billhook.structure.figures import figures_of
from billhook.structure.unit_choice import free, protected_places


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
        return cls(_counts(model, amount), figure)

    def part(self, model: PreTrainedModel, amount: Amount, progress: float) -> Amount | None:
        """What is due of an amount, in terms of the model as it is; None if nothing is.

        Args:
            model: The model, of which some may have gone already.
            amount: The whole amount.
            progress: How much of it is due, in 0..1.
        """
        now, changes = _counts(model, amount), dict[str, Any]()
        for name, ratio in amount.ratios.items():
            first, left = sum(self.counts[name].values()), sum(now[name].values())
            due = max(0.0, progress * ratio * first - (first - left)) / left
            changes[name] = due if due * max(now[name].values(), default=0) > 1 - 1e-9 or amount.ranking == "global" else 0.0
        if amount.target is not None and self.figure is not None:
            asked = getattr(amount, amount.target)
            goal = int(asked * self.figure) if isinstance(asked, float) else int(asked)
            limit = goal if progress >= 1 else int(self.figure - progress * (self.figure - goal))
            if limit >= getattr(figures_of(model), amount.target):
                return None
            changes[amount.target] = limit
        elif not any(changes.values()):
            return None
        return replace(amount, **changes)


def _counts(model: PreTrainedModel, amount: Amount) -> dict[str, dict[str, int]]:
    units = find_units(model, dict.fromkeys(kind for kind, _ in amount.asked.values()))
    protected, found = protected_places(model, units, amount), dict[str, dict[str, int]]()
    for name in amount.ratios:
        kind, per = RATIOS[name]
        found[name] = {place: one.count(per) for place, one in free(of_kind(units, kind), protected).items()}
    return found


def first_from(plain: Mapping[str, Any] | None) -> First | None:
    """What was saved of it."""
    return None if plain is None else First(plain["counts"], plain["figure"])
