"""Says how large a model is, what a smaller one has lost, and which commands may follow."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from billhook.checkpoints.equivalent import cache_as_saved
from billhook.model.linears import PRUNED
from billhook.report.damage import Dense, TextDamage, table
from billhook.report.generation import generates

Before = Dense | float | None
"""What is measured before a model is changed: predictions on texts, or an accuracy."""
Cost = list[TextDamage] | float | None
"""What is measured afterwards: the damage on texts, or an accuracy."""


def sizes_of(model: PreTrainedModel, zeros: int | None) -> dict[str, int | None]:
    """Returns the numbers of parameters and of those that are zero, and the bytes of the key/value cache per token."""
    return {"params": model.num_parameters(), "zeros": zeros, "kv_cache_bytes": cache_as_saved(model)}


def shown(before: Before, cost: Cost) -> str | None:
    """Shows what a model has lost."""
    if isinstance(cost, list):
        return table(cost)
    return None if cost is None else f"accuracy {before:,.4g} before, {cost:,.4g} after"


def commands(model: PreTrainedModel, name: str, out: str, event: Mapping[str, Any]) -> list[str]:
    """Returns commands that may follow, each with what it is for; training would undo zeros.

    Args:
        model: The smaller model.
        name: What it was made of.
        out: Where it is.
        event: What was done, with the numbers of parameters and zeros before and after.
    """
    if not generates(model):
        return [f"billhook summary {out}  # counts parameters and operations"]
    train = f"billhook fit --model.model {out} --model.lora '{{}}' --data.data FILE --trainer.max_steps 1000"
    export = f"--trainer.callbacks+=billhook.Export --trainer.callbacks.folder {out}-trained"
    sparse = event["after"]["zeros"] - event["before"]["zeros"] > PRUNED * event["after"]["params"]
    return [
        f"billhook evaluate {name} {out} --text FILE  # compares both on text of yours",
        *([] if sparse else [f"{train} {export}  # trains it on such text"]),
        f"billhook serve-check {out}  # asks whether llama.cpp computes the same",
    ]
