"""KL divergence and perplexity relative to the dense model, on held-out batches."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine import (
    Batch,
    ModulesByName,
    Outputs,
    Run,
    evaluating_without_grad,
    overridden,
    source_of,
    tree_leaves,
    tree_map_only,
)
from billhook.repairs.repair import RepairConfig
from billhook.report.predictions import Predictions, eval_logits
from billhook.units import UnitNumbers, find_blocks

SHARE = 0.2
"""Largest fraction of each source's batches to hold out."""
TOKENS = 4096
"""Maximum number of evaluation tokens over all sources: some hundred candidates run on all of them."""
PER_INPUT = 10
"""Maximum number of fitting tokens per input of the widest refitted layer, for variants."""


def split_batches(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Splits batches into batches to fit to and held-out batches, evenly over each source.

    Held-out batches are cut to the number of tokens that is evaluated. If there are too few batches, they are split into
    examples first.

    Raises:
        ValueError: If there are fewer than three examples, or fewer than two of a source.
    """
    numbers = _by_source(batches)
    if _too_few(numbers):
        batches = split_examples(batches)
        numbers = _by_source(batches)
    if _too_few(numbers):
        counts = [f"{len(of_source)}{f' of {source}' if source else ''}" for source, of_source in numbers.items()]
        raise ValueError(
            "batches: at least 3 examples, and 2 of each source, are required because some are held out; "
            f"got {', '.join(counts) or 'none'}. Pass more examples."
        )
    chosen, config = [], RepairConfig(held_out=SHARE)
    for of_source in numbers.values():
        chosen += [of_source[number] for number in config.held_out_batches(len(of_source))]
    chosen.sort()
    limited = dict(zip(chosen, limit_tokens([batches[number] for number in chosen]), strict=True))
    repair_batches = [batch for number, batch in enumerate(batches) if limited.get(number) is None]
    return repair_batches, [rows for rows in limited.values() if rows is not None]


def split_examples(batches: Sequence[Any]) -> list[Any]:
    """Splits batches into single examples."""
    return [_rows(batch, row, row + 1) for batch in batches for row in range(_size(batch)[0])]


def _by_source(batches: Sequence[Any]) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {}
    for number, batch in enumerate(batches):
        numbers.setdefault(source_of(batch), []).append(number)
    return numbers


def _too_few(numbers: UnitNumbers) -> bool:
    return sum(map(len, numbers.values())) < 3 or any(len(of_source) < 2 for of_source in numbers.values())


def limit_tokens(batches: Sequence[Any], tokens: int = TOKENS) -> list[Any | None]:
    """Returns the first examples of each source, up to a number of tokens.

    None stands for a batch of which no example is used.

    >>> import torch
    >>> [batch and tuple(batch["input_ids"].shape) for batch in limit_tokens([{"input_ids": torch.zeros(4, 100)}] * 3, 600)]
    [(4, 100), (2, 100), None]
    """
    share = tokens // max(len({source_of(batch) for batch in batches}), 1)
    left: dict[str, int] = {}
    taken = []
    for batch in batches:
        source = source_of(batch)
        count, length = _size(batch)
        rows = min(max(left.get(source, share) // max(length, 1), 0), count) or int(source not in left)
        taken.append(None if not rows else batch if rows == count else _rows(batch, 0, rows))
        left[source] = left.get(source, share) - rows * length
    return taken


def search_batches(batches: Sequence[Any], widest: int) -> list[Any]:
    """Returns the batches for scoring units and fitting variants.

    The selected candidate is repaired on all batches.

    Args:
        batches: All batches for fitting.
        widest: Number of inputs of the widest refitted layer.
    """
    taken = [batch for batch in limit_tokens(batches, PER_INPUT * widest) if batch is not None]
    return taken if len(taken) > 1 else list(batches)


def _size(batch: Any) -> tuple[int, int]:  # noqa: ANN401
    """Returns the number of examples of a batch and the tokens of each."""
    inputs = dict(batch) if isinstance(batch, Mapping) else batch
    rows, length = [], []
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            rows.append(leaf.shape[0])
            length += [leaf.shape[1]] if leaf.dim() == 2 else []
    return max(rows, default=1), max(length, default=1)


def _rows(batch: Any, start: int, stop: int) -> Any:  # noqa: ANN401
    """Returns some examples of a batch; tensors shared by all examples are kept."""
    inputs = dict(batch) if isinstance(batch, Mapping) else batch
    cut = tree_map_only(Tensor, lambda tensor: tensor[start:stop] if tensor.dim() and len(tensor) > 1 else tensor, inputs)
    return Batch(cut, source_of(batch)) if isinstance(batch, Batch) else cut


BYTES = 2**31
"""Memory limit for recorded block outputs of all runs; beyond it, models always run in full."""


class Replay:
    """Recorded block outputs of a model, to skip unchanged blocks.

    Args:
        blocks: The blocks, by name.
    """

    def __init__(self, blocks: ModulesByName) -> None:
        self._blocks, self._size = dict(blocks), 0
        self._outputs = list[dict[str, Any]]()  # of each run, by block

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the block outputs of the next run, which happens within the `with` block."""
        outputs, repeated = {}, False

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
        """Replays recorded outputs of the blocks before the first changed module.

        Args:
            changed: Names of the changed modules; if one is outside all blocks, the model runs in full.
            run: Index of the run.
        """
        outputs = self._outputs[run] if self._outputs else {}
        numbers = [number for number, block in enumerate(outputs) for name in changed if f"{name}.".startswith(f"{block}.")]
        unchanged = list(outputs)[: min(numbers)] if numbers and len(numbers) == len(changed) else []
        with ExitStack() as stack:
            for name in unchanged:
                stack.enter_context(overridden(self._blocks[name], forward=partial(_again, outputs[name])))
            yield

    def forget(self) -> None:
        """Drops the recordings, so that models run in full from now on."""
        self._outputs = []


def _again(output: Any, *_: Any, **__: Any) -> Any:  # noqa: ANN401 - whatever a block is given and returns
    return _copied(output)


def _copied(output: Any) -> Any:  # noqa: ANN401
    """Copies a block output, as the next block may add to it in place."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), output)


Broadcast = Callable[[Any], Any]
"""Returns the first rank's value of a result that ranks agree on except for rounding."""


class Divergence:
    """Recorded predictions of the dense model on batches, for comparison with a changed model.

    Args:
        model: The dense model.
        runs: Forward passes without a loss, with the names of their sources.
        broadcast: Returns the first rank's value of a measurement.

    Raises:
        ValueError: If the model has no `logits`.
    """

    def __init__(self, model: PreTrainedModel, runs: Sequence[Run], broadcast: Broadcast = lambda value: value) -> None:
        self._model, self.broadcast = model, broadcast
        try:
            stacks = find_blocks(model)
        except ValueError:
            stacks = {}
        blocks = {f"{name}.{number}": block for name, stack in stacks.items() for number, block in enumerate(stack)}
        self._replay = Replay(blocks)
        self._dense = []
        for run in runs:
            with self._replay.recording():  # no local keeps the logits while the next run makes its own
                self._dense.append((run, Predictions.of(Outputs(eval_logits(model, run), is_logits=True), len(runs))))
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
        """Measures by source the mean KL(dense || current) over positions, in nats.

        Args:
            changed: Names of the changed modules, if known: blocks before them are replayed.
        """
        sums, counts = dict[str, float](), dict[str, int]()
        for number, (run, dense) in enumerate(self._dense):
            with self._replay.before(changed, number):
                total = dense.divergence(eval_logits(self._model, run))
            sums[run.source] = sums.get(run.source, 0.0) + total
            counts[run.source] = counts.get(run.source, 0) + len(dense.positions)
        measured: dict[str, float] = self.broadcast({source: total / counts[source] for source, total in sums.items()})
        return measured

    def mean(self, changed: Collection[str] = ()) -> float:
        """Measures the current model: the mean over sources. See `by_source`."""
        return mean_over_sources(self.by_source(changed))


def mean_over_sources(by_source: Mapping[str, float]) -> float:
    """Returns the mean over sources."""
    return sum(by_source.values()) / len(by_source)


@dataclass(eq=False)
class Perplexity:
    """Recorded losses of the dense model on batches, for comparison with a changed model.

    Args:
        model: The dense model.
        runs: Forward passes that return the loss, with the names of their sources.
        broadcast: Returns the first rank's value of a measurement.

    Raises:
        ValueError: If a loss is not finite.
    """

    model: PreTrainedModel
    runs: Sequence[Run]
    broadcast: Broadcast = lambda value: value

    def __post_init__(self) -> None:
        self._dense = self._losses()
        if not all(map(math.isfinite, self._dense)):
            raise ValueError(f"batches: the loss of this {type(self.model).__name__} is NaN or infinite on a batch")

    def ratio(self) -> float:
        """Returns the perplexity relative to the dense model, a geometric mean over sources."""
        rises: dict[str, list[float]] = {}
        for run, before, after in zip(self.runs, self._dense, self._losses(), strict=True):
            rises.setdefault(run.source, []).append(after - before)
        mean = mean_over_sources({source: sum(of_source) / len(of_source) for source, of_source in rises.items()})
        return math.exp(mean) if mean < math.log(1e9) else math.inf

    def _losses(self) -> list[float]:
        with evaluating_without_grad(self.model):
            losses: list[float] = self.broadcast([float(run.forward()) for run in self.runs])
        return losses
