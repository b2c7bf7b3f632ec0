"""Puts a model's channels in the order in which groups of N:M lose least: what it computes stays, and nothing is gathered."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from rich.console import RenderableType
from torch import Tensor, nn

from billhook.arguments import check_types
from billhook.calibration.calibration import Batches
from billhook.display import Printable, text_table
from billhook.engine.comm import SINGLE_PROCESS
from billhook.engine.device import check_device
from billhook.engine.state import uninterrupted
from billhook.engine.store import store_of
from billhook.model.find import check_changeable, check_plain, find_transformer
from billhook.model.inputs import logits_of, outputs_match, tolerance
from billhook.model.layers import Convolutions
from billhook.model.repeat_kv import Indices
from billhook.sparsity.channel_order import FreeAxis, OrderingVisitor, ReorderedAxis, find_free_axes
from billhook.sparsity.checks import check_folder, check_pruning, make_runs, needs_data
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.masks import parse_pattern
from billhook.sparsity.options import PruneOptions
from billhook.sparsity.visitor import Walks
from billhook.tracing.trace import trace
from billhook.units.gates import Gate


@dataclass(frozen=True, eq=False, repr=False)
class PermutationResult(Printable):
    """The order in which a model's channels now stand; `print` shows a table.

    Attributes:
        model: The name of the model's class.
        criterion: The criterion that scored weights, in words.
        pattern: `"N:M"`.
        axes: What stands in another order.
        left: Why others stay as they are, by kind and place.
    """

    model: str
    criterion: str
    pattern: str
    axes: tuple[ReorderedAxis, ...]
    left: dict[str, str]

    def _renderables(self) -> list[RenderableType]:
        """Shows for axes that are alike their name, how many orders of how many units, and what they keep on average."""
        alike: dict[tuple[str, int], list[ReorderedAxis]] = defaultdict(list)
        for axis in self.axes:
            name = f"{axis.kind} in {axis.where or 'the model'}"
            alike[re.sub(r"\b\d+\b", "*", name), axis.orders.shape[1]].append(axis)
        rows = []
        for (name, units), axes in alike.items():
            before, after = (sum(axis.kept[n] for axis in axes) / len(axes) for n in (0, 1))
            sets = sum(len(axis.orders) for axis in axes)
            rows.append((name, f"{sets:>4} x {units:>6,}  {before:.4f} -> {after:.4f}"))
        title = f"{self.model} in order for {self.pattern}, by {self.criterion}: share of the scores that is kept"
        left = [f"  {name} stay as they are: {why}" for name, why in self.left.items()]
        return [title, text_table(rows, aligns="<", indent=2), *left]


Ordered = Sequence[tuple[FreeAxis, Indices]]
"""Axes, each with the unit of each set that comes to each place: int64, `[sets, units]`."""


def apply_orders(model: nn.Module, ordered: Ordered) -> None:
    """Puts units in other places, in place: parameters, their gradients and buffers; all of them or, after an interrupt, none.

    No more memory is taken than the largest tensor has, before anything has changed.

    Raises:
        MemoryError: Before anything has changed, if there is no memory for that; or torch's own error.
    """
    moves = _moves(model, ordered)  # an interrupt here leaves nothing to put back
    try:
        _move(moves)
    except KeyboardInterrupt:  # raised when all have been moved
        undo_orders(model, ordered)
        raise


def undo_orders(model: nn.Module, ordered: Ordered) -> None:
    """Puts units back in the places that they had before: the same bits. An interrupt is raised when all are."""
    _move(_moves(model, [(free, np.argsort(orders, axis=1)) for free, orders in ordered]))


def _moves(model: nn.Module, ordered: Ordered) -> list[tuple[Tensor, int, Tensor]]:
    """Returns the tensors that change, each with the dimension, and with the place that each of its slices comes from."""
    tensors, moves = dict([*model.named_parameters(), *model.named_buffers()]), list[tuple[Tensor, int, Tensor]]()
    for free, orders in ordered:
        for member in free.group.members:
            positions, source = free.positions(member.axis), np.arange(member.axis.size)
            source[positions] = np.take_along_axis(positions, orders[:, :, None], axis=1)
            tensor = tensors[member.name]
            for values in (tensor, tensor.grad):
                if values is not None:
                    moves.append((values.detach(), member.dim, torch.from_numpy(source).to(values.device)))
    return moves


@torch.no_grad()
def _move(moves: Sequence[tuple[Tensor, int, Tensor]]) -> None:
    with uninterrupted():
        for tensor, dim, sources in sorted(moves, key=lambda move: -move[0].nbytes):
            tensor.copy_(tensor.index_select(dim, sources))


def permute_for(
    model: nn.Module,
    pattern: str,
    batches: Batches | None = None,
    criterion: Criterion | None = None,
    *,
    skip: Sequence[str] = (),
    output_embeddings: bool = False,
    convolutions: Convolutions = "mixing",
    offload: str | torch.device | None = None,
    activations: str | None = None,
) -> PermutationResult:
    """Puts a model's channels in the order in which groups of N:M keep most of their scores, in place; it computes the same.

    Feed-forward channels, value dimensions of a head and channels of the residual stream are put in another order wherever the
    trace shows that nothing depends on it: the rows that make them and the columns that read them go along, so that nothing is
    gathered at run time. Dimensions that positions rotate stay, and so do heads, each of which fills groups of its own. Zhang et
    al., ICLR 2024, https://openreview.net/forum?id=Tr0lPx9woF, and Pool & Yu, NeurIPS 2021, are where this is from.

    If anything fails, the model is as it was. An optimizer that has seen the model does not follow: make it afterwards.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        pattern: `"N:M"`: N are kept of every M consecutive inputs.
        batches: Calibration data, as `prune` takes them.
        criterion: Scores the weights; `Wanda()` by default. Of an axis, the sum of the scores that are kept in all linears that
            read it is made large.
        skip: A glob pattern of linears that are not going to be pruned, or several.
        output_embeddings: Whether the output embedding (`lm_head`), or the head of a classifier, is going to be pruned too.
        convolutions: Which convolutions are going to be pruned.
        offload: A device on which the blocks of a model compute, one at a time, with copies of their parameters.
        activations: A folder for the outputs of the model's modules, in files that are removed afterwards; by default memory.
            What else runs hold while they wait for each other, such as masks, stays in memory.

    Returns:
        What stands in which order, and how much of the scores is kept before and after; `print` shows it.

    Raises:
        ValueError: If an argument is not legal, the model is quantised, sharded or streamed, or its logits would change.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> done = bh.criteria.permute_for(model, "2:4", [{"input_ids": torch.arange(64)[None]}])
        >>> [(axis.kind, axis.where, axis.orders.shape) for axis in done.axes][:2]
        [('residual', 'model', (1, 256)), ('value', 'model.layers.0.self_attn', (8, 32))]
        >>> all(before <= after for before, after in (axis.kept for axis in done.axes))
        True
    """
    check_types(permute_for, locals())
    criterion = criterion or Wanda()
    check_permute(pattern, stream=not store_of(model).holds_all)
    check_permutable(model)
    patterns = [skip] if isinstance(skip, str) else [*skip]
    options = PruneOptions(skip=patterns, output_embeddings=output_embeddings, convolutions=convolutions)
    linears = check_pruning(model, criterion, pattern, options)
    runs = make_runs(model, batches, SINGLE_PROCESS, criterion)
    walks = Walks(model, linears, runs, SINGLE_PROCESS, check_device(offload), check_folder(activations), {})
    with permuted(walks, criterion, pattern) as done:
        return done


def check_permute(pattern: str, dry_run: bool = False, stream: bool = False, ranks: bool = False) -> None:
    """Refuses arguments with which channels cannot be put in another order."""
    if parse_pattern(pattern) is None:
        raise ValueError(f"pattern={pattern!r}: the order of channels counts only where groups are pruned: name a pattern N:M")
    if dry_run:
        raise ValueError("permute=True changes the order of channels, and dry_run=True leaves it: call permute_for first")
    if stream:
        raise ValueError("permute: the model is streamed, and the order of channels runs through all blocks: have it in memory")
    if ranks:
        raise ValueError("permute=True: each rank would search an order of its own: leave reduce out, or call permute_for first")


def check_permutable(model: nn.Module) -> None:
    """Refuses models whose channels cannot be put in another order."""
    check_changeable(model)
    check_plain(find_transformer(model), "permute the model before it is")
    for name, module in model.named_modules():
        if any(isinstance(hook, Gate) for hook in module._forward_pre_hooks.values()):
            raise ValueError(f"model: a mask or gates stand before {name}: remove them first (mask.remove())")


@contextmanager
def permuted(walks: Walks, criterion: Criterion, pattern: str) -> Iterator[PermutationResult]:
    """Puts channels in order, and puts them back if an error is raised within."""
    model, kept = find_transformer(walks.model), parse_pattern(pattern)
    assert kept is not None, "check_permute has seen the pattern"
    free, why = find_free_axes(model, trace(walks.model), walks.linears, kept[1])
    visitor = walks("block" if needs_data(criterion) else None, partial(OrderingVisitor, criterion, free, kept))
    axes = dict(sorted(visitor.ordered.items()))
    ordered = [(free[number], axis.orders) for number, axis in axes.items()]
    expected = logits_of(model)
    apply_orders(model, ordered)
    try:
        if not outputs_match(expected, logits_of(model), tolerance(model)):
            raise ValueError(f"model: {type(model).__name__} computes something else with its channels in another order")
        yield PermutationResult(type(model).__name__, str(criterion), pattern, tuple(axes.values()), why)
    except BaseException:
        undo_orders(model, ordered)
        raise
