"""Tells that a model is refitted to one kind of text alone, as it may then do worse on others."""

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


def tell_alone(model: nn.Module, sources: Collection[str]) -> None:
    """Tells once, by the logger `billhook`, if a model that writes text is refitted to a single source of it, but its own.

    It is no warning, as nothing is wrong with one kind of text for a model that is to read no other.

    Args:
        model: The model.
        sources: The names of the sources of all batches, empty where batches name none.
    """
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
        return
    if len(set(sources)) == 1 and GENERATED not in sources and isinstance(model, PreTrainedModel) and writes(model):
        _tell(ADVICE)


@cache
def _tell(what: str) -> None:
    """Logs something unless it has been told in this process."""
    logging.getLogger("billhook").warning(what)
