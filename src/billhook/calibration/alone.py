"""Tells that a model is refitted to one kind of text alone, or merged on its own, as it may then do worse on others."""

import logging
from collections.abc import Collection
from functools import cache

from torch import distributed, nn
from transformers import PreTrainedModel

from billhook.calibration.generated import NAME as GENERATED
from billhook.calibration.generated import writes

ADVICE = (
    "linears are refitted to one kind of text alone, as far as the batches say, so that the model may do worse on others: "
    'calibrate on bh.Calibration([..., "generated"]), which adds what the model itself writes'
)

OWN = (
    "KV heads are merged by what the model itself writes, and nothing else, which says too little of other text: "
    'show text of the kind that it is for, as by bh.Calibration(["train.txt", "generated"])'
)


def tell_alone(model: nn.Module, sources: Collection[str]) -> None:
    """Tells once, by the logger `billhook`, if a model that writes text is refitted to a single source of it, but its own.

    It is no warning, as nothing is wrong with one kind of text for a model that is to read no other.

    Args:
        model: The model.
        sources: The names of the sources of all batches, empty where batches name none.
    """
    if len(set(sources)) == 1 and GENERATED not in sources and isinstance(model, PreTrainedModel) and writes(model):
        tell_once(ADVICE)


def tell_own(sources: Collection[str]) -> None:
    """Tells once, by the logger `billhook`, if KV heads are merged on nothing but what the model writes.

    Args:
        sources: The names of the sources of all batches, empty where batches name none.
    """
    if set(sources) == {GENERATED}:
        tell_once(OWN)


def tell_once(what: str) -> None:
    """Tells something by the logger `billhook`, on the first rank, unless it has been told in this process."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0):
        _log(what)


@cache
def _log(what: str) -> None:
    logging.getLogger("billhook").warning(what)
