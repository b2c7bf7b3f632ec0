"""Runs a model on several inputs; one that is streamed on all of them side by side, so that each block is read once."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from billhook.running.walk import Site, Walk
from billhook.streaming.stream import stream_of


class Nothing:
    """A visitor that finds nothing to do."""

    def observe(self, name: str, inputs: Tensor, run: int) -> None:
        """Observes nothing."""

    def complete(self, site: Site) -> None:
        """Completes nothing."""

    def parameters(self, site: Site) -> dict[str, dict[str, Tensor]]:
        """Returns no new parameters."""
        return {}


def together(model: nn.Module, forwards: Sequence[Callable[[], object]]) -> None:
    """Calls functions that each run a model once, without gradients.

    Of a model that is streamed all runs go on to a block before one leaves it, and end one after the other.
    """
    stream = stream_of(model)
    sites = [] if stream is None else [Site(block, {}) for block in stream.blocks.values()]
    if sites:
        Walk(sites, Nothing(), ends=len(forwards))(forwards)
        return
    for forward in forwards:
        forward()
