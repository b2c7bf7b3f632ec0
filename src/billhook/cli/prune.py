"""`billhook prune`: prunes individual weights of a checkpoint."""

from dataclasses import replace

from billhook.cli.command_plan import matching_passes, matching_step, print_dry_run, print_plan
from billhook.cli.effort import Effort
from billhook.cli.examples import LabeledOptions
from billhook.cli.machine import model_progress
from billhook.cli.one_shot import OneShot
from billhook.cli.refit import check_examples, meta_batches, token_count
from billhook.cli.streamed import reconstruction_bytes, statistics_bytes
from billhook.engine import store_of
from billhook.model import ExpertLinear, adjacent_inputs, expert_layers, is_convolution
from billhook.sparsity.allocation import Allocation
from billhook.sparsity.checks import check_folder, check_pruning, needs_data, solves_for_weights, too_few_tokens
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.masks import check_amount
from billhook.sparsity.options import PruneOptions
from billhook.sparsity.prune import prune as prune_weights

TOLERANCE = 5e-5
"""Difference from the requested sparsity that is reported."""


def prune(
    model: str,
    out: str,
    examples: LabeledOptions,
    options: PruneOptions,
    effort: Effort,
    criterion: Criterion | None = None,
    sparsity: float | None = None,
    pattern: str = "unstructured",
    offload: bool = False,
    activations: str | None = None,
    dry_run: bool = False,
) -> None:
    """Sets the least important weights of a model to zero, and saves it.

    The checkpoint is verified, and perplexity or accuracy is measured before and after.

    Args:
        model: A folder, a Hub name, or "tiny".
        out: Output folder. It must be new, empty, or an earlier billhook checkpoint, which is replaced.
        examples: Calibration and evaluation data, and the device.
        options: Which layers are pruned, and how calibration statistics are computed.
        effort: How close the result stays to the dense model.
        criterion: Scores the weights: `Wanda` (the default), or any other `Criterion`, including a custom class.
        sparsity: Fraction of each linear layer's weights to zero, in [0, 1). Not with an N:M pattern.
        pattern: "unstructured", or "N:M" to keep N of every M consecutive inputs, such as 2:4.
        offload: If true, keeps the model in CPU memory and moves one block at a time to the device.
        activations: Folder for block outputs during calibration, with the device cpu, offload, or stream. Defaults to memory.
        dry_run: If true, scores the weights, prints the plan, and writes nothing.

    Raises:
        ValueError: If an argument is not legal or two contradict each other, before anything is written.
    """
    amount = check_amount(sparsity, pattern)
    folder = check_folder(activations)
    criterion = criterion or Wanda()
    options = replace(options, match=effort.match(options.match))
    allocation, match = options.allocation, options.match
    calibrates = needs_data(criterion) or options.needs_data
    work = OneShot(model, out, examples, offload, calibrates=calibrates, streams=True, effort=effort)
    store_of(work.model).check_writes_values()
    if match is not None:
        check_examples(work, 2, "match")
    check_folder(activations, work.model)
    with expert_layers(work.model):
        layers = check_pruning(work.model, criterion, pattern, options)
        statistics = max(statistics_bytes(work.model, criterion), reconstruction_bytes(work.model) if match else 0)
    tokens = token_count(meta_batches(work))
    counts = {
        name: (tokens, adjacent_inputs(layer))
        for name, layer in layers.items()
        if not is_convolution(layer) and not isinstance(layer, ExpertLinear)
    }
    step = f"prune linear layers to {100 * amount:.4g}% sparsity ({pattern}) with {criterion}"
    steps = [step] + ([] if match is None else [matching_step(work, match)])
    if not work.of_images and solves_for_weights(criterion) and (warning := too_few_tokens(criterion, counts)):
        steps.append(warning)
    refits = 0.0 if match is None else matching_passes(work, match)[1]
    print_plan(work, *steps, passes=_passes(criterion, allocation), refits=refits)
    if dry_run and work.must_generate:
        print_dry_run(work)
        return
    spill_folder = work.spill(statistics, runs=2 if match else int(options.sequential == "layer"))
    before = None if dry_run else work.measure()
    data = work.batches(dry_run) if calibrates else work.calibration
    if not dry_run:
        work.predict(data if isinstance(data, list) else [])
    with model_progress(work.model, "pruning", "linear layers") as progress:
        plan = prune_weights(
            work.model,
            criterion,
            data,
            sparsity,
            pattern,
            options=options,
            progress=progress,
            offload=work.device if offload else None,
            activations=folder or spill_folder,
            dry_run=dry_run,
        )
    lines = [plan.text()]
    if amount - plan.sparsity >= TOLERANCE:
        dense = plan.unsupported or plan.uncalled
        reason = (
            f"{amount:g} of the pruned layers; others stay dense" if dense else f"rounded down from {amount:g} to whole weights"
        )
        lines.append(f"Sparsity: {plan.sparsity:.4f} ({reason})")
    if dry_run:
        print_dry_run(work, "\n".join(lines))
        return
    record = {"criterion": plan.criterion, "pattern": pattern, "sparsity": plan.sparsity, "sequential": options.sequential}
    record |= {"match": str(match)} if match else {}
    record |= {"by_magnitude": dict(plan.by_magnitude)} if plan.by_magnitude else {}
    what = f"{plan.criterion}, {pattern}: sparsity {plan.sparsity:.4f} in {len(plan.pruned)} linear layers"
    work.save(before, what, {"pruned": record}, *lines)


def _passes(criterion: Criterion, allocation: Allocation | None) -> int:
    """Returns the number of passes over a streamed model, including applying the masks."""
    if criterion.compares == "global":  # three passes find the masks; criteria with data need one more to find the layers
        return 4 + needs_data(criterion)
    return 3 if allocation is not None and allocation.measures else 2
