"""Prunes a model whose blocks come from files one at a time, where the weights of all linears compete with one another."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import groupby

import torch
from torch import Tensor, nn

from billhook.engine.files import FileStore
from billhook.model.linears import turned, weight_of
from billhook.sparsity.masks import Lowest, pruned_count, where_kept
from billhook.sparsity.pruned import Applied, Pruned
from billhook.sparsity.visitor import GlobalPruningVisitor


class StreamedGlobalPruning:
    """Three passes over a model that is streamed: two find the lowest score that is kept, in which no score stays; one prunes.

    Args:
        stream: Where its blocks come from and go.
        visitor: What has seen the linears, and scores them.
        linears: All linears, in their order, by name.
        key: What tells this work from all other; without one, the model stays as it is, and masks are held.
    """

    def __init__(
        self, stream: FileStore, visitor: GlobalPruningVisitor, linears: Mapping[str, nn.Module], key: str | None
    ) -> None:
        self.stream, self.visitor, self.key, self.applies = stream, visitor, key, key is not None
        self.linears = {name: linear for name, linear in linears.items() if name in visitor.seen}
        self.done: dict[str, dict[str, int]] = {}

    @torch.no_grad()
    def go(self) -> None:
        """Prunes all linears; those outside of blocks wait until nothing can fail any more."""
        count = pruned_count(sum(weight_of(linear).numel() for linear in self.linears.values()), self.visitor.sparsity)
        outside = dict[str, Tensor]()
        with nullcontext() if self.key is None else self.stream.step(self.key):
            self.done = {} if self.key is None else self.stream.done
            lowest = Lowest.of(self._scores, count)
            for block, names in groupby(self.linears, lambda name: self.stream.owner.get(self.linears[name])):
                keeps = ((name, lowest.keep(self._scored(name))) for name in names)
                if not self.applies:
                    self.visitor.pruned |= {name: self._masked(name, keep) for name, keep in keeps}
                elif block is None:
                    outside |= dict(keeps)
                else:
                    self._take_in(block, keeps)
                self.visitor.tell()
            self.stream.release()
        self._take(outside)

    def _scores(self) -> Iterator[Tensor]:
        return (self._scored(name) for name in self.linears)

    def _scored(self, name: str) -> Tensor:
        self.stream.load(self.linears[name])
        return self.visitor.scores(name)

    def _masked(self, name: str, keep: Tensor) -> Pruned:
        weight = weight_of(self.linears[name])
        return Pruned.of(weight, where_kept(weight, keep), keep)

    def _take_in(self, block: nn.Module, keeps: Iterator[tuple[str, Tensor]]) -> None:
        """Has a block take zeros, and be written; of one that an earlier process has done, it is only seen how many were tied."""
        name = self.stream.names[block]
        if name in self.done:
            self.visitor.pruned |= {linear: Applied(int(keep.count_nonzero())) for linear, keep in keeps}
            self.stream.adopt(name)
            return
        kept = self._take(dict(keeps))
        self.stream.change(block, kept)
        self.stream.release()

    def _take(self, keeps: Mapping[str, Tensor]) -> dict[str, int]:
        """Puts zeros into linears that are there; returns how many weights of each are kept."""
        for name, keep in keeps.items():
            linear = self.linears[name]
            linear.get_parameter("weight").copy_(turned(linear, where_kept(weight_of(linear), keep)))
        kept = {name: int(keep.count_nonzero()) for name, keep in keeps.items()}
        self.visitor.pruned |= {name: Applied(number) for name, number in kept.items()}
        return kept
