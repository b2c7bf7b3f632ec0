"""Tells whether runs of a model need its blocks one after the other, so that all ranks can go through them side by side."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from billhook.running.sharded.turns import Turns


class Passing:
    """Holds what has been seen of a run: whether each block was called once at most, as a whole, and none within another.

    Args:
        model: The model; blocks that are not in it must not be called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.orderly = True
        self._inside, self._passed = set(model.modules()), set[nn.Module]()
        self._here: nn.Module | None = None

    def enter(self, block: nn.Module, part: nn.Module, *_: Any) -> None:  # noqa: ANN401 - whatever it takes
        """Marks a block, or a part of it, as called."""
        if part is not block:
            self.orderly &= self._here is block
            return
        self.orderly &= self._here is None and block in self._inside - self._passed
        self._passed.add(block)
        self._here = block

    def leave(self, *_: Any) -> None:  # noqa: ANN401
        """Marks the block as done."""
        self._here = None


@contextmanager
def passing(turns: Turns | None, model: nn.Module) -> Iterator[Passing]:
    """Watches a run within, and yields what is seen of it; of a model whose blocks are all there, whatever it does is orderly."""
    seen = Passing(model)
    with ExitStack() as stack:
        for part, block in turns.owner.items() if turns is not None else ():
            stack.callback(part.register_forward_pre_hook(partial(seen.enter, block)).remove)
            if part is block:
                stack.callback(part.register_forward_hook(seen.leave).remove)
        yield seen
