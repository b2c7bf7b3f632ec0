"""Plans of one-shot commands, as they print them: steps, expected time, dry runs."""

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from billhook.atomic_folder import replacement_note
from billhook.calibration.calibration import MIXED, num_self_generated
from billhook.calibration.generated import GENERATED, can_generate
from billhook.cli.one_shot import OneShot
from billhook.cli.streamed import batch_count, io_summary, matching_of
from billhook.engine import evaluating, store_of
from billhook.model import small_inputs, text_config
from billhook.progress import format_duration
from billhook.pruning.repair import RepairOption
from billhook.repairs.matching import EVALUATIONS, LEAST_STEPS, BlockMatching
from billhook.repairs.polish import PolishConfig

WARMUP_TOKENS = 8
"""Tokens of a first example that is not timed: it also pays for initialization."""
REPAIR_PASSES = 3
"""About how many calibration passes a repair takes, with its solvers."""
LONG = 120.0
"""Seconds from which the expected time is printed."""


def repair_step(work: OneShot, repair: RepairOption, what: str) -> str:
    """Returns the line of the plan about a repair of some layers."""
    refit, matching = f"refit {what} by least squares", matching_of(repair)
    return refit if matching is None else f"{refit}, then {matching_step(work, matching, LEAST_STEPS)}"


def matching_step(work: OneShot, matching: BlockMatching, least_steps: int = 0) -> str:
    """Returns the line of the plan about block-wise reconstruction, with its time and memory."""
    steps, passes = matching_passes(work, matching, least_steps)
    memory = ""
    if not work.of_images:  # each example's input of a block, its output, and its target
        numbers = sum(work.example_counts.values()) * work.length * text_config(work.model.config).hidden_size
        memory = f" and {3 * numbers * work.model.dtype.itemsize / 1e6:,.1f} MB"
    return f"reconstruct each block in {steps} steps (takes about {passes:.3g} calibration passes{memory})"


def matching_passes(work: OneShot, matching: BlockMatching, least_steps: int = 0) -> tuple[int, float]:
    """Returns the steps of block-wise reconstruction, and about how many calibration passes they take."""
    numbers_of_batches = {name: batch_count([count], work.options.batch_size) for name, count in work.example_counts.items()}
    sources = [name for name, number in numbers_of_batches.items() for _ in range(number)]
    batches, held_out = len(sources), sum(matching.is_held_out(sources))
    steps = matching.num_steps(batches - held_out, least_steps)
    # two runs of the model; for each block, forward and backward per step, and the held-out batches before and in between
    return steps, 2 + (3 * steps + (1 + EVALUATIONS) * held_out) / batches


def refit_passes(work: OneShot, repair: RepairOption) -> float:
    """Returns about how many calibration passes a repair takes."""
    if repair is None:
        return 0.0
    matching = matching_of(repair)
    return REPAIR_PASSES + (0 if matching is None else matching_passes(work, matching, LEAST_STEPS)[1])


def print_plan(
    work: OneShot,
    *steps: str,
    passes: int = 1,
    exact: bool = True,
    unknown: Sequence[object] = (),
    cost: float = 2,
    refits: float = 0,
    may_end_early: bool = False,
) -> None:
    """Prints the steps of a command before it runs them.

    Args:
        work: The command.
        steps: The steps up to calibrating, measuring, and saving.
        passes: Number of passes over a streamed model that the steps need.
        exact: If False, `passes` is an upper bound.
        unknown: Importances that need an unknown number of further passes.
        cost: About how many calibration passes the change itself takes, without a repair.
        refits: About how many calibration passes repairs and block-wise reconstruction take.
        may_end_early: Whether `cost` is an upper bound.
    """
    data = work.options.data or work.options.also
    examples = f"{work.options.evaluate} examples per text"
    if work.metric == "accuracy":
        examples = f"{work.options.evaluate} examples"
    elif not data:
        examples += " (--data FILE uses your text)"
    metric = "bits per byte" if work.as_text and work.metric == "perplexity" else work.metric
    measure = [f"measure {metric} before and after, on {examples}"] if work.measures else []
    store, more = store_of(work.model), 2 * work.measures
    streams = [] if store.holds_all else [io_summary(store, passes + more, exact, unknown)]
    print(f"Model: {work.name} ({work.model.num_parameters():,} parameters)\nPlan:")
    # without calibration data, tokens are counted in text, which their step names
    calibration = [_calibration_step(work)] if work.calibrates or not work.as_text else []
    polishes = [] if work.polish is None else [polish_step(work.polish)]
    for step in (*steps, *polishes, *calibration, *measure, *streams, f"save to {work.out}{replacement_note(work.out)}"):
        print(f"  {step}", flush=True)
    if line := _expected_time(work, cost, refits):  # which takes a while for a large model
        print(f"  {'at most ' if may_end_early else ''}{line}")
    print(flush=True)


def _expected_time(work: OneShot, cost: float, refits: float) -> str:
    """Returns a line on the time of the whole command, if it is long."""
    calibrated = sum(work.example_counts.values()) if work.calibrates else 0
    measured = work.measured_count if work.measures else 0
    if work.options.stream or work.offloaded_blocks or not (calibrated or measured):
        return ""
    time_forward(work.model, WARMUP_TOKENS)
    each = time_forward(work.model, work.length)
    fast = passes = cost * calibrated + 2 * measured
    passes += calibrated * refits
    if work.polish is not None:  # the dense model's predictions, forward and backward of each step, and the held-out examples
        passes += 2 * calibrated + 3 * work.polish.steps * work.polish.batch_size
    if each * passes < LONG:
        return ""
    saved = f" (--effort fast: {format_duration(each * fast)})" if passes > fast else ""
    return f"about {format_duration(each * passes)} in all{saved}"


def polish_step(polish: PolishConfig) -> str:
    """Returns the line of the plan about a polish."""
    trained = {"scales": "norms and scales", "lora": "LoRA adapters", "all": "all weights"}[polish.trains]
    return f"polish {trained} toward the dense model's predictions in {polish.steps} steps of {polish.batch_size} examples"


def _calibration_step(work: OneShot) -> str:
    if not work.calibrates:
        return "no calibration data needed"
    if work.metric == "accuracy":
        return f"calibrate on {work.labeled.count} examples (source: {work.labeled.source('train')})"
    counts = work.example_counts
    names = {name: {GENERATED: "self-generated text", MIXED: "packaged text"}.get(name, name) for name in counts}
    sources = f"source: {next(iter(names.values()))}"
    if len(counts) > 1:
        sources = "sources: " + ", ".join(f"{count} from {names[name]}" for name, count in counts.items())
    return f"calibrate on {sum(counts.values())} examples of {work.length} tokens ({sources})"


def print_dry_run(work: OneShot, plan: str = "") -> None:
    """Prints the plan of a dry run, and how many tokens the command would generate."""
    if plan:
        print(f"{plan}\n")
    print(f"Dry run: {work.out} was not written.")
    tokens = dict[str, int]()
    if work.metric == "perplexity" and can_generate(work.model):
        if work.calibrates:
            tokens["calibration"] = work.example_counts.get(GENERATED, 0) * work.length
        if work.measures and not work.options.stream:
            tokens["evaluation"] = num_self_generated(work.calibration, work.options.evaluate, work.length) * work.length
    if total := sum(tokens.values()):
        purposes = " and ".join(purpose for purpose, count in tokens.items() if count)
        print(f"Without --dry_run, the model first generates {total:,} tokens for {purposes}.")
        if not plan:
            print("With --data FILE, a dry run prints the whole plan.")


@torch.no_grad()
def time_forward(model: PreTrainedModel, length: int) -> float:
    """Returns the seconds of a forward pass on one example of random tokens."""
    inputs = small_inputs(model, 1, length)
    with evaluating(model):
        start = time.monotonic()
        outputs = model(**inputs, return_dict=True)
        float(outputs[0].sum())  # waits for an asynchronous device
        return time.monotonic() - start
