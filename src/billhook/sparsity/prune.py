"""Pruning a model's weights in one shot: checked, planned while the model is as it was, then applied."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar, get_args

from torch import nn

from billhook.sparsity.allocation import Allocation, Uniform
from billhook.sparsity.batches import Run, runs_of
from billhook.sparsity.calibration import Calibration, InputsDiffer, Progress, Reduce, prune_linear
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.linears import prunable, weight_of
from billhook.sparsity.masks import check_amount, parse_pattern
from billhook.sparsity.result import Pruning
from billhook.sparsity.walk import Sequential, Site, Walk, find_sites, undisturbed

Blocks = Sequence[Mapping[str, nn.Module]]
C = TypeVar("C", bound=Calibration)


def plan_pruning(
    model: nn.Module,
    criterion: Criterion,
    batches: Iterable[Any] | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    sequential: Sequential = "block",
    allocation: Allocation | None = None,
    skip: Sequence[str] = (),
    output_embeddings: bool = False,
    reduce: Reduce | None = None,
    progress: Progress | None = None,
) -> Pruning:
    """Says what `prune` would do; the model stays as it is. See `prune`."""
    amount, allocation = check_amount(sparsity, pattern), allocation or Uniform()
    linears = _chosen(model, skip, output_embeddings)
    _check(linears, pattern, sequential, allocation)
    runs = [] if batches is None else runs_of(model, batches)
    if not runs and (needs_data(criterion) or allocation.measures):
        what = criterion if needs_data(criterion) else allocation
        given = "None" if batches is None else "an empty collection"
        raise ValueError(f"batches={given}: {type(what).__name__} needs calibration data")
    blocks = [site.linears for site in find_sites(model, linears, "block")]
    measured = _measure(model, blocks, allocation, runs, reduce) if allocation.measures else []
    sparsities = allocation.allocate(
        [{name: weight_of(m).numel() for name, m in block.items()} for block in blocks], amount, measured
    )
    shapes = {name: tuple(weight_of(linear).shape) for name, linear in linears.items()}
    if not needs_data(criterion):
        pruned = {name: prune_linear(name, one, criterion, None, sparsities[name], pattern) for name, one in linears.items()}
        return Pruning(criterion, pattern, pruned, shapes)

    def calibration(shared: bool) -> Calibration:
        tokens = [run.tokens for run in runs]
        return Calibration(criterion, sparsities, pattern, tokens, reduce, progress, shared)

    pruned = _walk(model, find_sites(model, linears, sequential), calibration, runs).pruned
    uncalled = tuple(name for name in linears if name not in pruned)
    if uncalled:
        warnings.warn(
            f"no calibration batch has called {len(uncalled)} linears, which stay as they are: {uncalled}", stacklevel=2
        )
    return Pruning(criterion, pattern, pruned, shapes, uncalled)


def prune(
    model: nn.Module,
    criterion: Criterion | None = None,
    batches: Iterable[Any] | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    sequential: Sequential = "block",
    allocation: Allocation | None = None,
    skip: Sequence[str] = (),
    output_embeddings: bool = False,
    reduce: Reduce | None = None,
    progress: Progress | None = None,
) -> Pruning:
    """Zeroes the least important weights of a model's linear layers, in place and in one shot.

    If anything fails, nothing has changed. Modes, random numbers, hooks and configs are as before afterwards.

    Args:
        model: A model of transformers, with LoRA attached or not (its base weights are pruned), or any module that the batches
            can be given to.
        criterion: How important a weight is; `Wanda()` by default.
        batches: Calibration data: each batch is what the model's forward takes, as a dictionary, a tuple or a tensor. Padding
            (`attention_mask`, `decoder_attention_mask`) does not count.
        sparsity: Fraction of each linear's weights that become zero, in [0, 1); None with a pattern N:M.
        pattern: `"unstructured"`, or `"N:M"`: N are kept of every M consecutive inputs.
        sequential: What a layer's statistics are taken from. `"block"`, the papers': the dense block, on the outputs of pruned
            blocks before it. `"layer"`: each linear on the outputs of all pruned ones before it, in one pass. `"none"`: the dense
            model.
        allocation: How much each linear gives; the same by default.
        skip: Glob patterns of linears to leave alone, such as `"*.down_proj"`.
        output_embeddings: Whether the output embedding (`lm_head`) is pruned too, where it is not tied to an embedding.
        reduce: How a tensor is summed over ranks, in place, where each rank has batches of its own.
        progress: Is told how many linears are done, and of how many.

    Returns:
        What was done; `print` shows it.

    Raises:
        ValueError: If an argument is not legal, two contradict each other, the criterion needs data and there is none, a linear
            is quantised or of a width that M does not divide, or weights or statistics hold NaN or inf.
    """
    pruning = plan_pruning(
        model, criterion or Wanda(), batches, sparsity, pattern, sequential, allocation, skip, output_embeddings, reduce, progress
    )
    pruning.apply(model)
    return pruning


def needs_data(criterion: Criterion) -> bool:
    """Whether a criterion needs to see what a linear is given."""
    return criterion.statistics(1, "meta") is not None


def _chosen(model: nn.Module, skip: Sequence[str], output_embeddings: bool) -> dict[str, nn.Module]:
    linears = prunable(model, output_embeddings)
    if not linears:
        raise ValueError(f"model: {type(model).__name__} has no linear layers to prune")
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"skip={pattern!r} matches none of the {len(linears)} linears, such as {list(linears)[:3]}")
    chosen = {name: m for name, m in linears.items() if not any(fnmatchcase(name, pattern) for pattern in skip)}
    if not chosen:
        raise ValueError(f"skip={list(skip)} leaves none of the {len(linears)} linears")
    return chosen


def _check(linears: Mapping[str, nn.Module], pattern: str, sequential: str, allocation: Allocation) -> None:
    if sequential not in get_args(Sequential):
        raise ValueError(f"sequential={sequential!r} must be one of {get_args(Sequential)}")
    kept = parse_pattern(pattern)
    if kept is None:
        return
    if not isinstance(allocation, Uniform):
        raise ValueError(
            f"allocation={allocation} says how sparse each linear is, and pattern={pattern!r} says it for all: say one"
        )
    for name, linear in linears.items():
        width = weight_of(linear).shape[1]
        if width % kept[1]:
            raise ValueError(f"pattern={pattern!r}: {name} has {width} inputs, which {kept[1]} does not divide; skip it")


def _walk(model: nn.Module, sites: Sequence[Site], calibration: Callable[[bool], C], runs: Sequence[Run]) -> C:
    for shared in (True, False):
        result = calibration(shared)
        try:
            with undisturbed(model):
                Walk(sites, result)([run.forward for run in runs])
            break
        except InputsDiffer:
            if not shared:
                raise
    return result


class _Measured(Calibration):
    """A calibration that prunes nothing, and measures each block."""

    def __init__(self, blocks: Blocks, allocation: Allocation, *args: Any) -> None:  # noqa: ANN401 - those of a calibration
        super().__init__(Wanda(), {}, "unstructured", *args)
        self.blocks, self.allocation = blocks, allocation
        self.measured: list[float] = []

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Measures the blocks by Wanda's scores."""
        for block in self.blocks:
            called = {name: linear for name, linear in block.items() if name in linears}
            scores = [self.criterion.score(weight_of(m), self.statistics[self._first[name]]) for name, m in called.items()]
            self.measured.append(self.allocation.measure(scores))


def _measure(model: nn.Module, blocks: Blocks, allocation: Allocation, runs: Sequence[Run], reduce: Reduce | None) -> list[float]:
    linears = {name: linear for block in blocks for name, linear in block.items()}

    def calibration(shared: bool) -> _Measured:
        return _Measured(blocks, allocation, [run.tokens for run in runs], reduce, None, shared)

    return _walk(model, find_sites(model, linears, "none"), calibration, runs).measured
