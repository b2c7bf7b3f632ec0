"""How much is lost without a unit when the others make up for it: the importance that belongs to `Repair`.

"Second order derivatives for network pruning: Optimal Brain Surgeon" (Hassibi & Stork, 1993,
https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html), of structures as in "ZipLM:
Inference-Aware Structured Pruning of Language Models" (Kurtic, Frantar & Alistarh, 2023, https://arxiv.org/abs/2302.04089).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from billhook.arguments import annotated, number, whole
from billhook.engine.batches import Run
from billhook.engine.memory import memory_to_hold
from billhook.engine.state import resting
from billhook.engine.store import store_of
from billhook.importance.activations import gram_of, table_of
from billhook.importance.base import Importance, Sums
from billhook.importance.moments import (
    Again,
    CalledAgain,
    Moments,
    bytes_of,
    comes_in_turn,
    moments_in_turn,
    moments_of,
    moments_over,
)
from billhook.importance.probes import check_read
from billhook.linalg import cholesky_, damp_, float64_device
from billhook.units.units import Per, Units


@dataclass(frozen=True)
class OBS(Importance):
    """How far the output of the module that reads a unit moves without it, when the columns of all other units are refitted.

    The root of the mean over tokens of min |W x - W' x|^2 over all W' that do not read the unit, which is
    tr(W_u^T W_u ([H^-1]_uu)^-1), H = sum of x x^T: the optimal brain surgeon's saliency, of a structure as in ZipLM, equation 2.
    It needs no loss and no gradient. As with `Repair`, what one kind of text shows is not what all need: the batches should be of
    several, or of what the model writes itself, too (`Calibration([..., "generated"])`).

    Costs: a forward for each batch and pass; memory for a float32 matrix `[in_features, in_features]` of each reader of a pass,
    and one in float64 of one reader; the inverse of each. With several ranks, the mean of what each finds. Where more and more
    batches are taken (`Calibration(enough=...)`), there are twice as many matrices; with several passes each step begins again.
    With `passes=1`, where matrices would take more than a quarter of the free memory, and 2 GiB, there are those of one block at
    a time: all batches go through it before the next, in one pass, and each step begins again. So do those of a model that is
    streamed, or that is sharded, in a search by `Shrink`.

    Args:
        damping: Share of the mean of H's diagonal that is added to it.
        passes: In how many passes over the batches, each for its share of the readers: the more, the less memory.

    Raises:
        ValueError: If an argument is not legal; when it runs, if nothing reads the units alone.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "channel"), bh.OBS(), [model.dummy_inputs])
        >>> [len(own) for own in scores.values()]
        [384, 384, 384, 384]
    """

    in_turn: ClassVar[bool] = True
    damping: float = 0.01
    passes: int = 1

    def __post_init__(self) -> None:
        annotated(OBS, vars(self))
        number("damping", self.damping, above=0)
        whole("passes", self.passes)

    @property
    def adds_up(self) -> bool:
        """Tells whether moments are kept, which add up: in one pass."""
        return self.passes == 1

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches; see `Importance.sums`."""
        check_read(units, type(self).__name__)
        too_many = self.adds_up and not store_of(model).on_ranks and bytes_of(model, units) > memory_to_hold(_device(model))
        if too_many or comes_in_turn(model, runs):
            find = partial(self._in_turn, model, units, per)
            return Again(**vars(find([runs])), groups=[runs], find=find)
        found = partial(self._found, model, units, per)
        if self.adds_up:
            moments = moments_of(model, units, runs)
            return _Errors(**vars(found(moments)), moments=moments, find=found)
        sums, names = Sums.zero(units, per), list(units)
        for first in range(min(self.passes, len(names))):
            sums.merge(found(moments_of(model, {name: units[name] for name in names[first :: self.passes]}, runs)))
        return sums

    def _found(self, model: nn.Module, units: Mapping[str, Units], per: Per, moments: Moments) -> Sums:
        """Finds the errors that follow from moments."""
        sums = Sums.zero(units, per)
        self._add(sums, model, units, per, moments)
        return sums

    def _in_turn(self, model: nn.Module, units: Mapping[str, Units], per: Per, groups: Sequence[Sequence[Run]]) -> Sums:
        """Finds the errors block by block; those of all where a block is called again after others, in memory."""
        sums = Sums.zero(units, per)
        with resting(model):
            try:
                moments_in_turn(model, units, groups, partial(self._add, sums, model, units, per))
            except CalledAgain:
                if store_of(model).in_files:
                    raise
                return self._found(model, units, per, moments_over(model, units, groups))
        return sums

    def _add(self, sums: Sums, model: nn.Module, units: Mapping[str, Units], per: Per, moments: Moments) -> None:
        """Adds the errors that follow from moments."""
        for (name, reader), seen in moments.items():
            table, there = table_of(units[name], per)
            store_of(model).load(model.get_submodule(reader))
            gram = gram_of(model.get_submodule(reader), table, there, seen.in_features)
            sums.add(name, errors_without(seen.products, gram, table, there, self.damping), int(seen.tokens))

    def of_mean(self, mean: Tensor) -> Tensor:
        """Returns the scores of a place; see `Importance.of_mean`."""
        return mean.clamp(min=0).sqrt()


def _device(model: nn.Module) -> torch.device:
    return next(chain(model.parameters(), model.buffers())).device


def errors_without(products: Tensor, gram: Tensor, table: Tensor, there: Tensor, damping: float) -> Tensor:
    """Returns tr(W_u^T W_u ([H^-1]_uu)^-1) of each unit u, H = X X^T + damping * mean(diag) I: float64, `[units]`.

    Args:
        products: X X^T, `[in_features, in_features]`.
        gram: W_u^T W_u, `[units, size, size]`, zero for positions that do not exist.
        table: The positions of each unit, `[units, size]`, int64.
        there: Which of them exist, as some units may have fewer: bool.
        damping: Share of the mean of the diagonal that is added to it.
    """
    h = products.to(float64_device(products.device), torch.float64, copy=True)
    factor, failed = cholesky_(damp_(h, damping))
    if failed:
        raise ValueError(f"damping={damping} is too small for inputs so alike, or they are NaN or infinite")
    inverse = torch.cholesky_inverse(factor, out=factor)
    table, there = table.to(h.device), there.to(h.device)
    both = there[:, :, None] & there[:, None, :]
    blocks = torch.where(both, inverse[table[:, :, None], table[:, None, :]], torch.eye(table.shape[1], device=h.device))
    lost: Tensor = (gram.to(h.device).double() * torch.linalg.inv(blocks)).sum((1, 2))
    return lost


@dataclass(eq=False)
class _Errors(Sums):
    """Errors, and the moments that they follow from: these add up, and errors do not."""

    moments: Moments
    find: Callable[[Moments], Sums]

    def merge(self, other: Sums) -> None:
        """Adds the moments of other batches, and finds the errors again."""
        assert isinstance(other, _Errors)
        for key, seen in other.moments.items():
            if key in self.moments:
                self.moments[key].merge(seen)
            else:
                self.moments[key] = seen
        found = self.find(self.moments)
        self.totals, self.counts = found.totals, found.counts
