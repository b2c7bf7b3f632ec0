"""Measures how far predictions are from the dense model's, on held-out batches: the KL divergence and perplexity."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.batches import Batch, Run, source_of
from billhook.engine.state import evaluating_without_grad, overridden
from billhook.engine.trees import tree_leaves, tree_map_only
from billhook.repairs.repair import RepairConfig
from billhook.report.predictions import Predictions, eval_logits
from billhook.units.blocks import find_blocks

SHARE = 0.2
"""Share of the batches of each source that is held out at most."""
TOKENS = 4096
"""How many tokens losses are measured on at most, of all sources together: each of some hundred candidates runs on all."""
PER_INPUT = 10
"""How many tokens candidates are fitted to at most for each input of the widest linear that is refitted."""


def divided(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Divides batches, the held-out ones spread evenly over those of each source, no more than are measured.

    Where there are too few, they are taken apart into rows; too few rows are refused.
    """
    numbers = _by_source(batches)
    if _too_few(numbers):
        batches = in_rows(batches)
        numbers = _by_source(batches)
    if _too_few(numbers):
        counts = ", ".join(f"{len(of_source)}{f' of {source}' if source else ''}" for source, of_source in numbers.items())
        raise ValueError(f"batches: three rows at least, and two of each source, as some are held out; got {counts or 'none'}")
    chosen = {of_source[n] for of_source in numbers.values() for n in RepairConfig(held_out=SHARE).chooses(len(of_source))}
    order = sorted(chosen)
    measured = few([batches[number] for number in order])
    held_out = {number for number, rows in zip(order, measured, strict=True) if rows is not None}
    fitted = [batch for number, batch in enumerate(batches) if number not in held_out]
    return fitted, [rows for rows in measured if rows is not None]


def in_rows(batches: Sequence[Any]) -> list[Any]:
    """Takes batches apart into rows."""
    return [_rows(batch, row, row + 1) for batch in batches for row in range(_size(batch)[0])]


def _by_source(batches: Sequence[Any]) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {}
    for number, batch in enumerate(batches):
        numbers.setdefault(source_of(batch), []).append(number)
    return numbers


def _too_few(numbers: Mapping[str, Sequence[int]]) -> bool:
    return sum(map(len, numbers.values())) < 3 or any(len(of_source) < 2 for of_source in numbers.values())


def few(batches: Sequence[Any], tokens: int = TOKENS) -> list[Any | None]:
    """Returns the first rows of each source's batches, as many as come to an equal share of so many tokens, one at least.

    None stands for batches of which none is taken.

    >>> import torch
    >>> [batch and tuple(batch["input_ids"].shape) for batch in few([{"input_ids": torch.zeros(4, 100)}] * 3, 600)]
    [(4, 100), (2, 100), None]
    """
    share = tokens // max(len({source_of(batch) for batch in batches}), 1)
    left: dict[str, int] = {}
    taken = list[Any | None]()
    for batch in batches:
        source = source_of(batch)
        count, length = _size(batch)
        rows = min(max(left.get(source, share) // max(length, 1), 0), count) or int(source not in left)
        taken.append(None if not rows else batch if rows == count else _rows(batch, 0, rows))
        left[source] = left.get(source, share) - rows * length
    return taken


def to_search(batches: Sequence[Any], widest: int) -> list[Any]:
    """Returns the batches that candidates are scored on and fitted to; what is chosen is repaired on all.

    Args:
        batches: All batches that something may be fitted to.
        widest: Inputs of the widest linear that is refitted.
    """
    taken = [batch for batch in few(batches, PER_INPUT * widest) if batch is not None]
    return taken if len(taken) > 1 else list(batches)


def _size(batch: Any) -> tuple[int, int]:  # noqa: ANN401
    """Returns how many rows a batch has, and how many tokens a row."""
    inputs = dict(batch) if isinstance(batch, Mapping) else batch
    shapes = [leaf.shape for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    rows = max((shape[0] for shape in shapes), default=1)
    return rows, max((shape[1] for shape in shapes if len(shape) == 2), default=1)


def _rows(batch: Any, start: int, stop: int) -> Any:  # noqa: ANN401
    """Returns some rows of a batch; what has one row, as positions may, stays."""
    inputs = dict(batch) if isinstance(batch, Mapping) else batch
    cut = tree_map_only(Tensor, lambda tensor: tensor[start:stop] if tensor.dim() and len(tensor) > 1 else tensor, inputs)
    return Batch(cut, source_of(batch)) if isinstance(batch, Batch) else cut


BYTES = 2**31
"""How much is held of all runs together; beyond that, nothing is, and models run as a whole."""


class Replay:
    """Holds what the blocks of a model gave in its runs.

    Args:
        blocks: The blocks, by name.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self._blocks, self._size = dict(blocks), 0
        self._outputs = list[dict[str, Any]]()  # of each run, by block

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Notes what the blocks give in the next run, which is done within the `with` block."""
        outputs, repeated = dict[str, Any](), False

        def note(name: str, _: nn.Module, __: Any, output: Any) -> None:  # noqa: ANN401
            nonlocal repeated
            repeated |= name in outputs
            self._size += sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            outputs[name] = None if self._size > BYTES else _copied(output)

        with ExitStack() as hooks:
            for name, block in self._blocks.items():
                hooks.callback(block.register_forward_hook(partial(note, name)).remove)
            yield
        self._outputs.append({} if repeated else outputs)
        if self._size > BYTES:
            self.forget()

    @contextmanager
    def before(self, changed: Collection[str], run: int) -> Iterator[None]:
        """Lets the blocks before the first of some modules give what they gave, for as long as the `with` block lasts.

        Args:
            changed: Names of modules that have changed; where one is in no block, the model runs as a whole.
            run: The number of the run.
        """
        outputs = self._outputs[run] if self._outputs else {}
        numbers = [number for number, block in enumerate(outputs) for name in changed if f"{name}.".startswith(f"{block}.")]
        unchanged = list(outputs)[: min(numbers)] if numbers and len(numbers) == len(changed) else []
        with ExitStack() as stack:
            for name in unchanged:
                stack.enter_context(overridden(self._blocks[name], forward=partial(_again, outputs[name])))
            yield

    def forget(self) -> None:
        """Lets models run as a whole from now on."""
        self._outputs = []


def _again(output: Any, *_: Any, **__: Any) -> Any:  # noqa: ANN401 - whatever a block is given and returns
    return _copied(output)


def _copied(output: Any) -> Any:  # noqa: ANN401
    """Copies what a block gives, as the next one may add to it in place."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), output)


Agreed = Callable[[Any], Any]
"""Returns, of what several ranks have found alike but for rounding, that of the first."""


class Divergence:
    """Predictions of a dense model on batches, held so that a changed one can be compared with it.

    Args:
        model: The dense model.
        runs: Runs of it, without a loss, with the names of their sources.
        agreed: Returns, of what several ranks have measured alike, that of the first.

    Raises:
        ValueError: If it predicts nothing, as it has no `logits`.
    """

    def __init__(self, model: PreTrainedModel, runs: Sequence[Run], agreed: Agreed = lambda value: value) -> None:
        self._model, self.agreed = model, agreed
        try:
            stacks = find_blocks(model)
        except ValueError:
            stacks = {}
        blocks = {f"{name}.{number}": block for name, stack in stacks.items() for number, block in enumerate(stack)}
        self._replay = Replay(blocks)
        self._dense = list[tuple[Run, Predictions]]()
        for run in runs:
            with self._replay.noting():  # no local keeps the logits while the next run makes its own
                self._dense.append((run, Predictions.of(eval_logits(model, run), len(runs))))
        # where blocks hand on more than they return, as keys and values of earlier ones, models run as a whole
        try:
            with self._replay.before(list(blocks)[-1:], 0):
                replayed = eval_logits(model, runs[0])
        except Exception:  # noqa: BLE001 - whatever a model's own code raises
            self._replay.forget()
            return
        if not torch.equal(replayed, eval_logits(model, runs[0])):
            self._replay.forget()

    def by_source(self, changed: Collection[str] = ()) -> dict[str, float]:
        """Measures the model as it is now: by source, the mean of KL(dense || now) over positions, in nats.

        Args:
            changed: The modules that are not the dense model's, where that is known: only what comes after them is run.
        """
        sums, counts = dict[str, float](), dict[str, int]()
        for number, (run, dense) in enumerate(self._dense):
            with self._replay.before(changed, number):
                total = dense.divergence(eval_logits(self._model, run))
            sums[run.source] = sums.get(run.source, 0.0) + total
            counts[run.source] = counts.get(run.source, 0) + len(dense.positions)
        measured: dict[str, float] = self.agreed({source: total / counts[source] for source, total in sums.items()})
        return measured

    def mean(self, changed: Collection[str] = ()) -> float:
        """Measures the model as it is now, or as it is with modules changed: the mean over sources."""
        return mean_of(self.by_source(changed))


def mean_of(by_source: Mapping[str, float]) -> float:
    """Returns the mean over sources."""
    return sum(by_source.values()) / len(by_source)


class Perplexity:
    """The loss of a dense model on batches, to compare a changed one's with.

    Args:
        model: The dense model.
        runs: Runs of it that return the loss, with the names of their sources.
        agreed: Returns, of what several ranks have measured alike, that of the first.

    Raises:
        ValueError: If a loss is not finite.
    """

    def __init__(self, model: PreTrainedModel, runs: Sequence[Run], agreed: Agreed = lambda value: value) -> None:
        self._model, self._runs, self._agreed = model, runs, agreed
        self._dense = self._losses()
        if not all(map(math.isfinite, self._dense)):
            raise ValueError(f"batches: the loss of this {type(model).__name__} is NaN or infinite on a batch")

    def ratio(self) -> float:
        """Measures the model as it is now: exp of how much its loss has risen, the mean over sources."""
        rises: dict[str, list[float]] = {}
        for run, before, after in zip(self._runs, self._dense, self._losses(), strict=True):
            rises.setdefault(run.source, []).append(after - before)
        mean = mean_of({source: sum(of_source) / len(of_source) for source, of_source in rises.items()})
        return math.exp(mean) if mean < math.log(1e9) else math.inf

    def _losses(self) -> list[float]:
        with evaluating_without_grad(self._model):
            losses: list[float] = self._agreed([float(run.forward()) for run in self._runs])
        return losses
