"""Importance from forward passes: outputs of units, and their effect on consumer layers."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor, nn

from billhook.engine import Run, SideBySide, store_of
from billhook.importance.score import Importance, Sums, by_unit, check_consumers, consumer_modules, count_tokens, mask_padding
from billhook.linalg import in_float64
from billhook.model import ExpertLinear, batched, channels_of, is_convolution, patches, read_dim, routed, weight_of
from billhook.units import Per, Units, UnitsByModule

AT_ONCE = 2**24
"""Values that a consumer layer is called with at once, to read its weights."""


@dataclass(frozen=True)
class ActivationNorm(Importance):
    """Scores a unit by the mean L2 norm of its output over tokens; needs no loss.

    For a head it is the norm of its context vector, for a channel the absolute value. For a hidden dimension it covers the
    outputs of all norm layers; an output with several consumer layers counts once.

    Reference: "Compact Language Models via Pruning and Knowledge Distillation" (Minitron; Muralidharan et al., 2024),
    https://arxiv.org/abs/2407.14679, section 2.2.

    Raises:
        ValueError: On scoring, if the units have no consumer layers.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "head"), bh.importance.ActivationNorm(), [model.dummy_inputs])
        >>> [len(values) for values in scores.values()]
        [8, 8, 8, 8]
    """

    blockwise = True

    def sums(self, model: nn.Module, units: UnitsByModule, per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches. See `Importance.sums`."""
        check_consumers(units, type(self).__name__)
        sums, last = ConsumerSums(), dict[tuple[int, str], ReferenceType[Tensor]]()

        def note(run: int, name: str, consumer: str, inputs: Tensor, tokens: Tensor | None) -> None:
            if (run, name) not in last or last[run, name]() is not inputs:
                last[run, name] = ref(inputs)
                norms = mask_padding(by_unit(inputs.float().square(), units[name], per).sqrt(), tokens)
                sums.add(name, consumer, norms.flatten(0, -2).sum(0), count_tokens(norms, tokens))

        watch(model, units, runs, note)
        return sums.over(units, per)


@dataclass(frozen=True)
class OutputNorm(Importance):
    """Scores a unit by its effect on the output of its consumer layer; needs no loss.

    The score is the root of the mean over tokens of |W_u a_u|^2, with the unit's output a_u and its consumer columns W_u. For a
    channel it equals |W_u| |a_u|, the product of Wanda (Sun et al., 2023, https://arxiv.org/abs/2306.11695), equation 1, for a
    column instead of a weight. For a head, whose positions act together, it is computed from W_u^T W_u and the sums of a_u
    a_u^T. For a convolution, W_u and a_u cover all kernel positions, and the mean is over its outputs.

    Costs: a forward pass for each batch, the sums of one consumer layer, and `[units, size, size]` numbers for each consumer
    layer, with `size` positions per unit (the head dimension; 1 for a channel). W_u is read by calling the layer with unit
    vectors, so that adapters count.

    Raises:
        ValueError: On scoring, if the units have no consumer layers.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "channel"), bh.OutputNorm(), [model.dummy_inputs])
        >>> [len(values) for values in scores.values()]
        [384, 384, 384, 384]
    """

    blockwise = True

    def sums(self, model: nn.Module, units: UnitsByModule, per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches. See `Importance.sums`.

        Raises:
            ValueError: If padded inputs reach a convolution with several kernel positions.
        """
        check_consumers(units, type(self).__name__)
        sums, windows = ConsumerSums(), {}
        tables, grams = {}, {}
        for name, module_units in units.items():
            table, exists = unit_positions(module_units, per)
            for consumer, module in consumer_modules(model, module_units).items():
                store_of(model).load(module)
                if is_convolution(module) and module.groups == 1 and {*module.kernel_size, *module.stride} != {1}:
                    taps = torch.arange(prod(module.kernel_size)) * channels_of(module)
                    windows[consumer], tables[name, consumer] = module, (table[:, None] + taps[:, None]).flatten(1)
                    columns = weight_of(module).detach().float().t()[tables[name, consumer].to(module.weight.device)]
                    at_taps = exists.repeat(1, len(taps)).to(columns.device)
                    grams[name, consumer] = _square(columns * at_taps[..., None])
                else:
                    tables[name, consumer], grams[name, consumer] = table, gram_of(module, table, exists, len(module_units.index))

        def note(_: int, name: str, consumer: str, inputs: Tensor, tokens: Tensor | None) -> None:
            if (window := windows.get(consumer)) is not None:
                if tokens is not None:
                    raise ValueError(
                        f"importance: {consumer} has several kernel positions, and some of its inputs are padding. Use batches "
                        "without padding."
                    )
                inputs = patches(window, batched(window, inputs.movedim(-1, read_dim(window))))
            table = tables[name, consumer].to(inputs.device)
            rows = mask_padding(inputs.float(), tokens).flatten(0, -2)
            if table.shape[1] == 1:
                squares = rows.square().sum(0)[table][..., None]
            else:
                squares = _square(rows[:, table].transpose(0, 1).mT)
            sums.add(name, consumer, (squares * grams[name, consumer]).sum((1, 2)), count_tokens(inputs, tokens))

        watch(model, units, runs, note)
        return sums.over(units, per)

    def of_mean(self, mean: Tensor) -> Tensor:
        """Returns the scores of a module. See `Importance.of_mean`."""
        return mean.clamp(min=0).sqrt()


class ConsumerSums:
    """Sums over batches for each consumer layer, added up in the order of the layers.

    The result is the same whether batches run in parallel or one after the other. Sums stay on the device of the layer.
    """

    def __init__(self) -> None:
        self._sums = dict[tuple[str, str], tuple[Tensor, int]]()

    def add(self, name: str, consumer: str, total: Tensor, count: int) -> None:
        """Adds the sums of a call of a consumer layer.

        Args:
            name: Name of the module.
            consumer: Name of the consumer layer.
            total: Sums over tokens, `[units]`.
            count: Number of tokens.
        """
        before, counted = self._sums.get((name, consumer), (0.0, 0))
        self._sums[name, consumer] = before + in_float64(total.detach()), counted + count

    def over(self, units: UnitsByModule, per: Per) -> Sums:
        """Returns the sums over all consumer layers of each module."""
        sums = Sums.zero(units, per)
        for name, module_units in units.items():
            for number, consumer in enumerate(dict.fromkeys(module_units.readers)):
                if (name, consumer) in self._sums:
                    sums.add(name, *self._sums[name, consumer], number)
        return sums


def watch(
    model: nn.Module,
    units: UnitsByModule,
    runs: Sequence[Run],
    note: Callable[..., None],
    leave: Callable[[nn.Module], None] | None = None,
) -> None:
    """Runs batches and calls `note` for each call of a consumer layer.

    Args:
        model: The model.
        units: Units by module.
        runs: The batches.
        note: Function of the run, module, consumer layer, input, and mask of non-padding tokens.
        leave: Function of a block, called when all runs have passed it; runs are then in parallel.
    """
    together = SideBySide(model, leave)

    def see(name: str, consumer: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        dim, tokens, inputs = read_dim(module), runs[together.run].tokens.get(consumer), args[0]
        if isinstance(module, ExpertLinear):  # its output is multiplied by the gates
            inputs, tokens = inputs * module.gates[:, None], None if tokens is None else routed(module, tokens)
        note(together.run, name, consumer, inputs if dim == -1 else inputs.movedim(dim, -1), tokens)

    with ExitStack() as hooks, torch.no_grad():
        for name, module_units in units.items():
            for consumer, module in consumer_modules(model, module_units).items():
                hooks.callback(module.register_forward_pre_hook(partial(see, name, consumer)).remove)
        together([run.visit for run in runs])


def unit_positions(units: Units, per: Per) -> tuple[Tensor, Tensor]:
    """Returns positions of units, padded, and the mask of existing ones: `[units, size]`."""
    unit_at = units.positions(per)
    positions = np.flatnonzero(unit_at >= 0)
    positions = positions[np.argsort(unit_at[positions], kind="stable")]
    sizes = np.bincount(unit_at[positions], minlength=units.count(per))
    table = np.full((len(sizes), sizes.max()), -1)
    first = np.cumsum(sizes) - sizes
    table[unit_at[positions], np.arange(len(positions)) - np.repeat(first, sizes)] = positions
    return torch.from_numpy(table.clip(0)), torch.from_numpy(table >= 0)


@torch.no_grad()
def gram_of(consumer: nn.Module, table: Tensor, exists: Tensor, width: int, at_once: int = AT_ONCE) -> Tensor:
    """Returns W_u^T W_u of each unit: float32, `[units, size, size]`.

    Args:
        consumer: The consumer layer.
        table: Positions of each unit, `[units, size]`.
        exists: Mask of positions that exist, `[units, size]`.
        width: Number of its inputs.
        at_once: Numbers of one-hot inputs in a call.

    Raises:
        ValueError: If it is a convolution with several kernel positions.
    """
    parameters = [consumer.weight] if isinstance(consumer, ExpertLinear) else consumer.parameters()
    dtype_source = next((parameter for parameter in parameters if parameter.is_floating_point()), torch.zeros(()))
    if dims := -1 - read_dim(consumer):
        for part in consumer.modules():
            # private: the base class of all convolutions, including transposed ones
            if isinstance(part, nn.modules.conv._ConvNd) and {*part.kernel_size, *part.stride} != {1}:
                raise ValueError(
                    f"importance: {consumer} has several kernel positions, so the effect of a unit is not a sum over tokens. Use "
                    "another importance."
                )

    def product(inputs: Tensor) -> Tensor:
        output: Tensor = consumer.forward(inputs)  # without hooks, which would observe it
        if isinstance(consumer, nn.Linear) and not isinstance(output, Tensor):  # a router that also returns its choice
            return nn.Linear.forward(consumer, inputs)
        return output

    zero, grams = dtype_source.new_zeros(1, width, *[1] * dims), []
    table, exists = table.to(dtype_source.device), exists.to(dtype_source.device)
    step = max(1, at_once // (table.shape[1] * width))
    with torch.autocast(dtype_source.device.type, enabled=False):
        for positions, mask in zip(torch.split(table, step), torch.split(exists, step), strict=True):
            vectors = dtype_source.new_zeros(positions.numel(), width).scatter_(1, positions.reshape(-1, 1), 1.0)
            columns = product(vectors.view(-1, *zero.shape[1:])) - product(zero)  # without the bias
            grams.append(_square(columns.float().view(*positions.shape, -1) * mask[..., None]))
    return torch.cat(grams)


def _square(rows: Tensor) -> Tensor:
    """Multiplies rows with each other, in their own precision."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rows.mT
