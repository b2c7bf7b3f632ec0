"""Importance as the error that remains after repair (optimal brain surgeon).

"Second order derivatives for network pruning: Optimal Brain Surgeon" (Hassibi & Stork, 1993,
https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html), for structures as in "ZipLM:
Inference-Aware Structured Pruning of Language Models" (Kurtic, Frantar & Alistarh, 2023, https://arxiv.org/abs/2302.04089).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from billhook.arguments import check_int, check_number, check_types
from billhook.engine import InputGram, Run, blocks_of, store_of
from billhook.importance.activations import gram_of, unit_positions, watch
from billhook.importance.score import Importance, Sums, check_consumers, consumer_modules
from billhook.linalg import cholesky_, damp_, float64_device
from billhook.units import Per, UnitsByModule


class _RepeatedCall(ValueError):
    """A consumer layer is called again after all runs have passed its block."""


def watch_blockwise(
    model: nn.Module,
    units: UnitsByModule,
    runs: Sequence[Run],
    note: Callable[..., None],
    leave: Callable[[Collection[str]], None],
    restart: Callable[[str], None],
) -> None:
    """Watches consumer layers while all runs pass the blocks of a model in parallel.

    If a consumer layer is called again later, statistics are complete only after all runs. All runs are then repeated.

    Args:
        model: The model. Without blocks, runs are one after the other.
        units: Units by module.
        runs: The batches.
        note: See `watch`.
        leave: Called after each block, and at the end, with the names of all consumer layers that all runs have passed. Hooks
            are still on these layers.
        restart: Called with the reason before runs are repeated, to drop what was noted.
    """
    consumers = {
        consumer: module for module_units in units.values() for consumer, module in consumer_modules(model, module_units).items()
    }
    ahead = {block: set(block.modules()) for block in blocks_of(model)}
    passed = set[str]()

    def see(run: int, name: str, consumer: str, inputs: Tensor, tokens: Tensor | None) -> None:
        if consumer in passed:
            raise _RepeatedCall(f"model: {consumer} is called again after its block")
        note(run, name, consumer, inputs, tokens)

    def pass_block(block: nn.Module) -> None:
        if block not in ahead:  # all runs have passed it before
            return
        inside = ahead.pop(block).difference(*ahead.values())
        passed.update(consumer for consumer, module in consumers.items() if module in inside)
        leave(passed)

    try:
        watch(model, units, runs, see, pass_block)
    except _RepeatedCall as error:
        restart(str(error))
        watch(model, units, runs, note)
    leave(consumers.keys())


InputGrams = dict[tuple[str, str], InputGram]
"""Gram matrices of layer inputs, by (module, consumer layer)."""


def _note(grams: InputGrams, _: int, name: str, consumer: str, inputs: Tensor, tokens: Tensor | None) -> None:
    key = name, consumer
    if key not in grams:
        grams[key] = InputGram(inputs.shape[-1], inputs.device)
    fits = tokens is not None and tokens.shape == inputs.shape[:-1]
    grams[key].add(inputs, tokens.to(inputs.device) if tokens is not None and fits else None)


@dataclass(frozen=True)
class OBS(Importance):
    """Scores a unit by the error that remains after all other columns are refitted.

    The score is the root of the mean over tokens of min |W x - W' x|^2 over all W' that do not use the unit: tr(W_u^T W_u
    ([H^-1]_uu)^-1), with H = sum of x x^T. This is the saliency of the optimal brain surgeon, for structures as in ZipLM,
    equation 2, and matches pruning with `RepairConfig`. It needs no loss and no gradients. Use calibration data of several
    sources, or add other text (`Calibration([..., "mixed", "generated"])`).

    Costs: a forward pass for each batch and pass; a float32 matrix `[in_features, in_features]` for each consumer layer of a
    pass, one more in float64, and an inverse of each. With several ranks, scores are averaged over ranks. With `passes=1`,
    all batches pass one block before the next, and only the matrices of that block are kept. The same holds for streamed models.
    If a block is called again, all matrices are kept.

    Args:
        damping: Share of the mean diagonal of H that is added to its diagonal.
        passes: Number of passes over the batches, each for a share of the consumer layers. With several, batches run one after
            the other, which uses less memory for activations than 1, and more for matrices.

    Raises:
        ValueError: If an argument is out of range. On scoring, if the units have no consumer layers.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> scores = bh.score(model, bh.find_units(model, "channel"), bh.OBS(), [model.dummy_inputs])
        >>> [len(values) for values in scores.values()]
        [384, 384, 384, 384]
    """

    blockwise = True
    damping: float = 0.01
    passes: int = 1

    def __post_init__(self) -> None:
        check_types(OBS, vars(self))
        check_number("damping", self.damping, above=0)
        check_int("passes", self.passes)

    def sums(self, model: nn.Module, units: UnitsByModule, per: Per, runs: Sequence[Run]) -> Sums:
        """Sums over batches. See `Importance.sums`."""
        check_consumers(units, type(self).__name__)
        sums, grams, names = Sums.zero(units, per), InputGrams(), list(units)

        def leave(passed: Collection[str]) -> None:
            # tr(W_u^T W_u ([H^-1]_uu)^-1) of each unit u
            for name, consumer in [key for key in grams if key[1] in passed]:
                statistics, module = grams.pop((name, consumer)), model.get_submodule(consumer)
                table, exists = unit_positions(units[name], per)
                store_of(model).load(module)
                gram = gram_of(module, table, exists, statistics.in_features)
                h = statistics.products.to(float64_device(statistics.products.device), torch.float64, copy=True)
                factor, failed = cholesky_(damp_(h, self.damping))
                if failed:
                    raise ValueError(
                        f"damping={self.damping} is too small for inputs this similar, or they are NaN or infinite. Raise it."
                    )
                inverse = torch.cholesky_inverse(factor, out=factor)
                table, exists = table.to(h.device), exists.to(h.device)
                both = exists[:, :, None] & exists[:, None, :]  # units may differ in size
                blocks = torch.where(
                    both, inverse[table[:, :, None], table[:, None, :]], torch.eye(table.shape[1], device=h.device)
                )
                lost = (gram.to(h.device).double() * torch.linalg.inv(blocks)).sum((1, 2))
                sums.add(name, lost, int(statistics.tokens), units[name].readers.index(consumer))

        def restart(why: str) -> None:
            nonlocal sums
            store_of(model).check_can_hold_all(why)
            grams.clear()
            sums = Sums.zero(units, per)

        if self.passes == 1 or store_of(model).in_files:
            watch_blockwise(model, units, runs, partial(_note, grams), leave, restart)
            return sums
        for first in range(min(self.passes, len(names))):
            part = {name: units[name] for name in names[first :: self.passes]}
            watch(model, part, runs, partial(_note, grams))
            leave({consumer for module_units in part.values() for consumer in module_units.readers})
        return sums

    def of_mean(self, mean: Tensor) -> Tensor:
        """Returns the scores of a module. See `Importance.of_mean`."""
        return mean.clamp(min=0).sqrt()
