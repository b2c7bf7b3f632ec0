"""How far the outputs of a changed model are from its own: the divergence of its predictions, or the distance of its stream."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from billhook.engine.trees import tree_leaves
from billhook.linalg import in_float64

ROWS = 256
"""How many predictions are compared at a time, as float64 takes memory."""


def distance_between(expected: Any, found: Any, tokens: Tensor | None = None) -> float:  # noqa: ANN401 - whatever a model returns
    """Returns the mean Kullback-Leibler divergence of logits, KL(expected || found); without any, a relative mean square.

    Args:
        expected: What the model returns as it is.
        found: What it returns with other weights.
        tokens: Which tokens count, bool, `[batch, length]`; it is for outputs of that shape.
    """
    logits = getattr(expected, "logits", None)
    a, b = ((one.logits if isinstance(logits, Tensor) else _states(one)).detach() for one in (expected, found))
    if tokens is not None and tokens.shape == a.shape[:2]:
        a, b = a[tokens], b[tokens]
    if isinstance(logits, Tensor) and a.dim() > 1 and a.shape[-1] > 1:
        a, b = a.flatten(0, -2), b.flatten(0, -2)
        return sum(_divergences(a, b)) / len(a)
    a, b = in_float64(a), in_float64(b)
    return float((a - b).square().mean() / a.square().mean().clamp_min(torch.finfo(torch.double).tiny))


def _divergences(expected: Tensor, found: Tensor) -> Iterator[float]:
    for first in range(0, len(expected), ROWS):
        p, q = (log_softmax(in_float64(one[first : first + ROWS]), -1) for one in (expected, found))
        yield float(torch.where(p.isneginf(), 0, p.exp() * (p - q)).sum())


def _states(output: Any) -> Tensor:  # noqa: ANN401
    """Returns the first of what a model returns that is of states, or else of numbers: a loss comes before them."""
    numbers = [one for one in tree_leaves(output) if isinstance(one, Tensor) and one.is_floating_point()]
    if not numbers:
        raise ValueError(f"batches: the model returns a {type(output).__name__}, which holds no numbers to compare")
    return next((one for one in numbers if one.dim() > 1), numbers[0])
