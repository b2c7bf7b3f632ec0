"""Gathers short calls of a linear until they are worth a product."""

import torch
from torch import Tensor

from billhook.engine.statistics import TOKENS
from billhook.repairs.moments import OwedMoments, flat


class Pool:
    """Holds tokens back that are added to moments, until there are as many as are multiplied at a time.

    However few they are, adding them goes over all sums, which takes longer than the product of a hundred tokens.
    """

    def __init__(self, moments: OwedMoments) -> None:
        self._moments, self._tokens = moments, 0
        self._inputs, self._owed, self._weights = list[Tensor](), list[Tensor](), list[Tensor]()

    def add(self, inputs: Tensor, owed: Tensor | None, tokens: Tensor | None, weights: Tensor | None) -> None:
        """Adds what a linear is given in one call, as `OwedMoments.add` does; copies stay, if any.

        Where only some tokens count, these are their numbers, of all that are in the call.
        """
        if bool(self._owed) != (owed is not None):
            self.empty()
        weights = torch.ones(inputs.shape[:-1], device=inputs.device) if weights is None else weights
        self._inputs.append(_taken(inputs, tokens))
        self._weights.append(_taken(weights[..., None], tokens).squeeze(-1))
        self._owed += [] if owed is None else [_taken(owed, tokens)]
        self._tokens += len(self._inputs[-1])
        if self._tokens >= TOKENS:
            self.empty()

    def empty(self) -> None:
        """Adds all that was held back."""
        if self._tokens:
            owed = torch.cat(self._owed) if self._owed else None
            self._moments.add(torch.cat(self._inputs), owed, weights=torch.cat(self._weights))
        self._inputs, self._owed, self._weights, self._tokens = [], [], [], 0


def _taken(tensor: Tensor, tokens: Tensor | None) -> Tensor:
    """Copies the tokens that count, `[tokens, ...]`."""
    every = flat(tensor, None)
    return every.clone() if tokens is None else every[tokens]
