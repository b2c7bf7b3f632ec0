"""`billhook shrink`: searches for the best model within one budget."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from billhook.arguments import check_int, check_number
from billhook.cli.command_plan import matching_step, print_dry_run, print_plan, refit_passes
from billhook.cli.effort import Effort
from billhook.cli.examples import Examples
from billhook.cli.interruption import default_variant_cache
from billhook.cli.machine import check_file
from billhook.cli.one_shot import OneShot, degradation_text
from billhook.cli.refit import meta_batches, repair_limits
from billhook.cli.streamed import matching_of
from billhook.model import stacks_of
from billhook.progress import progress_bar
from billhook.repairs.matching import LEAST_STEPS
from billhook.repairs.polish import PolishConfig, Trained
from billhook.shrinking.divergence import TOKENS, split_batches
from billhook.shrinking.result import Budget, Search
from billhook.shrinking.scope import Progress, SearchScope
from billhook.shrinking.shrink import Layers, check_variant_cache, resolve_repair, run_shrink
from billhook.shrinking.variants import tokens_needed
from billhook.tracing.show import name_pattern
from billhook.units import PLURAL


@dataclass(frozen=True)
class Recovery:
    """Recovery training: a longer polish, on more of the calibration texts.

    Args:
        recover: Number of training steps, in place of those of `polish`. 0 disables recovery training.
        recover_lr: Peak learning rate. Defaults to that of `PolishConfig`.
        recover_lora: If true, trains LoRA adapters, which are merged at the end, instead of all weights.
        recover_batch_size: Examples per step.

    Raises:
        ValueError: If a number is out of range.
    """

    recover: int = 0
    recover_lr: float | None = None
    recover_lora: bool = False
    recover_batch_size: int = 2

    def __post_init__(self) -> None:
        check_int("recover", self.recover, 0)
        check_int("recover_batch_size", self.recover_batch_size)
        if self.recover_lr is not None:
            check_number("recover_lr", self.recover_lr, above=0)

    def polish(self, seed: int) -> PolishConfig | None:
        """Returns the settings of the training; None without it."""
        trains: Trained = "lora" if self.recover_lora else "all"
        return PolishConfig(self.recover, trains, self.recover_lr, self.recover_batch_size, seed) if self.recover else None


def search_space(scope: SearchScope, steps: int, budget: str | None) -> str:
    """Returns a description of the removable units, and the maximum number of steps.

    Args:
        scope: The search space.
        steps: Maximum number of search steps.
        budget: A budget of loss, as text. None names the size limit of the candidates.
    """
    budget = f"{scope.limit:,}" if budget is None else budget
    sizes = f"{scope.target} now {scope.now:,}, budget {budget}, smallest reachable {scope.least:,}"
    lines = [f"{type(scope.model).__name__}: {sizes}"]
    modules = Counter[tuple[str, str]]()
    for layer in scope.modules:
        *others, last = map(str, layer.levels)  # the numbers of units that a module may keep, the largest first
        unit = "KV heads" if layer.kind == "head" else PLURAL[layer.kind]
        modules[name_pattern(layer.name), f"{', '.join(others)} or {last} {unit}" if others else f"{last} {unit}"] += 1
    lines += [f"  {name}: keep {levels} (in each of {count})" for (name, levels), count in modules.items()]
    blocks = len(scope.blocks.removable)
    lines.append(f"  blocks that may be removed: {blocks}{'' if blocks else f' ({scope.blocks.why})'}")
    return "\n".join([*lines, f"  at most {steps:,} search steps"])


MARKER = "billhook-variants.json"
"""File that identifies a variant cache next to an output; a folder of that name without it is not touched."""


class VariantFolder:
    """Folder of a variant cache: a named folder, or a temporary folder next to the output.

    Args:
        out: Output folder.
        folder: The given folder, if any.

    Raises:
        ValueError: If a folder next to the output has the cache's name, but billhook did not create it.
    """

    def __init__(self, out: str, folder: str | None) -> None:
        self.folder, self._keep = default_variant_cache(out) if folder is None else Path(folder), folder is not None
        if not self._keep and self.folder.exists() and not (self.folder / MARKER).is_file():
            raise ValueError(
                f"'{self.folder}' is needed for the variant cache, but billhook did not create it: it has no {MARKER}. Move it, "
                "or name a folder with --variant_cache."
            )

    @contextmanager
    def created(self) -> Iterator[None]:
        """Creates the folder, and deletes it unless an error leaves variants."""
        if self._keep:
            yield
            return
        self.folder.mkdir(exist_ok=True)
        (self.folder / MARKER).write_text(json.dumps({"until": "the output is saved"}))
        try:
            yield
        except BaseException:
            if next(self.folder.glob("*/*.safetensors"), None) is None:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        shutil.rmtree(self.folder, ignore_errors=True)

    def report_reused(self, variants: int) -> None:
        """Prints the number of variants from an earlier run."""
        if variants:
            print(f"Reusing {variants} variants of an earlier run in {self.folder}.", flush=True)


def shrink(
    model: str,
    out: str,
    examples: Examples,
    effort: Effort,
    recovery: Recovery,
    budget: Budget,
    search: Search,
    layers: Layers = "uniform",
    variant_cache: str | None = None,
    plot: str | None = None,
    dry_run: bool = False,
) -> None:
    """Searches for the best model within a budget of size or loss, and saves it.

    Each MLP and attention module is pruned to several levels and refitted. The command measures how each variant, and the removal
    of each block, changes the model's predictions, and searches for the best combination. The selected model is repaired from
    front to back, verified, and measured. References: ZipLM (https://arxiv.org/abs/2302.04089) and Týr-the-Pruner
    (https://arxiv.org/abs/2503.09657).

    Args:
        model: A folder, a Hub name, or "tiny".
        out: Output folder. It must be new, empty, or an earlier billhook checkpoint, which is replaced.
        examples: Calibration and evaluation data, and the device.
        effort: How close the result stays to the dense model.
        recovery: Recovery training of the smaller model.
        budget: The most that may remain.
        search: Settings of the search.
        layers: "uniform" keeps the same number of units in every block, for a standard checkpoint; "free" lets blocks differ.
        variant_cache: Folder for pruned variants of all modules, which later searches on the same examples reuse. Defaults to
            `.OUT.variants` next to `out`, deleted after the save, so that the same command continues if it is interrupted.
        plot: PNG file for a plot of the loss at other sizes.
        dry_run: If true, prints what the search may remove and its maximum number of steps, and writes nothing.

    Raises:
        ValueError: If an argument is not legal, or the budget is out of reach, before anything is written.
    """
    check_variant_cache(variant_cache)
    folder = VariantFolder(out, variant_cache)
    check_int("seed", examples.seed, 0)
    check_file("plot", plot, ".png")
    search = replace(search, repair=effort.repair(search.repair))
    if recovery.recover:
        effort = replace(effort, polish=recovery.polish(examples.seed))
    work = OneShot(model, out, examples, refits=search.repair is not None, repair=search.repair, effort=effort)
    scope = SearchScope.find(work.model, budget.amount(search), layers == "uniform")
    repair_batches, _ = split_batches(meta_batches(work))
    limits, steps = "", [f"search for the best model within {budget.words}"]
    if search.repair is not None:
        needed, experts = tokens_needed(scope.search, scope.modules), any(map(stacks_of, work.model.modules()))
        limits = repair_limits(work, needed, repair_batches, search.repair != "auto", experts)
        steps += [limits] * bool(limits)
        if (matching := matching_of(search.repair)) is not None:
            steps.append(matching_step(work, matching, LEAST_STEPS))
    most_steps = scope.most_steps(search.generations, search.candidates)
    # modules are refitted at all levels, and each step runs the held-out tokens
    cost = 2 + most_steps * TOKENS / (work.length * sum(work.example_counts.values()))
    print_plan(work, *steps, cost=cost, refits=refit_passes(work, search.repair), may_end_early=True)
    if dry_run:
        print_dry_run(work, search_space(scope, most_steps, None if budget.max_loss is None else budget.words))
        return
    batches = work.batches()
    repair_batches, held_out = split_batches(batches)
    repair, not_repaired = resolve_repair(scope, repair_batches, search.repair)
    if not_repaired and not limits.startswith("no repair:"):
        print(not_repaired)  # a text is shorter than requested
    before = work.measure()
    trained = list(batches)
    if recovery.recover:
        trained = work.training_batches(recovery.recover * recovery.recover_batch_size, batches, before)
    work.predict(trained)
    with folder.created():
        phases = [""]
        with progress_bar("shrinking", "steps", lambda: phases[-1], steady=False) as report:
            progress, seed = Progress(report, phases.append, folder.report_reused), examples.seed
            shrunk = run_shrink(scope, budget, repair_batches, held_out, repair, search, seed, folder.folder, progress)
        shrunk = replace(shrunk, not_refitted=shrunk.not_refitted or not_repaired)
        settings = {"layers": layers, "importance": str(search.importance or "OBS()"), "repair": str(repair) if repair else None}
        what = f"without {shrunk.words}: {shrunk.budget}"
        record: dict[str, Any] = {"shrink": shrunk.to_json() | settings}
        lines = [shrunk.text()]
        if recovery.recover:
            degradation = work.measure_degradation(before)
            plain = [text.to_json() for text in degradation] if isinstance(degradation, list) else degradation
            record["recovery"] = asdict(recovery) | {"before": plain}
            lines += ["Before recovery training:", degradation_text(before, degradation) or ""]
        work.save(before, what, record, *lines, not_refitted=shrunk.not_refitted)
    if plot is not None:
        from billhook.plots.pareto import pareto  # matplotlib takes a second to import

        pareto(shrunk).savefig(plot)
