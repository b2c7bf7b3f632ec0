"""Puts a model's channels in the order in which groups of N:M lose least: what it computes stays, and nothing is gathered."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from billhook.arguments import annotated
from billhook.calibration.calibration import Batches
from billhook.engine.comm import ALONE
from billhook.engine.device import check_device
from billhook.engine.store import store_of
from billhook.model.convolutions import Convolutions
from billhook.model.find import find_transformer
from billhook.model.runs.answers import alike, logits_of, tolerance
from billhook.model.values import check_changeable, check_plain
from billhook.sparsity.checks import check_folder, check_pruning, needs_data
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.masks import parse_pattern
from billhook.sparsity.orders.carry_out import put_back, put_in_order
from billhook.sparsity.orders.free import Free, find_free
from billhook.sparsity.orders.permuted import Permuted, Reordered
from billhook.sparsity.orders.visitor import Found, OrderingVisitor
from billhook.sparsity.walks import Walks, runs_for
from billhook.tracing.trace import trace
from billhook.units.gates import Gate

ROUNDS = 8
"""How often groups exchange channels."""


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
) -> Permuted:
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
        >>> done = bh.permute_for(model, "2:4", [{"input_ids": torch.arange(64)[None]}])
        >>> [(one.kind, one.where, one.orders.shape) for one in done.axes][:2]
        [('residual', 'model', (1, 256)), ('value', 'model.layers.0.self_attn', (8, 32))]
        >>> all(before <= then for before, then in (one.kept for one in done.axes))
        True
    """
    annotated(permute_for, locals())
    criterion = criterion or Wanda()
    check_permute(pattern, stream=store_of(model).in_files)
    check_permutable(model)
    linears = check_pruning(model, criterion, pattern, "block", None, skip, output_embeddings, convolutions)
    runs = runs_for(model, batches, [criterion] if needs_data(criterion) else [], ALONE)
    walks = Walks(model, linears, runs, ALONE, check_device(offload), check_folder(activations), {})
    with in_order(walks, criterion, pattern) as done:
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
def in_order(walks: Walks, criterion: Criterion, pattern: str) -> Iterator[Permuted]:
    """Puts channels in order, and puts them back if an error is raised within."""
    model, kept = find_transformer(walks.model), parse_pattern(pattern)
    assert kept is not None, "check_permute has seen the pattern"
    free, why = find_free(model, trace(walks.model), walks.linears, kept[1])
    make = partial(OrderingVisitor, criterion, free, kept, ROUNDS)
    found = walks("block" if needs_data(criterion) else None, make).found
    ordered = [(free[number], orders.numpy()) for number, (orders, *_) in found.items()]
    expected = logits_of(model)
    put_in_order(model, ordered)
    try:
        if not alike(expected, logits_of(model), tolerance(model)):
            raise ValueError(f"model: {type(model).__name__} computes something else with its channels in another order")
        axes = tuple(_told(free[number], one) for number, one in sorted(found.items()))
        yield Permuted(type(model).__name__, str(criterion), pattern, axes, why)
    except BaseException:
        put_back(model, ordered)
        raise


def _told(free: Free, found: Found) -> Reordered:
    orders, before, then = found
    return Reordered(free.group.kind, free.group.where, tuple(free.readers), orders.numpy(), (before, then))
