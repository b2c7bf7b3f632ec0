"""Importance from forward passes alone: the outputs of units, and how far they move the module that reads them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor, nn

from billhook.engine.batches import Run
from billhook.engine.passes import SideBySide
from billhook.engine.store import store_of
from billhook.importance.probes import by_unit, check_consumers, consumer_modules, count_tokens, mask_padding
from billhook.importance.score import Importance, Sums
from billhook.linalg import in_float64
from billhook.model.layers import Convolution, batched, channels_of, is_convolution, patches, read_dim, weight_of
from billhook.units.units import Per, Units

AT_ONCE = 2**24
"""How many numbers a reader is given at once, to find its weights."""


@dataclass(frozen=True)
class ActivationNorm(Importance):
    """The mean over tokens of the L2 norm of a unit's output; needs no loss.

    "Compact Language Models via Pruning and Knowledge Distillation" (Minitron; Muralidharan et al., 2024,
    https://arxiv.org/abs/2407.14679), section 2.2. Of a head it is the norm of its context vector, of a channel the absolute
    value. Of a residual channel it is that of the outputs of norms, over all norms; an output that several modules read counts
    once.

    Raises:
        ValueError: When it runs: if nothing reads the units alone.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "head"), bh.importance.ActivationNorm(), [model.dummy_inputs])
        >>> [len(of_place) for of_place in scores.values()]
        [8, 8, 8, 8]
    """

    blockwise: ClassVar[bool] = True

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches; see `Importance.sums`."""
        check_consumers(units, type(self).__name__)
        sums, last = ConsumerSums(), dict[tuple[int, str], ReferenceType[Tensor]]()

        def note(run: int, name: str, reader: str, inputs: Tensor, tokens: Tensor | None) -> None:
            if (run, name) not in last or last[run, name]() is not inputs:
                last[run, name] = ref(inputs)
                norms = mask_padding(by_unit(inputs.float().square(), units[name], per).sqrt(), tokens)
                sums.add(name, reader, norms.flatten(0, -2).sum(0), count_tokens(norms, tokens))

        watch(model, units, runs, note)
        return sums.over(units, per)


@dataclass(frozen=True)
class OutputNorm(Importance):
    """How far the output of the module that reads a unit moves without it: the root of the mean over tokens of |W_u a_u|^2.

    a_u is the unit's output and W_u the columns that read it. Of a channel this is |W_u| |a_u|, the product of "A Simple and
    Effective Pruning Approach for Large Language Models" (Wanda; Sun et al., 2023, https://arxiv.org/abs/2306.11695), equation 1,
    for a column instead of a weight; of a head, whose positions move the output together, it comes from W_u^T W_u and the sums
    of a_u a_u^T. It needs no loss and no gradient.

    Of a convolution that reads several places, W_u and a_u are those of all taps, and the mean is over its outputs.

    Costs: a forward for each batch; memory for the sums of one reader, and `[units, size, size]` numbers for each reader, with
    `size` positions a unit (a head's width; 1 for a channel). W is found by giving a reader unit vectors, so that adapters count.

    Raises:
        ValueError: When it runs: if nothing reads the units alone.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "channel"), bh.OutputNorm(), [model.dummy_inputs])
        >>> [len(of_place) for of_place in scores.values()]
        [384, 384, 384, 384]
    """

    blockwise: ClassVar[bool] = True

    def sums(self, model: nn.Module, units: Mapping[str, Units], per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches; see `Importance.sums`."""
        check_consumers(units, type(self).__name__)
        sums, windows = ConsumerSums(), dict[str, Convolution]()
        tables, grams = dict[tuple[str, str], Tensor](), dict[tuple[str, str], Tensor]()
        for name, of_place in units.items():
            table, exists = unit_positions(of_place, per)
            for reader, module in consumer_modules(model, of_place).items():
                store_of(model).load(module)
                if (window := wide_convolution(module)) is None:
                    tables[name, reader], grams[name, reader] = table, gram_of(module, table, exists, len(of_place.index))
                else:
                    windows[reader], tables[name, reader] = window, kernel_positions(window, table)
                    grams[name, reader] = gram_over_kernel(window, tables[name, reader], exists)

        def note(_: int, name: str, reader: str, inputs: Tensor, tokens: Tensor | None) -> None:
            if (window := windows.get(reader)) is not None:
                if tokens is not None:
                    raise ValueError(
                        f"importance: {reader} reads several places at once, of which some are padding and do not count"
                    )
                inputs = patches(window, batched(window, inputs.movedim(-1, read_dim(window))))
            table = tables[name, reader].to(inputs.device)
            rows = mask_padding(inputs.float(), tokens).flatten(0, -2)
            if table.shape[1] == 1:
                moments = rows.square().sum(0)[table][..., None]
            else:
                moments = _square(rows[:, table].transpose(0, 1).mT)
            sums.add(name, reader, (moments * grams[name, reader]).sum((1, 2)), count_tokens(inputs, tokens))

        watch(model, units, runs, note)
        return sums.over(units, per)

    def of_mean(self, mean: Tensor) -> Tensor:
        """Returns the scores of a place; see `Importance.of_mean`."""
        return mean.clamp(min=0).sqrt()


class ConsumerSums:
    """Sums over runs for each reader alone, which are added up in the order of readers.

    So the numbers are the same whether all runs go through a block before the next one, or each through the whole model. They
    stay on the reader's device until then.
    """

    def __init__(self) -> None:
        self._sums = dict[tuple[str, str], tuple[Tensor, int]]()

    def add(self, name: str, reader: str, total: Tensor, count: int) -> None:
        """Adds the sums of one call of a reader of a place."""
        before, counted = self._sums.get((name, reader), (0.0, 0))
        self._sums[name, reader] = before + in_float64(total.detach()), counted + count

    def over(self, units: Mapping[str, Units], per: Per) -> Sums:
        """Returns the sums over all readers of each place."""
        sums = Sums.zero(units, per)
        for name, of_place in units.items():
            for reader in dict.fromkeys(of_place.readers):
                if (name, reader) in self._sums:
                    sums.add(name, *self._sums[name, reader])
        return sums


def watch(
    model: nn.Module,
    units: Mapping[str, Units],
    runs: Sequence[Run],
    note: Callable[..., None],
    leave: Callable[[nn.Module], None] | None = None,
) -> None:
    """Runs batches, and calls `note` with each call of a reader: its run, place, reader, input and which tokens count.

    With `leave`, they run side by side, and it is called with each block when all have passed it.
    """
    together = SideBySide(model, leave)

    def see(name: str, reader: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        dim, tokens = read_dim(module), runs[together.now].tokens.get(reader)
        note(together.now, name, reader, args[0] if dim == -1 else args[0].movedim(dim, -1), tokens)

    with ExitStack() as hooks, torch.no_grad():
        for name, of_place in units.items():
            for reader, module in consumer_modules(model, of_place).items():
                hooks.callback(module.register_forward_pre_hook(partial(see, name, reader)).remove)
        together([run.visit for run in runs])


def unit_positions(units: Units, per: Per) -> tuple[Tensor, Tensor]:
    """Returns the positions of each unit, `[units, size]`, int64; and which of them exist, as some may have fewer: bool."""
    unit_at = units.positions(per)
    positions = np.flatnonzero(unit_at >= 0)
    positions = positions[np.argsort(unit_at[positions], kind="stable")]
    sizes = np.bincount(unit_at[positions], minlength=units.count(per))
    table = np.full((len(sizes), sizes.max()), -1)
    first = np.cumsum(sizes) - sizes
    table[unit_at[positions], np.arange(len(positions)) - np.repeat(first, sizes)] = positions
    return torch.from_numpy(table.clip(0)), torch.from_numpy(table >= 0)


@torch.no_grad()
def gram_of(reader: nn.Module, table: Tensor, exists: Tensor, width: int) -> Tensor:
    """Returns W_u^T W_u of each unit: float32, `[units, size, size]`."""
    like = next((parameter for parameter in reader.parameters() if parameter.is_floating_point()), torch.zeros(()))
    if dims := -1 - read_dim(reader):
        for part in reader.modules():
            # private: the base of all convolutions, transposed ones too
            if isinstance(part, nn.modules.conv._ConvNd) and {*part.kernel_size, *part.stride} != {1}:
                raise ValueError(
                    f"importance: {reader} reads several places at once, so that what a unit moves is no sum over tokens"
                )

    def product(inputs: Tensor) -> Tensor:
        output = reader(inputs)  # of a router that is a linear and returns what it has chosen, too, the product alone
        return nn.Linear.forward(reader, inputs) if isinstance(reader, nn.Linear) and not isinstance(output, Tensor) else output

    zero, grams = like.new_zeros(1, width, *[1] * dims), []
    table, exists = table.to(like.device), exists.to(like.device)
    step = max(1, AT_ONCE // (table.shape[1] * width))
    with torch.autocast(like.device.type, enabled=False):
        for positions, exist in zip(torch.split(table, step), torch.split(exists, step), strict=True):
            vectors = like.new_zeros(positions.numel(), width).scatter_(1, positions.reshape(-1, 1), 1.0)
            columns = product(vectors.view(-1, *zero.shape[1:])) - product(zero)  # less what a bias gives
            grams.append(_square(columns.float().view(*positions.shape, -1) * exist[..., None]))
    return torch.cat(grams)


def wide_convolution(reader: nn.Module) -> Convolution | None:
    """Returns a reader that is a plain convolution of several places, if it is."""
    if not is_convolution(reader) or reader.groups > 1 or {*reader.kernel_size, *reader.stride} == {1}:
        return None
    return reader


def kernel_positions(window: Convolution, table: Tensor) -> Tensor:
    """Returns the positions of each unit in what a convolution reads for one output: `[units, taps * size]`, int64."""
    taps = torch.arange(prod(window.kernel_size)) * channels_of(window)
    return (table[:, None] + taps[:, None]).flatten(1)


@torch.no_grad()
def gram_over_kernel(window: Convolution, table: Tensor, exists: Tensor) -> Tensor:
    """Returns W_u^T W_u of each unit, over all that an output reads of it: float32, `[units, taps * size, taps * size]`."""
    columns = weight_of(window).float().t()[table.to(window.weight.device)]
    exists = exists.repeat(1, prod(window.kernel_size)).to(columns.device)
    return _square(columns * exists[..., None])


def _square(rows: Tensor) -> Tensor:
    """Multiplies rows with each other, in their own precision."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rows.mT
