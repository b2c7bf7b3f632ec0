"""`billhook shrink`: a checkpoint in, the best smaller one within one budget out."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from billhook.adapters.lora import LoRA
from billhook.adapters.merge import merge
from billhook.arguments import check_int, check_number
from billhook.checkpoints.pretrained import Task
from billhook.cli.examples import Examples
from billhook.cli.machine import check_file
from billhook.cli.one_shot import Before, OneShot, shown
from billhook.cli.refit import meta_batches, refits
from billhook.cli.stopped import library_beside
from billhook.engine.batches import Batch
from billhook.fit.run import isolated_rng
from billhook.plots.pareto import pareto
from billhook.progress import progress_bar
from billhook.report.generation import generates
from billhook.report.speed import Phase
from billhook.shrinking.cache import tokens_needed
from billhook.shrinking.candidates import Candidates, Progress
from billhook.shrinking.divergence import divided
from billhook.shrinking.latency import Workload, clock_of
from billhook.shrinking.layers import Layer
from billhook.shrinking.measurement import CALLED
from billhook.shrinking.search import Budget, Search
from billhook.shrinking.shrink import Layers, check_library, repair_for, shrink_to
from billhook.tracing.show import name_pattern
from billhook.training.distillation import Distillation
from billhook.training.module import TransformerModule

RATE, ADAPTER_RATE = 1e-4, 1e-3
"""The highest learning rate, of all weights and of LoRA."""


@dataclass(frozen=True)
class Recovery:
    """Training after the cut, on the same texts (more of them than were calibrated on, if there are), taught by the dense model.

    Args:
        recover: Steps of training; 0 for none.
        recover_lr: The highest learning rate; by default 1e-4, or 1e-3 of LoRA.
        recover_lora: Train LoRA, which is merged in the end, in the place of all weights.
        recover_batch_size: Examples in a step.

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

    @property
    def examples(self) -> int:
        """How many examples it takes."""
        return self.recover * self.recover_batch_size

    def task_of(self, model: PreTrainedModel) -> Task:
        """Returns the task of a model; refuses one that cannot be trained here."""
        if "SequenceClassification" in type(model).__name__:
            return "sequence-classification"
        if not generates(model):
            raise ValueError(
                f"recover={self.recover}: a {type(model).__name__} is no causal language model and no classifier of texts: train "
                "it in a LightningModule of your own, with `Shrinking` among the callbacks"
            )
        return "causal-lm"

    def train(
        self,
        model: PreTrainedModel,
        teacher: str,
        loader: DataLoader[Any],
        device: torch.device,
        seed: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Trains a model in place, in float32.

        Args:
            model: The model that was cut.
            teacher: The name of the dense model.
            loader: Batches with labels.
            device: Where it is trained.
            seed: Decides the order of the examples, dropout, and how LoRA begins.
            progress: Called with how many steps are done, and of how many.
        """
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        with isolated_rng():
            torch.manual_seed(seed)
            module = TransformerModule(
                model,
                self.task_of(model),
                lr=self.recover_lr or (ADAPTER_RATE if self.recover_lora else RATE),
                warmup=0.1,
                lora=LoRA() if self.recover_lora else None,
                distillation=Distillation(teacher=teacher),
            )
            _trainer(self.recover, device, progress).fit(module, loader, val_dataloaders=[])
        if self.recover_lora:
            merge(model)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
        model.to(device).eval()  # type: ignore[arg-type]


class _Progress(pl.Callback):
    """Tells how many steps are done."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self.progress = progress

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        """Tells it after each step."""
        self.progress(trainer.global_step, trainer.max_steps)


def _trainer(steps: int, device: torch.device, progress: Callable[[int, int], None]) -> pl.Trainer:
    """Makes a trainer that shows and writes nothing."""
    return pl.Trainer(
        accelerator=device.type,
        devices=1 if device.index is None else [device.index],
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        callbacks=[_Progress(progress)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def outlook(candidates: Candidates, steps: int, within: str | None = None) -> str:
    """Returns what there is and may be left, the configs of each layer, the blocks, and how many steps it takes.

    Args:
        candidates: What may be removed.
        steps: How many steps the search has at most.
        within: A budget that is no number of what is left, in words.
    """
    left = f"at most {candidates.limit:,} are to be left" if within is None else f"as few as {within} allows are to be left"
    head = f"{type(candidates.model).__name__}: {candidates.now:,} {candidates.target} now; {left}"
    lines = [f"{head}, and at least {candidates.least:,} can be"]
    rows = Counter((name_pattern(layer.name), _configs(layer)) for layer in candidates.layers)
    lines += [f"  {name}  {configs}, in each of {count}" for (name, configs), count in rows.items()]
    able = len(candidates.blocks.able)
    lines.append(f"  {able} whole block{'s' * (able > 1)} may go" if able else f"  all blocks stay: {candidates.blocks.why}")
    return "\n".join([*lines, f"  at most {steps:,} steps"])


def _configs(layer: Layer) -> str:
    """Returns how many units a layer may keep, all of them first."""
    return f"{', '.join(map(str, layer.configs))} {'KV heads' if layer.kind == 'head' else CALLED[layer.kind]}"


MARK = "billhook-library.json"
"""The file by which it is known: a folder of its name without one is not touched."""


class KeptLibrary:
    """The folder of a library: one that was asked for, which stays, or one beside the output, which goes once that is saved.

    Args:
        out: The output.
        library: The folder that was asked for, if one was.

    Raises:
        ValueError: If a folder beside the output has its name, and billhook did not write it.
    """

    def __init__(self, out: str, library: str | None) -> None:
        self.folder, self._stays = library_beside(out) if library is None else Path(library), library is not None
        if not self._stays and self.folder.exists() and not (self.folder / MARK).is_file():
            raise ValueError(
                f"'{self.folder}', in which shrink keeps what it has made, holds something that billhook did not write "
                f"({MARK} is not there): move it, or name a folder as library"
            )

    def begin(self) -> None:
        """Makes the folder beside the output."""
        if not self._stays:
            self.folder.mkdir(exist_ok=True)
            (self.folder / MARK).write_text(json.dumps({"until": "the output is saved"}))

    def done(self) -> None:
        """Removes the folder beside the output."""
        if not self._stays:
            shutil.rmtree(self.folder, ignore_errors=True)

    def tell(self, variants: int) -> None:
        """Prints how many variants of an earlier run are taken."""
        if variants:
            print(f"{variants} variants are there from an earlier run, in {self.folder}, and are not made again", flush=True)


def shrink(
    model: str,
    out: str,
    examples: Examples,
    recovery: Recovery,
    budget: Budget,
    search: Search,
    layers: Layers = "uniform",
    library: str | None = None,
    time_phase: Phase | None = None,
    time_batch_size: int = 1,
    time_context: int | None = None,
    plot: str | None = None,
    dry_run: bool = False,
) -> None:
    """Finds the smaller model within one budget that loses least, without channels, heads and blocks, and saves it, verified.

    Each feed-forward and attention is pruned to several configs and refitted, on its own. What that costs the whole model is
    measured, as is what it loses without each block, and what loses least together is searched for. What is chosen is repaired
    from front to back. The parts are from ZipLM (https://arxiv.org/abs/2302.04089) and Týr-the-Pruner (https://arxiv.org/abs/2503.09657).

    Args:
        model: A folder, a hub name, or "tiny".
        out: The folder to write; new, empty, or an earlier checkpoint of billhook's.
        examples: Examples to fit and to measure on, and the place to compute.
        recovery: Training after the cut.
        budget: What is left at most.
        search: How it is searched for.
        layers: "uniform", so that layers stay alike and plain checkpoints can say it, or "free".
        library: A folder for the variants of all places, from which a search on the same examples goes on. By default they are
            in `.OUT.library` beside `out` until that is saved, so that the same command goes on if it is stopped.
        time_phase: What is timed for `latency`: "decode", writing a token (the default), or "prefill", reading prompts.
        time_batch_size: Sequences at once while it is timed.
        time_context: Tokens of each prompt while it is timed; by default 512.
        plot: A file, ending in .png, for a picture of what other sizes lose.
        dry_run: Print what the search may try, and how many steps it takes at most; measure and write nothing.

    Raises:
        ValueError: If an argument is not legal, or the budget cannot be reached; before anything is written.
    """
    check_library(library)
    kept = KeptLibrary(out, library)
    check_int("seed", examples.seed, 0)
    if plot is not None:
        check_file("plot", plot, ".png")
    check_int("time_batch_size", time_batch_size)
    check_int("time_context", 2 if time_context is None else time_context, 2)
    workload = Workload(time_phase, time_batch_size, time_context)
    work = OneShot(model, out, examples, refits=search.repair is not None)
    if recovery.recover:
        recovery.task_of(work.model)
    clock = None if budget.latency is None else (budget.latency, clock_of(work.model, workload))
    candidates = Candidates.find(work.model, search.amount(budget), layers == "uniform")
    then = [f"train it for {recovery.recover:,} steps"] if recovery.recover else []
    fitted, _ = divided(meta_batches(work))
    asked = search.repair
    short = (
        refits(work, tokens_needed(candidates.search, candidates.layers), fitted, asked != "auto") if asked is not None else ""
    )
    then = [*([short] if short else []), *then]
    work.tell(f"find the model within {budget.words} that loses least", f"shown {work.shown}", *then)
    if dry_run:
        of_size = budget.max_loss is None and budget.latency is None
        steps = candidates.most_steps(search.generations, search.candidates)
        work.tell_dry(outlook(candidates, steps, None if of_size else budget.words))
        return
    kept.begin()
    batches = work.batches()
    fitted, held_out = divided(batches)
    how_refitted, not_repaired = repair_for(candidates, fitted, search.repair)
    if not_repaired and not short.startswith("not repaired"):
        print(not_repaired)  # a text is shorter than what was asked for
    before = work.measure()
    phases = [""]
    with progress_bar("shrinking", "steps", lambda: phases[-1], steady=False) as report:
        progress, seed = Progress(report, phases.append, kept.tell), examples.seed
        shrunk = shrink_to(candidates, budget, clock, fitted, held_out, how_refitted, search, seed, kept.folder, progress)
    shrunk = replace(shrunk, not_refitted=shrunk.not_refitted or not_repaired)
    by = str(how_refitted) if how_refitted else None
    how = {"layers": layers, "importance": str(search.importance or "OBS()"), "repair": by}
    what = f"{shrunk.what}: {shrunk.budget}"
    what += f"; {recovery.recover:,} steps of recovery" if recovery.recover else ""
    trained, *said = _recovered(work, recovery, batches, before) if recovery.recover else ({},)
    record = {"shrink": shrunk.to_json() | how} | trained
    work.save(before, what, record, shrunk.text(), *said, not_refitted=shrunk.not_refitted)
    kept.done()
    if plot is not None:
        pareto(shrunk).savefig(plot)


def _recovered(
    work: OneShot, recovery: Recovery, batches: Sequence[Batch], before: Before
) -> tuple[dict[str, Any], str, str | None, str]:
    """Trains the smaller model; returns what to record, and what to say of it before and after."""
    cost, seed = work.cost(before), work.examples.seed
    loader = work.loader(recovery.examples, recovery.recover_batch_size, batches, before)
    with progress_bar("recovering", "steps") as progress:
        recovery.train(work.model, work.name, loader, work.device, seed, progress)
    plain = [text.to_json() for text in cost] if isinstance(cost, list) else cost
    after = f"After {recovery.recover} steps of recovery on {len(loader.dataset):,} examples:"  # type: ignore[arg-type]
    return {"recovery": asdict(recovery) | {"before": plain}}, "Before recovery:", shown(before, cost), after
