"""Prunes a model's weights in one shot: checks, plans while the model stays as it is, applies."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from billhook.arguments import check_types
from billhook.calibration.calibration import Batches, log_once
from billhook.engine.comm import SINGLE_PROCESS, Comm, Reduce
from billhook.engine.device import check_device
from billhook.engine.passes import blockwise
from billhook.engine.sharding import is_sharded
from billhook.engine.store import store_of
from billhook.model.find import check_changeable
from billhook.model.layers import adjacent_inputs, is_convolution, size_of
from billhook.sparsity.allocation import allocate_sparsities
from billhook.sparsity.checks import (
    check_called,
    check_called_once,
    check_folder,
    check_matching,
    check_pruning,
    check_sharded,
    check_streamed,
    count_tokens,
    find_countable_adapters,
    make_runs,
    needs_data,
    solves_for_weights,
    too_few_tokens,
    warn_of_unsupported_weights,
)
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.masks import check_amount
from billhook.sparsity.matching import MatchingVisitor
from billhook.sparsity.options import PruneOptions
from billhook.sparsity.permute import check_permutable, check_permute, permuted
from billhook.sparsity.visitor import GlobalPruningVisitor, Progress, PruningVisitor, Walks
from billhook.sparsity.weight_plan import WeightPlan


def prune(
    model: nn.Module,
    criterion: Criterion | None = None,
    batches: Batches | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    *,
    options: PruneOptions | None = None,
    count_adapters: bool = False,
    reduce: Reduce | None = None,
    progress: Progress | None = None,
    offload: str | torch.device | None = None,
    activations: str | None = None,
    permute: bool = False,
    dry_run: bool = False,
) -> WeightPlan:
    """Zeroes the least important weights of a model's linear layers and convolutions, in place and in one shot.

    If a criterion or a run fails, nothing has changed. An interrupt while finished masks are put into a model in memory leaves
    some of its weights as they were: the same call again finishes with the same masks if the criterion is `Magnitude` or `Wanda`
    and neither `allocation`, `match` nor `permute` is given, as zeros score lowest. Modes, random numbers, hooks and configs are
    as before afterwards.

    Args:
        model: A model of transformers, with LoRA attached or not (its base weights are pruned), or any module that the batches
            can be given to.
        criterion: How important a weight is; `Wanda()` by default.
        batches: Calibration data: each batch is what the model's forward takes, as a dictionary, a tuple or a tensor. Padding
            (`attention_mask`, `decoder_attention_mask`) does not count. A `Calibration` reads them; by default they are what a
            language model itself writes.
        sparsity: Fraction of each linear's weights that become zero, in [0, 1); None with a pattern N:M.
        pattern: `"unstructured"`, or `"N:M"`: N are kept of every M consecutive inputs; of a convolution, of M channels of a tap.
        options: Which linears are pruned and by what inputs, such as `PruneOptions(sequential="layer")`.
        count_adapters: Whether LoRA counts as if it were merged: a criterion that leaves kept weights as they are then sees
            W + scale B A of the active adapters, in float32. W is pruned, and zeros are pruned first; the adapters stay as they
            are, and `merge` keeps every zero.
        reduce: Sums a tensor over ranks, in place, where each rank has batches of its own.
        progress: Called with how many linears are done, and of how many.
        offload: A device, such as `"cuda"`, on which the blocks of a model in memory or in files compute, one at a time, with
            copies of their parameters, the next block's on their way; the outputs of a block go back to where the model is.
        activations: A folder for the outputs of the model's modules, in files that are removed afterwards; by default memory.
            What else runs hold while they wait for each other, such as masks, stays in memory.
        permute: Whether channels are first put in the order in which groups of N:M lose least, as `permute_for` does.
        dry_run: Whether the model stays as it is; `bh.apply(model, plan)` carries out the plan later.

    Returns:
        The plan, carried out unless `dry_run`; `print` shows it.

    Raises:
        ValueError: If an argument is not legal, two contradict each other, the criterion needs data and there is none, a linear
            is quantised or of a width that M does not divide, or weights or statistics hold NaN or inf. With `count_adapters`,
            also if the criterion updates weights, or there is no plain LoRA that is active and not merged; with `match`, if
            all blocks are pruned at once, there are fewer than two batches, or the model calls a block again.

    Example:
        >>> import billhook as bh
        >>> model = bh.load("tiny")
        >>> options = bh.PruneOptions(skip=["*.mlp.*", "*.[kvo]_proj"])
        >>> print(bh.prune(model, bh.Magnitude(), sparsity=0.5, options=options, dry_run=True))
        Magnitude(compares='layer'), unstructured
          model.layers.*.self_attn.q_proj     4 x [   256,    256]  sparsity 0.5000
        >>> round(bh.prune(model, bh.Wanda(), [{"input_ids": torch.arange(64)[None]}], pattern="2:4").sparsity, 2)
        0.5
    """
    check_types(prune, locals())
    criterion, options = criterion or Wanda(), options or PruneOptions()
    allocation, match = options.allocation, options.match
    amount, device, folder = check_amount(sparsity, pattern), check_device(offload), check_folder(activations)
    check_changeable(model)
    comm = Comm.of(reduce, model)  # asks which rank this is: after what is checked on each alone
    if permute:
        check_permute(pattern, dry_run, not store_of(model).holds_all, comm is not SINGLE_PROCESS)
        check_permutable(model)
    if is_sharded(model):
        check_sharded(criterion, allocation, comm, offload)
    check_streamed(model, comm)
    with nullcontext() if dry_run else store_of(model).restored_on_error():
        with blockwise(model):
            linears = check_pruning(model, criterion, pattern, options)
            if match is not None:
                check_matching(criterion, options.sequential, count_adapters)
            adapters = find_countable_adapters(model, criterion, linears) if count_adapters else {}
            runs = make_runs(model, batches, comm, criterion, allocation, match)
            check_called_once(model, runs)
            warn_of_unsupported_weights(model, linears)
            # what solves for weights needs as many tokens as inputs: said before the work as far as that is known
            expected, total = dict[str, tuple[int, int]](), count_tokens(runs, comm) if solves_for_weights(criterion) else None
            if total is not None:
                expected = {n: (total, adjacent_inputs(linear)) for n, linear in linears.items() if not is_convolution(linear)}
            if words := too_few_tokens(criterion, expected):
                log_once(words)
            walks = Walks(model, linears, runs, comm, device, folder, adapters)
            with permuted(walks, criterion, pattern) if permute else nullcontext():
                sparsities = (
                    dict.fromkeys(linears, amount) if allocation is None else allocate_sparsities(walks, amount, allocation)
                )
                words = f"{criterion} {pattern} {options.sequential} {sparsities}" + (f" {match}" if match else "")
                kind: Callable[..., PruningVisitor] = GlobalPruningVisitor if criterion.compares == "global" else PruningVisitor
                if match is not None:
                    kind = partial(MatchingVisitor, match)
                visitor = walks(
                    options.sequential if needs_data(criterion) or match else None,
                    partial(kind, criterion, sparsities, pattern, progress),
                    None if dry_run else words,
                )
                pruned = {name: visitor.pruned[name] for name in linears if name in visitor.pruned}
                left_out = check_called(linears, pruned)
            # experts are given only some of the tokens
            fewer = {name: seen for name, seen in visitor.tokens.items() if name not in expected or seen[0] < expected[name][0]}
            if words := too_few_tokens(criterion, fewer):
                log_once(words)
        shapes = {name: size_of(linear) for name, linear in linears.items()}
        plan = WeightPlan(type(model).__name__, str(criterion), pattern, pruned, shapes, left_out)
        if not dry_run:
            plan.apply(model)
    return plan
