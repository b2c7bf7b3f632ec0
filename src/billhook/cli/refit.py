"""Checks, before a command runs, whether the examples are enough to refit linear layers."""

from collections.abc import Mapping, Sequence

import torch

from billhook.cli.one_shot import OneShot
from billhook.engine import Batch
from billhook.model import is_linear
from billhook.pruning.cut import Cut
from billhook.pruning.target import RatioSearch
from billhook.repairs.residuals import NoRepair

NOT_REPAIRED = "no repair:"
"""First words of a plan line on a repair that is not possible."""


def meta_batches(work: OneShot) -> list[Batch]:
    """Returns batches without values, of the size of the calibration batches."""
    batches, batch_size = list[Batch](), work.options.batch_size
    for source, count in work.example_counts.items():
        for start in range(0, count, batch_size):
            ids = torch.empty(min(batch_size, count - start), work.length, device="meta")
            batches.append(Batch({"input_ids": ids}, source))
    return batches


def check_examples(work: OneShot, least: int, what: str) -> None:
    """Raises if there are too few examples.

    Args:
        work: The command.
        least: Minimum number of examples.
        what: The option that needs them.
    """
    if (count := sum(work.example_counts.values())) < least:
        raise ValueError(f"--examples {count} is too few: {what} needs at least {least}, because it holds some out.")


def remaining_inputs(search: RatioSearch, cut: Cut, most: bool) -> dict[str, int]:
    """Returns how many inputs a cut leaves to each consumer layer.

    If scores decide the number per layer, it is the largest or smallest possible: all inputs, or one.

    Args:
        search: The units and ratios.
        cut: The cut.
        most: If True, returns the largest possible number, otherwise the smallest.
    """
    remaining: dict[str, int] = {}
    for name, units in search.units.items():
        if name in cut.units and units.kind in ("head", "channel"):
            inputs = len(units.index) if most else 1
            if search.amount.ranking == "layer":
                inputs = len(units.index) * cut.after[name][0] // cut.before[name][0]
            layers = () if units.of_experts else units.readers
            consumers = [layer for layer in layers if is_linear(search.model.get_submodule(layer))]
            remaining |= dict.fromkeys(consumers, inputs)
    return remaining


def repair_limits(
    work: OneShot, needed: Mapping[str, int], batches: Sequence[Batch], required: bool, experts: bool = False
) -> str:
    """Returns a plan line on linear layers that cannot be refitted, or an empty string.

    Args:
        work: The command, with its examples.
        needed: Minimum number of tokens for each linear layer to refit: the number of inputs that it keeps.
        batches: Calibration batches, or batches of the same size. Padded examples may have fewer tokens.
        required: If True, raises if no linear layer can be refitted.
        experts: Whether experts are refitted, which need no number of tokens.

    Raises:
        NoRepair: If no linear layer can be refitted and that is required.
    """
    tokens, problem = token_count(batches), ""
    rows = sum(len(batch["input_ids"]) for batch in batches if "input_ids" in batch)
    short = [] if work.of_images else [name for name, count in needed.items() if count > tokens]
    if not needed and not experts:
        problem = "no linear layer reads the removed units."
    elif rows < 2 and not work.of_images:
        problem = (
            f"repair needs at least 2 examples, to choose the ridge penalty, got {rows}. Use more --examples, or a longer text."
        )
    elif len(short) == len(needed) and not experts:
        first, examples = min(needed, key=needed.__getitem__), work.options.examples
        size = "" if examples is None else f"--examples {examples} "
        problem = (
            f"{size}--length {work.length} gives {tokens:,} tokens, and {first} needs at least {needed[first]:,}. Use more or "
            "longer examples."
        )
    if problem and required:
        raise NoRepair(f"{problem} Or use --repair null.")
    if problem:
        return f"{NOT_REPAIRED} {problem}"
    if not short:
        return ""
    layers = f"up to {len(short)} of {len(needed)} consumer layers"
    return f"no repair of {layers}: they keep more inputs than there are calibration tokens ({tokens:,})"


def token_count(batches: Sequence[Batch]) -> int:
    """Returns the number of tokens in batches, with padding."""
    return sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
