"""What the linears that read a plan's units become, when they are to make up for what goes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from billhook.importance.score import trial_of
from billhook.model.find import find_transformer
from billhook.model.surgery import values_kept
from billhook.pruning.plan import Plan, check_made_for
from billhook.repairs.repair import Repair, repaired
from billhook.running.batches import Run
from billhook.running.walk import Reduce
from billhook.units.channels import find_units
from billhook.units.units import Units

Weights = Mapping[str, tuple[Tensor, Tensor | None]]
"""By linear, its weight and bias, in its own dtype and layout."""
PARTS = ("weight", "bias")


def repair(plan: Plan, model: nn.Module, batches: Iterable[Any], how: Repair | None = None) -> Weights:
    """What the linears that read the heads and channels of a plan become when they make up for what goes; for `apply`.

    Each is refitted by least squares, one after the other, on what it is given when all before it have been cut and refitted.
    The model stays as it is.

    Args:
        plan: What goes, of the model as it is.
        model: A Hugging Face model, or a module that holds one.
        batches: Two at least, as dictionaries of what the model's forward takes; a few times as many tokens as a feed-forward
            has channels. Padding (by `attention_mask`) does not count.
        how: `Repair()` by default.

    Raises:
        ValueError: If the plan is not of this model, no linear reads what goes, or there are too few batches or tokens.
    """
    subject = find_transformer(model)
    found = find_units(subject, dict.fromkeys(plan.kinds.values()))
    check_made_for(plan.model, plan.before, subject, found)
    return repair_of(plan, subject, found, [trial_of(subject, found, batch, _forward) for batch in batches], how)


def _forward(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
    given: Any = model(**batch) if isinstance(batch, Mapping) else model(batch)
    return torch.as_tensor(float(given is None))


def repair_of(
    plan: Plan,
    model: nn.Module,
    found: Mapping[str, Units],
    trials: Sequence[Run],
    how: Repair | None = None,
    reduce: Reduce | None = None,
) -> Weights:
    """The linears that read heads and channels of which some go, refitted; under adapters, the layers that these are added to.

    Args:
        plan: What goes.
        model: The model, which stays as it is.
        found: Its units.
        trials: The batches.
        how: How; `Repair()` by default.
        reduce: Sums over ranks.

    Raises:
        ValueError: If no linear reads them, or as `repaired`.
    """
    kept: dict[str, Tensor] = {}
    for place, numbers in plan.units.items():
        one = found[place]
        for reader in one.readers if one.kind in ("head", "channel") else ():
            stays = torch.from_numpy(~np.isin(one.index, numbers))
            kept[reader] = kept[reader] & stays if reader in kept else stays
    if not kept:
        raise ValueError("repair: no linear layer reads what goes, so none can make up for it")
    under = {reader: _linear(model, reader) for reader in kept}
    own = [replace(one, tokens={under.get(reader, reader): mask for reader, mask in one.tokens.items()}) for one in trials]
    return repaired(model, {under[reader]: stays for reader, stays in kept.items()}, own, how, reduce)


def _linear(model: nn.Module, reader: str) -> str:
    return f"{reader}.base_layer" if isinstance(model.get_submodule(reader), BaseTunerLayer) else reader


@contextmanager
def taken_over(model: nn.Module, weights: Weights | None) -> Iterator[None]:
    """Gives linears other weights, in place; their own come back if what happens within fails."""
    places = [(model.get_submodule(name), own) for name, own in (weights or {}).items()]
    parts = [(linear._parameters[part], value) for linear, own in places for part, value in zip(PARTS, own, strict=True)]
    pairs = [(parameter, value) for parameter, value in parts if parameter is not None and value is not None]
    with values_kept(parameter for parameter, _ in pairs):
        for parameter, value in pairs:
            parameter.data.copy_(value)
        yield
