"""Runs a model on several inputs; one whose blocks come and go on all of them side by side, so that each block comes once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

from torch import Tensor, nn

from billhook.running.offload import Shelf
from billhook.running.sharded.turns import Turns
from billhook.running.sites import Site
from billhook.running.walk import Reduce, Walk
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
def shelf(stream: Stream) -> Iterator[Shelf | None]:
    """Yields what keeps the values that blocks hand on in the files of a stream's folder; None where they rest in memory."""
    if stream.rests is None:
        yield None
        return
    with closing(Shelf(stream.rests)) as files:
        yield files


class Together:
    """Runs a model on several inputs; one that is streamed on all side by side, so that each block is read once.

    Args:
        model: The model.
        leave: Called with each block of a model whose blocks come and go, when all runs have passed it, on any rank.
        turns: What has blocks come that ranks share, and are called one after the other: all ranks then go side by side, too.
        reduce: Sums over ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        leave: Callable[[nn.Module], None] | None = None,
        turns: Turns | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        self._stream, self._turns, self._reduce = stream_of(model), turns, reduce
        coming = self._stream.blocks.values() if self._stream is not None else turns.blocks if turns is not None else ()
        self._sites = [Site(block, {}) for block in coming]
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
            with shelf(self._stream) as files:
                keep = None if files is None else files.keep
                self._walk = Walk(self._sites, Nothing(), keep=keep, ends=len(forwards), leave=self._leave)
                self._walk(forwards)
            return
        if self._turns is not None:
            ends, leave = len(forwards), self._leave
            self._walk = Walk(self._sites, Nothing(), self._reduce, ends=ends, leave=leave, around=self._there)
            self._walk(forwards)
            return
        for self._number, forward in enumerate(forwards):
            forward()

    @contextmanager
    def _there(self, block: nn.Module) -> Iterator[None]:
        """Has a block whole on all ranks, also those of which no run comes to it."""
        assert self._turns is not None
        self._turns.bring(block)
        yield


def together(model: nn.Module, forwards: Sequence[Callable[[], object]]) -> None:
    """Calls functions that each run a model once, as `Together` does."""
    Together(model)(forwards)
