"""Prunes during a walk, and tunes what is kept of a block when all runs have come out of it."""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from billhook.engine.sharding import gathered, whole
from billhook.engine.walk import Given, Site
from billhook.model.convolutions import is_convolution
from billhook.model.linears import turned, weight_of
from billhook.sparsity.matching import BlockMatching, Passage, Tuning, stream_in
from billhook.sparsity.pruned import Applied, Pruned, Share
from billhook.sparsity.visitor import PruningVisitor


class MatchingVisitor(PruningVisitor):
    """A visitor of runs in two series of the same batches, the second of the dense model, which says what blocks shall give.

    Args:
        matching: How blocks are tuned.
    """

    def __init__(self, matching: BlockMatching, *args: Any, **walk: Any) -> None:  # noqa: ANN401 - those of a visitor
        super().__init__(*args, **walk)
        self.matching = matching
        self._given: dict[int, tuple[Given, Tensor]] = {}

    @property
    def dense(self) -> Sequence[int]:
        """The numbers of the runs of the dense model."""
        return range(len(self.tokens), 2 * len(self.tokens))

    def came_out(self, run: int, given: Given, output: object) -> None:
        """Notes what a block was given, and what it gave."""
        if (stream := stream_in(output)) is not None:
            self._given[run] = given, stream

    def came_again(self, site: Site) -> None:
        """Refuses linears that are called again when their block has been matched."""
        if site.linears:
            refuse_again(site.linears)

    def complete(self, site: Site) -> None:
        """Prunes the linears of a site, or tunes those of a block that all runs have come out of."""
        if not site.out:
            super().complete(site)
            return
        found = {name: self.pruned[name] for name in site.linears if name in self.pruned}
        own = {name: _whole(one) for name, one in found.items() if not isinstance(one, Applied)}
        passages, self._given = self._passages(), {}
        if not own:
            return
        with gathered(site.module):
            if self._enough(passages, weight_of(site.linears[next(iter(own))]).device):
                own = self._tune(site, own, passages)
        self._passed = {}
        for name, one in own.items():
            self.take(name, site.linears[name], whole(weight_of(site.linears[name])), one)

    def _enough(self, passages: Sequence[Passage], device: torch.device) -> bool:
        """Tells whether all ranks have passages to tune on, and others to hold out."""
        lacking = torch.tensor([float(len(passages) < 2)], device=device)
        return not (lacking if self.reduce is None else self.reduce(lacking))

    def _passages(self) -> list[Passage]:
        found = []
        for run, dense in enumerate(self.dense):
            if run in self._given and dense in self._given:
                (given, output), (_, goal) = self._given[run], self._given[dense]
                if output.shape == goal.shape:
                    found.append(Passage(given, goal, self._counting(goal.shape[:-1], goal, run)))
        return found

    def _tune(self, site: Site, own: dict[str, Pruned], passages: Sequence[Passage]) -> dict[str, Pruned]:
        names = {id(one): name for name, one in site.module.named_parameters()}
        lies, weights, keeps = dict[str, str](), dict[str, Tensor](), dict[str, Tensor]()
        for name, one in own.items():
            linear = site.linears[name]
            lies[name] = key = names[id(linear.get_parameter("weight"))]
            weights[key] = turned(linear, one.weight(weight_of(linear)))
            keeps[key] = turned(linear, one.keep(weight_of(linear)))
        held_out = self.matching.is_held_out(len(passages))
        parts = [[one for one, held in zip(passages, held_out, strict=True) if held is part] for part in (False, True)]
        with torch.inference_mode(False):
            tuning = Tuning(self.matching, site.module, weights, keeps, self.reduce)
            weights.clear()  # it has copies
            tuned = tuning(*parts)
        return {name: self._rounded(site.linears[name], one, tuned[lies[name]]) for name, one in own.items()}

    @staticmethod
    def _rounded(linear: nn.Module, one: Pruned, tuned: Tensor) -> Pruned:
        """Returns a linear's part of the plan with tuned weights, as they lie in memory, rounded to the dtype of the old ones."""
        old = weight_of(linear)
        new = tuned.movedim(1, -1).flatten(1) if is_convolution(linear) else turned(linear, tuned)
        return Pruned.of(old, new.to(old.dtype), one.keep(old))


def _whole(one: Pruned | Share) -> Pruned:
    """Returns what a linear becomes as a whole; where its weight is sharded, all ranks call this together."""
    return one.whole() if isinstance(one, Share) else one


def refuse_again(linears: Iterable[str]) -> NoReturn:
    """Refuses linears that would be pruned before they are called again, or under another name."""
    again = next(iter(linears))
    raise ValueError(f"match: {again} is called again after its block, or shares its weight: leave match out, or skip it")
