"""Compares a model that is rebuilt from a Lightning checkpoint with the one that was trained."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.checkpoints.verify import Probe, logits_of, make_probe
from billhook.model.constants import Difference, Number, Record, differences


def check_trained(model: PreTrainedModel, record: Record, name: str) -> None:
    """Refuses a rebuilt model that computes by other constants than are recorded of the one that was trained.

    They may differ where they change nothing of what the model computes of a probe, as rates of dropout and a size of the
    vocabulary from before it grew. To find out, yet another value is tried; what the file says is only compared.
    """
    found = sorted(differences(model, record), key=lambda one: one.constant.attr)
    if not found:
        return
    probe = make_probe(model)
    expected = logits_of(model, probe)
    for _, alike in groupby(found, key=lambda one: one.constant.attr):
        if _counts(model, own := list(alike), probe, expected):
            first = own[0]
            raise ValueError(
                f"'{name}' holds no {type(model).__name__} that computes what the trained one did: "
                f"{first.constant.name.removeprefix('.')} was {_shown(first.recorded)} in training, and its class makes "
                f"{_shown(first.now)} of the config in the checkpoint"
            )


def _shown(value: Number) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _counts(model: PreTrainedModel, found: Sequence[Difference], probe: Probe, expected: Tensor) -> bool:
    """Tells whether other constants than the model's give other logits, or no logits."""
    with _others(found):
        try:
            logits = logits_of(model, probe)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a model raises
            return True
    return not torch.equal(logits.nan_to_num(), expected.nan_to_num())


@contextmanager
def _others(found: Sequence[Difference]) -> Iterator[None]:
    """Gives a model other constants for a while."""
    before = [(one.constant.holder, one.constant.attr, one.constant.value) for one in found]
    try:
        for holder, attr, value in before:
            holder[attr] = _other(value)
        yield
    finally:
        for holder, attr, value in before:
            holder[attr] = value


def _other(value: Any) -> Any:  # noqa: ANN401 - a number or a tensor
    """Makes a number that is as legal: a probability stays one, and a place in a table is one in the table."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            return torch.where(value == 0, 0.5, value / 2).to(value.dtype)
        return ~value if value.dtype == torch.bool else torch.where(value > 0, value - 1, value + 1)
    if value is None or isinstance(value, bool):
        return 1 if value is None else not value
    if isinstance(value, int):
        return value - 1 if value > 0 else value + 1
    return value + 0.5 if 0 <= value <= 0.5 else value / 2 if math.isfinite(value) else 1.0
