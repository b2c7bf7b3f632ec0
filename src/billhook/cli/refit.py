"""Says before the work whether the examples are enough to refit linears to, in terms of the options that they come from."""

from collections.abc import Mapping, Sequence

import torch

from billhook.cli.one_shot import OneShot
from billhook.engine.batches import Batch
from billhook.model.layers import is_linear
from billhook.pruning.cut import Cut
from billhook.pruning.target import RatioSearch
from billhook.repairs.residuals import NoRepair

REFIT = "refit the linears that read them, by least squares"


def meta_batches(work: OneShot) -> list[Batch]:
    """Returns batches as large as those that a model will be shown, if the texts are long enough; without any values."""
    batches, most = list[Batch](), work.examples.batch_size
    for source, count in zip(work.sources, work.rows, strict=True):
        for start in range(0, count, most):
            ids = torch.empty(min(most, count - start), work.length, device="meta")
            batches.append(Batch({"input_ids": ids}, source))
    return batches


def check_examples(work: OneShot, least: int, what: str) -> None:
    """Refuses fewer examples than are needed at least."""
    if (rows := sum(work.rows)) < least:
        raise ValueError(f"--examples {rows}: {what} needs {least} at least, as some are held out")


def inputs_left(search: RatioSearch, cut: Cut, most: bool) -> dict[str, int]:
    """Returns how many inputs a cut leaves at most, or at least, to each linear that reads units; if scores decide, all, or 1."""
    left: dict[str, int] = {}
    for name, units in search.units.items():
        if name in cut.units and units.kind in ("head", "channel"):
            inputs = len(units.index) if most else 1
            if search.amount.ranking == "layer":
                inputs = len(units.index) * cut.after[name][0] // cut.before[name][0]
            readers = [reader for reader in units.readers if is_linear(search.model.get_submodule(reader))]
            left |= dict.fromkeys(readers, inputs)
    return left


def refits(work: OneShot, needed: Mapping[str, int], batches: Sequence[Batch], must: bool) -> str:
    """Returns the words for linears that cannot be refitted, as far as that is known before; empty if all can be.

    Args:
        work: It says what the examples are.
        needed: By linear that is refitted, how many tokens that takes: as many as it keeps inputs.
        batches: What it is fitted to, or as large as that; of padded examples that is the most that they may have.
        must: Whether it is refused that no linear can be refitted.

    Raises:
        NoRepair: If none can be, and it must.
    """
    why, short = _none(work, needed, batches), list[str]()
    if why and must:
        raise NoRepair(f"{why}; --repair null does without")
    if why:
        return f"not repaired: {why}"
    if not work.of_images:
        short = [name for name, number in needed.items() if number > _tokens(batches)]
    inputs = f"that keep more inputs than there are tokens to fit to, {_tokens(batches):,}"
    return f"cut and not refitted: linears {inputs} (up to {len(short)} of {len(needed)})" if short else ""


def _none(work: OneShot, needed: Mapping[str, int], batches: Sequence[Batch]) -> str:
    """Says why no linear at all can be refitted; empty if one can be, as far as is known."""
    examples, tokens = work.examples, _tokens(batches)
    if not needed:
        return "no linear layer reads what is removed, so none can make up for it"
    if (rows := sum(len(batch["input_ids"]) for batch in batches if "input_ids" in batch)) < 2 and not work.of_images:
        return f"--examples {examples.examples or rows}: a refit needs two at least, as some are to choose the ridge; got {rows}"
    if work.of_images or any(number <= tokens for number in needed.values()):
        return ""
    first = min(needed, key=lambda name: needed[name])
    size = "" if examples.examples is None else f"--examples {examples.examples}, "
    few = f"{size}--length {work.length}: too few tokens for any refit"
    return f"{few}: {tokens:,} are fitted to, and {first} needs {needed[first]:,}"


def _tokens(batches: Sequence[Batch]) -> int:
    return sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
