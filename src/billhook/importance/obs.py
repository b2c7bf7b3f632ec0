"""How much is lost without a unit when the others make up for it: the importance that belongs to `RepairConfig`.

"Second order derivatives for network pruning: Optimal Brain Surgeon" (Hassibi & Stork, 1993,
https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html), of structures as in "ZipLM:
Inference-Aware Structured Pruning of Language Models" (Kurtic, Frantar & Alistarh, 2023, https://arxiv.org/abs/2302.04089).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from billhook.arguments import check_int, check_number, check_types
from billhook.engine.batches import Run
from billhook.engine.memory import memory_to_hold
from billhook.engine.passes import runs_blockwise
from billhook.engine.statistics import InputGram
from billhook.engine.store import store_of
from billhook.engine.walk import blocks_of
from billhook.importance.activations import gram_of, unit_positions, watch
from billhook.importance.probes import check_consumers, consumer_modules
from billhook.importance.score import Importance, Sums
from billhook.linalg import cholesky_, damp_, float64_device
from billhook.units.units import Per, Units


class RepeatedCall(ValueError):
    """A reader is called after all runs had passed the blocks that it is in."""


def watch_blockwise(
    model: nn.Module,
    units: Mapping[str, Units],
    runs: Sequence[Run],
    note: Callable[..., None],
    leave: Callable[[Collection[str]], None],
) -> None:
    """Watches the readers of units as `watch` does, while all runs go through the blocks of a model side by side.

    Args:
        model: The model; in one without blocks, runs come one after the other.
        units: The units, by place.
        runs: The batches.
        note: See `watch`.
        leave: Called after each block, and at the end, with the names of all readers that all runs have passed; it may call them.

    Raises:
        RepeatedCall: If a reader is called later; then all runs must be over before anything is made of what was noted.
    """
    readers = {reader: module for of_place in units.values() for reader, module in consumer_modules(model, of_place).items()}
    ahead = {block: set(block.modules()) for block in blocks_of(model)}
    passed, leaving = set[str](), False

    def see(run: int, name: str, reader: str, inputs: Tensor, tokens: Tensor | None) -> None:
        if leaving:
            return
        if reader in passed:
            raise RepeatedCall(f"model: {reader} is called again later")
        note(run, name, reader, inputs, tokens)

    def go_on(block: nn.Module) -> None:
        nonlocal leaving
        if block not in ahead:  # it was left before
            return
        inside = ahead.pop(block)
        rest = set().union(*ahead.values())
        passed.update(reader for reader, module in readers.items() if module in inside - rest)
        leaving = True
        leave(passed)
        leaving = False

    watch(model, units, runs, see, go_on)
    leave(readers.keys())


Moments = dict[tuple[str, str], InputGram]
"""(place, reader) -> the moments of what it reads."""


def _note(moments: Moments, _: int, name: str, reader: str, inputs: Tensor, tokens: Tensor | None) -> None:
    key = name, reader
    if key not in moments:
        moments[key] = InputGram(inputs.shape[-1], inputs.device)
    fits = tokens is not None and tokens.shape == inputs.shape[:-1]
    moments[key].add(inputs, tokens.to(inputs.device) if tokens is not None and fits else None)


@dataclass(frozen=True)
class OBS(Importance):
    """How far the output of the module that reads a unit moves without it, when the columns of all other units are refitted.

    The root of the mean over tokens of min |W x - W' x|^2 over all W' that do not read the unit, which is
    tr(W_u^T W_u ([H^-1]_uu)^-1), H = sum of x x^T: the optimal brain surgeon's saliency, of a structure as in ZipLM, equation 2.
    It needs no loss and no gradient. As with `RepairConfig`, what one kind of text shows is not what all need: the batches should
    be of several, or of what the model writes itself, too (`Calibration([..., "generated"])`).

    Costs: a forward for each batch and pass; memory for a float32 matrix `[in_features, in_features]` of each reader of a pass,
    and one in float64 of one reader; the inverse of each. With several ranks, the mean of what each finds. With
    `passes=1`, where matrices would take more than a quarter of the free memory, and 2 GiB, there are those of one block at a
    time: all batches go through it before the next, in one pass. So they do in a model that is streamed, or that is sharded, in
    a search by `Shrinking`.

    Args:
        damping: Share of the mean of H's diagonal that is added to it.
        passes: In how many passes over the batches, each for its share of the readers: the more, the less memory.

    Raises:
        ValueError: If an argument is not legal; when it runs, if nothing reads the units alone.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "channel"), bh.OBS(), [model.dummy_inputs])
        >>> [len(of_place) for of_place in scores.values()]
        [384, 384, 384, 384]
    """

    blockwise: ClassVar[bool] = True
    damping: float = 0.01
    passes: int = 1

    def __post_init__(self) -> None:
        check_types(OBS, vars(self))
        check_number("damping", self.damping, above=0)
        check_int("passes", self.passes)

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches; see `Importance.sums`."""
        check_consumers(units, type(self).__name__)
        size = sum(4 * len(of_place.index) ** 2 * len(consumer_modules(model, of_place)) for of_place in units.values())
        device = next(chain(model.parameters(), model.buffers())).device
        too_many = self.passes == 1 and store_of(model).holds_all and size > memory_to_hold(device)
        if too_many or runs_blockwise(model, [run.visit for run in runs]):
            sums, moments = Sums.zero(units, per), Moments()

            def leave(passed: Collection[str]) -> None:
                done = {key: moments.pop(key) for key in list(moments) if key[1] in passed}
                self._add(sums, model, units, per, done)

            try:
                watch_blockwise(model, units, runs, partial(_note, moments), leave)
                return sums
            except RepeatedCall as error:  # moments are complete only when all runs are over
                store_of(model).check_can_hold_all(str(error))
        sums, names = Sums.zero(units, per), list(units)
        for first in range(min(self.passes, len(names))):
            part, moments = {name: units[name] for name in names[first :: self.passes]}, Moments()
            watch(model, part, runs, partial(_note, moments))
            self._add(sums, model, units, per, moments)
        return sums

    def _add(self, sums: Sums, model: nn.Module, units: Mapping[str, Units], per: Per, moments: Moments) -> None:
        """Adds the errors that follow from moments."""
        for (name, reader), seen in moments.items():
            table, exists = unit_positions(units[name], per)
            store_of(model).load(model.get_submodule(reader))
            gram = gram_of(model.get_submodule(reader), table, exists, seen.in_features)
            sums.add(name, removal_errors(seen.products, gram, table, exists, self.damping), int(seen.tokens))

    def of_mean(self, mean: Tensor) -> Tensor:
        """Returns the scores of a place; see `Importance.of_mean`."""
        return mean.clamp(min=0).sqrt()


def removal_errors(products: Tensor, gram: Tensor, table: Tensor, exists: Tensor, damping: float) -> Tensor:
    """Returns tr(W_u^T W_u ([H^-1]_uu)^-1) of each unit u, H = X X^T + damping * mean(diag) I: float64, `[units]`.

    Args:
        products: X X^T, `[in_features, in_features]`.
        gram: W_u^T W_u, `[units, size, size]`, zero for positions that do not exist.
        table: The positions of each unit, `[units, size]`, int64.
        exists: Which of them exist, as some units may have fewer: bool.
        damping: Share of the mean of the diagonal that is added to it.
    """
    h = products.to(float64_device(products.device), torch.float64, copy=True)
    factor, failed = cholesky_(damp_(h, damping))
    if failed:
        raise ValueError(f"damping={damping} is too small for inputs so alike, or they are NaN or infinite")
    inverse = torch.cholesky_inverse(factor, out=factor)
    table, exists = table.to(h.device), exists.to(h.device)
    both = exists[:, :, None] & exists[:, None, :]
    blocks = torch.where(both, inverse[table[:, :, None], table[:, None, :]], torch.eye(table.shape[1], device=h.device))
    lost: Tensor = (gram.to(h.device).double() * torch.linalg.inv(blocks)).sum((1, 2))
    return lost
