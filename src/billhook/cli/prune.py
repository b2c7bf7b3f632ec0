"""`billhook prune`: a checkpoint in, one with zeros out, with its perplexity before and after."""

from collections.abc import Mapping

from torch import nn

from billhook.cli.examples import NONE, Pictures
from billhook.cli.machine import over
from billhook.cli.one_shot import OneShot
from billhook.cli.refit import check_examples, meta_batches
from billhook.cli.streamed import bytes_of_match, bytes_of_moments
from billhook.model.layers import adjacent_inputs, is_convolution
from billhook.sparsity.allocation import Allocation
from billhook.sparsity.checks import check_folder, check_pruning, needs_data, solves_for_weights, too_few_tokens
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.masks import check_amount
from billhook.sparsity.options import PruneOptions
from billhook.sparsity.permute import check_permute
from billhook.sparsity.prune import prune as prune_weights

LESS = 5e-5
"""How much less than was asked for is said to be less."""


def prune(
    model: str,
    out: str,
    examples: Pictures,
    options: PruneOptions,
    criterion: Criterion | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    offload: bool = False,
    activations: str | None = None,
    permute: bool = False,
    dry_run: bool = False,
) -> None:
    """Zeroes the least important weights of a model and saves it, verified, with its perplexity before and after.

    Args:
        model: A folder, a hub name, or "tiny".
        out: The folder to write; new, empty, or an earlier checkpoint of billhook's.
        examples: Text, or images with labels, to calibrate and to measure on, and the place to compute.
        options: Which linears are pruned, and by what inputs.
        criterion: How weights are scored: `Wanda` (the default), or any other `Criterion`, also a class of your own.
        sparsity: Fraction of each linear's weights that become zero, in [0, 1); not with a pattern N:M.
        pattern: "unstructured", or "N:M": N are kept of every M consecutive inputs, as in 2:4.
        offload: Whether the model stays in the CPU's memory, and its blocks visit the device one at a time.
        activations: A folder for the outputs of the model's modules during calibration; by default they stay in memory, and
            in any case what else batches hold while they wait for each other.
        permute: Whether channels are first put in the order in which groups of N:M lose least; the model then computes the same,
            and nothing is gathered. Not with dry_run.
        dry_run: Score the weights, print the plan and write nothing.

    Raises:
        ValueError: If an argument is not legal or two contradict each other; before anything is written.
    """
    amount = check_amount(sparsity, pattern)
    if permute:
        check_permute(pattern, dry_run, examples.stream)
    folder = check_folder(activations)
    allocation, match = options.allocation, options.match
    reads = needs_data(criterion or Wanda()) or options.needs_data
    work = OneShot(model, out, examples, offload, calibrates=reads, streams=True)
    if match is not None:
        check_examples(work, 2, "match")
    scored_by = criterion or Wanda()
    linears = check_pruning(work.model, scored_by, pattern, options)
    how = f"{scored_by}" + (f", and match each block by {match}" if match else "")
    order = ", channels in the order in which groups lose least" if permute else ""
    what = f"zero {amount:.4g} of the weights of linears ({pattern}), by {how}{order}"
    few = [] if work.of_images or not solves_for_weights(scored_by) else [too_few_tokens(scored_by, _given(work, linears))]
    work.tell(what, *filter(None, few), f"shown {work.shown if reads else NONE}", passes=_passes(scored_by, allocation))
    if dry_run and work.calibrates and work.unread:
        work.tell_dry()
        return
    most = max(bytes_of_moments(work.model, scored_by), bytes_of_match(work.model) if match else 0)
    rests = work.rest(most, inside=2 if match else int(options.sequential == "layer"))
    before = None if dry_run else work.measure()
    shown = work.batches() if reads and work.metric == "accuracy" else work.calibration
    with over(work.model, "pruning", "linears") as progress:
        plan = prune_weights(
            work.model,
            criterion,
            shown,
            sparsity,
            pattern,
            options=options,
            progress=progress,
            offload=work.device if offload else None,
            activations=folder or rests,
            permute=permute,
            dry_run=dry_run,
        )
    fewer = amount - plan.sparsity >= LESS
    note = f"sparsity={amount:g} gives {plan.sparsity:.4f}: the number of weights is rounded down" if fewer else None
    if dry_run:
        work.tell_dry("\n".join(filter(None, [plan.text(), note])))
        return
    done = {"criterion": plan.criterion, "pattern": pattern, "sparsity": plan.sparsity, "sequential": options.sequential}
    done |= {"match": str(match)} if match else {}
    done |= {"permute": True} if permute else {}
    what = f"{plan.criterion}, {pattern}: sparsity {plan.sparsity:.4f} in {len(plan.pruned)} linears"
    work.save(before, what, {"pruned": done}, plan.text(), note)


def _given(work: OneShot, linears: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Returns how many tokens each linear is given at most, and how many inputs it has."""
    tokens = sum(batch["input_ids"].numel() for batch in meta_batches(work))
    return {name: (tokens, adjacent_inputs(linear)) for name, linear in linears.items() if not is_convolution(linear)}


def _passes(criterion: Criterion, allocation: Allocation | None) -> int:
    """Returns how often the blocks of a streamed model are read until they are pruned: also to put masks in place."""
    if criterion.compares == "global":  # masks are found in three, after one in which linears are seen, if they must be
        return 4 + needs_data(criterion)
    return 3 if allocation is not None and allocation.measures else 2
