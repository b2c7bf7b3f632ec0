"""Channel permutation for N:M pruning: reorders channels without changing the output."""

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
from billhook.engine.state import cpu_by_default, uninterrupted
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
    """The new channel order of a model; `print` shows a table.

    Attributes:
        model: Class name of the model.
        criterion: Criterion that scored the weights, as text.
        pattern: `"N:M"`.
        axes: Axes with a new order.
        left: Reasons why other axes keep their order, by kind and module.
    """

    model: str
    criterion: str
    pattern: str
    axes: tuple[ReorderedAxis, ...]
    left: dict[str, str]

    def _renderables(self) -> list[RenderableType]:
        """Shows similar axes in a row: number of orders, units, and mean share of kept scores."""
        similar: dict[tuple[str, int], list[ReorderedAxis]] = defaultdict(list)
        for axis in self.axes:
            name = f"{axis.kind} in {axis.where or 'the model'}"
            similar[re.sub(r"\b\d+\b", "*", name), axis.orders.shape[1]].append(axis)
        rows = []
        for (name, units), axes in similar.items():
            before, after = np.mean([axis.kept for axis in axes], axis=0)
            sets = sum(len(axis.orders) for axis in axes)
            rows.append((name, f"{sets:>4} x {units:>6,}  {before:.4f} -> {after:.4f}"))
        title = (
            f"{self.model}, channels permuted for {self.pattern} with {self.criterion} (share of scores kept, before -> after)"
        )
        lines: list[RenderableType] = [title, text_table(rows, aligns="<", indent=2)]
        for name, reason in self.left.items():
            lines.append(f"  {name}: not permuted ({reason})")
        return lines


Ordered = Sequence[tuple[FreeAxis, Indices]]
"""Axes, each with the unit at each position of each set: int64, `[sets, units]`."""


def apply_orders(model: nn.Module, ordered: Ordered) -> None:
    """Reorders units in place: parameters, gradients, and buffers.

    After an interrupt all or none have moved. Needs at most as much extra memory as the largest tensor, allocated before any
    change.

    Raises:
        MemoryError: Before any change, if memory is too small; or torch's own error.
    """
    moves = _moves(model, ordered)  # nothing has changed yet, so an interrupt here needs no undo
    try:
        _move(moves)
    except KeyboardInterrupt:  # delayed until all have moved
        undo_orders(model, ordered)
        raise


def undo_orders(model: nn.Module, ordered: Ordered) -> None:
    """Restores the old order, bitwise identical. An interrupt is raised at the end."""
    _move(_moves(model, [(free, np.argsort(orders, axis=1)) for free, orders in ordered]))


def _moves(model: nn.Module, ordered: Ordered) -> list[tuple[Tensor, int, Tensor]]:
    """Returns the tensors to reorder, each with its dimension and the source of each slice."""
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


@cpu_by_default()
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
    """Reorders channels so that N:M groups keep most of their scores, in place.

    Reorders MLP channels, value dimensions of heads, and hidden dimensions wherever dependency tracing shows that the order does
    not matter. Producer rows and consumer columns move together, so the output stays the same and nothing is gathered at run
    time. Dimensions that position embeddings rotate are not reordered, and neither are heads, which fill whole groups.
    Reference: Zhang et al., ICLR 2024, https://openreview.net/forum?id=Tr0lPx9woF, and Pool & Yu, NeurIPS 2021.

    After an error the model is unchanged. Create optimizers afterwards, because they do not follow.

    Args:
        model: A Hugging Face model, also with LoRA attached, or a module that holds one.
        pattern: `"N:M"`, which keeps N of every M consecutive inputs.
        batches: Calibration data, as in `prune`.
        criterion: Scores the weights. Defaults to `Wanda()`. The order of an axis maximizes the kept scores of all its consumer
            layers.
        skip: Glob pattern of linear layers that will not be pruned, or several.
        output_embeddings: If True, the output embedding (`lm_head`) or classification head will be pruned, too.
        convolutions: Which convolutions will be pruned. See `PruneOptions`.
        offload: Device on which blocks run one at a time, with copies of their parameters. Defaults to None (off).
        activations: Folder for temporary files with module outputs. Defaults to None (memory). Other state of waiting runs, such
            as attention masks, stays in memory.

    Returns:
        The new order, with the share of kept scores before and after; `print` shows it.

    Raises:
        ValueError: If an argument is not legal, the model is quantized, sharded, or streamed, or its logits would change.

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
    walks = Walks(model, linears, runs, SINGLE_PROCESS, check_device(offload), check_folder(activations, model), {})
    with permuted(walks, criterion, pattern) as done:
        return done


def check_permute(pattern: str, dry_run: bool = False, stream: bool = False, ranks: bool = False) -> None:
    """Raises if an argument cannot be combined with channel permutation."""
    if parse_pattern(pattern) is None:
        raise ValueError(f"pattern={pattern!r}: channel order matters only for N:M patterns. Use one such as '2:4'.")
    if dry_run:
        raise ValueError(
            "permute=True cannot be combined with dry_run=True, because it changes the model. Call permute_for first."
        )
    if stream:
        raise ValueError(
            "permute does not support streamed models, because a channel order affects all blocks. Load the model into memory."
        )
    if ranks:
        raise ValueError(
            "permute=True does not support reduce, because ranks would find different orders. Call permute_for first."
        )


def check_permutable(model: nn.Module) -> None:
    """Raises if the channels of a model cannot be reordered."""
    check_changeable(model)
    check_plain(find_transformer(model), "Permute the model before it is")
    for name, module in model.named_modules():
        if any(isinstance(hook, Gate) for hook in module._forward_pre_hooks.values()):
            raise ValueError(f"model: {name} has a mask or gates. Remove them first (mask.remove()).")


@contextmanager
def permuted(walks: Walks, criterion: Criterion, pattern: str) -> Iterator[PermutationResult]:
    """Reorders channels, and restores the old order after an error in the context."""
    model, kept = find_transformer(walks.model), parse_pattern(pattern)
    assert kept is not None, "check_permute has seen the pattern"
    free, reasons = find_free_axes(model, trace(walks.model), walks.layers, kept[1])
    visitor = walks("block" if needs_data(criterion) else None, partial(OrderingVisitor, criterion, free, kept))
    axes = dict(sorted(visitor.ordered.items()))
    ordered = [(free[number], axis.orders) for number, axis in axes.items()]
    expected = logits_of(model)
    apply_orders(model, ordered)
    try:
        if not outputs_match(expected, logits_of(model), tolerance(model)):
            raise ValueError(f"model: the logits of {type(model).__name__} change with the channel order. It was restored.")
        yield PermutationResult(type(model).__name__, str(criterion), pattern, tuple(axes.values()), reasons)
    except BaseException:
        undo_orders(model, ordered)
        raise
