"""Runs a model on several inputs; one that is streamed on all of them side by side, so that each block is read once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

from torch import Tensor, nn

from billhook.running.offload import Shelf
from billhook.running.walk import Site, Walk
from billhook.streaming.stream import Stream, stream_of


class Nothing:
    """A visitor that finds nothing to do."""

    def observe(self, name: str, linear: nn.Module, inputs: Tensor, run: int) -> None:
        """Observes nothing."""

    def complete(self, site: Site) -> None:
        """Completes nothing."""

    def parameters(self, site: Site) -> dict[str, dict[str, Tensor]]:
        """Returns no new parameters."""
        return {}


@contextmanager
def shelf(stream: Stream) -> Iterator[Callable[[object], None] | None]:
    """Yields what has the values that blocks hand on rest in the files of a stream's folder; None where they rest in memory."""
    if stream.rests is None:
        yield None
        return
    with closing(Shelf(stream.rests)) as files:
        yield files.keep


class Together:
    """Runs a model on several inputs; one that is streamed on all side by side, so that each block is read once.

    Args:
        model: The model.
        leave: Called with each block of a model that is streamed, when all runs have passed it.
    """

    def __init__(self, model: nn.Module, leave: Callable[[nn.Module], None] | None = None) -> None:
        self._stream = stream_of(model)
        self._sites = [] if self._stream is None else [Site(block, {}) for block in self._stream.blocks.values()]
        self._leave = None if leave is None else lambda site: leave(site.module)
        self._walk: Walk | None = None
        self._number = 0

    @property
    def now(self) -> int:
        """The number of the run that is going on."""
        return self._number if self._walk is None else self._walk.run

    def __call__(self, forwards: Sequence[Callable[[], object]]) -> None:
        """Calls functions that each run the model once, without gradients; they end one after the other."""
        if self._stream is not None:
            with shelf(self._stream) as keep:
                self._walk = Walk(self._sites, Nothing(), keep=keep, ends=len(forwards), leave=self._leave)
                self._walk(forwards)
            return
        for self._number, forward in enumerate(forwards):
            forward()


def together(model: nn.Module, forwards: Sequence[Callable[[], object]]) -> None:
    """Calls functions that each run a model once, as `Together` does."""
    Together(model)(forwards)
