"""Pruning a model's weights in one shot: checked, planned while the model is as it was, then applied."""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar, get_args

import torch
from torch import nn

from billhook.sparsity.allocation import Allocation, Uniform
from billhook.sparsity.batches import Run, runs_of
from billhook.sparsity.calibration import Calibration, InputsDiffer, Progress, prune_linear
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.linears import prunable, weight_of
from billhook.sparsity.masks import check_amount, parse_pattern
from billhook.sparsity.result import Pruned, Pruning
from billhook.sparsity.walk import Reduce, Sequential, Site, Walk, find_sites, undisturbed

CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)

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
    linears = check_pruning(model, criterion, pattern, sequential, allocation, skip, output_embeddings)
    needing = [one for one in (criterion, allocation) if (one.measures if isinstance(one, Allocation) else needs_data(one))]
    runs = _runs(model, batches, needing, reduce)
    _warn_of_others(model, find_sites(model, linears, "block"))
    sparsities = _sparsities(model, linears, amount, allocation, runs, reduce)
    shapes = {name: tuple(weight_of(linear).shape) for name, linear in linears.items()}
    if not needs_data(criterion):
        pruned: dict[str, Pruned] = {}
        for name, linear in linears.items():
            pruned[name] = prune_linear(name, linear, criterion, None, sparsities[name], pattern)
            if progress is not None:
                progress(len(pruned), len(linears))
        return Pruning(criterion, pattern, pruned, shapes)

    def calibration(shared: bool) -> Calibration:
        tokens = [run.tokens for run in runs]
        return Calibration(criterion, sparsities, pattern, tokens, reduce, progress, shared)

    pruned = _walk(model, find_sites(model, linears, sequential), calibration, runs, reduce).pruned
    uncalled = _uncalled(linears, pruned)
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


def check_pruning(
    model: nn.Module,
    criterion: Criterion,
    pattern: str = "unstructured",
    sequential: Sequential = "block",
    allocation: Allocation | None = None,
    skip: Sequence[str] = (),
    output_embeddings: bool = False,
) -> dict[str, nn.Module]:
    """Checks all that can be said of `prune` before there is data; the linears to prune by name. See `prune`."""
    linears = _chosen(model, skip, output_embeddings)
    _check(criterion, linears, pattern, sequential, allocation or Uniform())
    return linears


def _chosen(model: nn.Module, skip: Sequence[str], output_embeddings: bool) -> dict[str, nn.Module]:
    if isinstance(skip, str):
        raise ValueError(f"skip={skip!r} must be a list of patterns")
    linears = prunable(model, output_embeddings)
    if not linears:
        raise ValueError(f"model: {type(model).__name__} has no linear layers to prune")
    if empty := next((name for name, linear in linears.items() if weight_of(linear).is_meta), None):
        raise ValueError(f"model: {empty} has no weights yet (it is on the meta device): load them first")
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"skip={pattern!r} matches none of the {len(linears)} linears, such as {list(linears)[:3]}")
    chosen = {name: m for name, m in linears.items() if not any(fnmatchcase(name, pattern) for pattern in skip)}
    if not chosen:
        raise ValueError(f"skip={list(skip)} leaves none of the {len(linears)} linears")
    return chosen


def _check(criterion: Criterion, linears: Mapping[str, nn.Module], pattern: str, sequential: str, allocation: Allocation) -> None:
    if not isinstance(criterion, Criterion):
        raise ValueError(f"criterion={criterion!r} must be a Criterion, such as Wanda()")
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


def _runs(
    model: nn.Module, batches: Iterable[Any] | None, needing: Sequence[Criterion | Allocation], reduce: Reduce | None
) -> list[Run]:
    """The runs, of which there must be one at least, on any rank, if something needs data."""
    runs = [] if batches is None else runs_of(model, batches)
    count = torch.tensor([len(runs)], device=next(model.parameters()).device)
    if needing and not (count if reduce is None else reduce(count)):
        given = "None" if batches is None else "an empty collection"
        raise ValueError(f"batches={given}: {type(needing[0]).__name__} needs calibration data")
    return runs


def _uncalled(linears: Iterable[str], pruned: Mapping[str, Pruned]) -> tuple[str, ...]:
    """Names the linears that were given no token; if none was given any, that is an error."""
    uncalled = tuple(name for name in linears if name not in pruned)
    if not pruned:
        raise ValueError(f"batches: no linear has been given a token that counts; the first is {uncalled[0]}")
    if uncalled:
        what = f"{len(uncalled)} linears, which stay as they are: {', '.join(uncalled)}"
        warnings.warn(f"no calibration batch has called {what}", stacklevel=3)
    return uncalled


def _warn_of_others(model: nn.Module, sites: Sequence[Site]) -> None:
    """Names what holds matrices, but is no linear: of three dimensions, and no convolution, as experts in one tensor are."""
    inside = {module for site in sites for module in site.module.modules()}
    found = {}
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False) if module in inside else ():
            if parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(module, CONVOLUTIONS):
                found[re.sub(r"\b\d+\b", "*", f"{name}.{own}")] = list(parameter.shape)
    if found:
        what = ", ".join(f"{name} {shape}" for name, shape in found.items())
        warnings.warn(f"these hold several matrices each, but are no linear layers and stay as they are: {what}", stacklevel=3)


def _walk(
    model: nn.Module, sites: Sequence[Site], calibration: Callable[[bool], C], runs: Sequence[Run], reduce: Reduce | None
) -> C:
    for shared in (True, False):
        result = calibration(shared)
        try:
            with undisturbed(model):
                Walk(sites, result, reduce)([run.forward for run in runs])
            break
        except InputsDiffer:
            if not shared:
                raise
    return result


def _sparsities(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    amount: float,
    allocation: Allocation,
    runs: Sequence[Run],
    reduce: Reduce | None,
) -> dict[str, float]:
    """How much each linear gives; blocks that no batch comes to take no part in measuring."""
    blocks: Blocks = [site.linears for site in find_sites(model, linears, "block")]
    measured: dict[int, float] = {}
    if allocation.measures:

        def calibration(shared: bool) -> _Measured:
            return _Measured(blocks, allocation, [run.tokens for run in runs], reduce, None, shared)

        measured = _walk(model, find_sites(model, linears, "none"), calibration, runs, reduce).measured
        blocks = [blocks[number] for number in measured]
    sizes = [{name: weight_of(linear).numel() for name, linear in block.items()} for block in blocks]
    return dict.fromkeys(linears, amount) | (allocation.allocate(sizes, amount, list(measured.values())) if sizes else {})


class _Measured(Calibration):
    """A calibration that prunes nothing, and measures each block."""

    def __init__(self, blocks: Blocks, allocation: Allocation, *args: Any) -> None:  # noqa: ANN401 - those of a calibration
        super().__init__(Wanda(), {}, "unstructured", *args)
        self.blocks, self.allocation = blocks, allocation
        self.measured: dict[int, float] = {}

    def finish(self, linears: Mapping[str, nn.Module]) -> None:
        """Measures the blocks by Wanda's scores."""
        for number, block in enumerate(self.blocks):
            called = {name: linear for name, linear in block.items() if name in linears}
            scores = [self.criterion.score(weight_of(m), self.statistics[self._first[name]]) for name, m in called.items()]
            if scores:
                self.measured[number] = self.allocation.measure(scores)
