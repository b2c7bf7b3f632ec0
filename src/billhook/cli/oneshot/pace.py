"""Says beforehand how long a model takes for the examples that it is shown, and for those that it is measured on."""

import time

import torch
from transformers import PreTrainedModel

from billhook.bar import lasting
from billhook.engine.state import resting
from billhook.model.inputs import small_inputs

FEW = 8
"""Tokens of a first example, which also pays for what is done but once."""
SOON = 120.0
"""Seconds from which on it is said how long all examples take."""


def how_long(model: PreTrainedModel, length: int, shown: int, measured: int) -> list[str]:
    """Times a forward of one example, and says how long all take; nothing where that is soon.

    Args:
        model: The model, on the device where it will compute.
        length: Tokens of an example.
        shown: Examples that it is shown, each time.
        measured: Examples that it is measured on, before and after.
    """
    forward(model, FEW)
    each = forward(model, length)
    said = {
        f"{lasting(each * shown)} each time that {shown} examples are shown, thrice that with gradients": each * shown,
        f"{lasting(2 * each * measured)} to measure on {measured} twice": 2 * each * measured,
    }
    if sum(said.values()) < SOON:
        return []
    times = ", ".join(words for words, seconds in said.items() if seconds)
    return [f"an example takes {each:.2g} s here: {times}"]


@torch.no_grad()
def forward(model: PreTrainedModel, length: int) -> float:
    """Runs a model on an example of random tokens, and returns the seconds that it took."""
    inputs = small_inputs(model, 1, length)
    with resting(model):
        start = time.monotonic()
        given = model(**inputs, return_dict=True)
        float(given[0].sum())  # waits for a device
        return time.monotonic() - start
