"""Finds how sparse each linear becomes."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from billhook.adapters.masked import counted
from billhook.engine.sharding import whole
from billhook.model.linears import weight_of
from billhook.sparsity.allocation import Allocation
from billhook.sparsity.criteria import Wanda
from billhook.sparsity.grouped import scores_of
from billhook.sparsity.visitor import PruningVisitor
from billhook.sparsity.walks import Walks

Blocks = Sequence[Mapping[str, nn.Module]]


def sparsities_of(walks: Walks, amount: float, allocation: Allocation) -> dict[str, float]:
    """Finds the sparsity of each linear; blocks that no batch reaches take no part in measuring."""
    blocks: Blocks = [site.linears for site in walks.blocks()]
    measured: dict[int, float] = {}
    if allocation.measures:
        measured = walks("none", partial(_Measured, blocks, allocation)).measured
        blocks = [blocks[number] for number in measured]
    sizes = [{name: weight_of(linear).numel() for name, linear in block.items()} for block in blocks]
    return dict.fromkeys(walks.linears, amount) | (allocation.allocate(sizes, amount, list(measured.values())) if sizes else {})


class _Measured(PruningVisitor):
    """A visitor that prunes nothing, and measures each block."""

    def __init__(self, blocks: Blocks, allocation: Allocation, **walk: Any) -> None:  # noqa: ANN401 - those of a visitor
        super().__init__(Wanda(), {}, "unstructured", **walk)
        self.blocks, self.allocation = blocks, allocation
        self.measured: dict[int, float] = {}

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Measures the blocks by Wanda's scores."""
        for number, block in enumerate(self.blocks):
            called = {name: linear for name, linear in block.items() if name in linears}
            scores = [self._scores(name, linear) for name, linear in called.items()]
            if scores:
                self.measured[number] = self.allocation.measure(scores)

    def _scores(self, name: str, linear: nn.Module) -> Tensor:
        weight = counted(whole(weight_of(linear)), self.adapters.get(name))
        return scores_of(self.criterion, weight, self.statistics[self._first[name]])
