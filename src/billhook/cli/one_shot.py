"""Shared steps of one-shot commands: load, calibrate, measure, change, measure, save."""

import shutil
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.arguments import parse_memory
from billhook.assets import model_path
from billhook.atomic_folder import check_not_source, check_target
from billhook.calibration.calibration import MIXED, UNSEEN, Calibration, check_other_texts, evaluation_batches
from billhook.calibration.generated import GENERATED, KEPT, can_generate, check_can_generate
from billhook.checkpoints.save import load, save
from billhook.cli.effort import EXAMPLES as EXAMPLES_OF
from billhook.cli.effort import Effort
from billhook.cli.examples import EXAMPLES, Examples, LabeledData, TextOptions
from billhook.cli.interruption import text_folder
from billhook.cli.machine import device_of, file_progress, model_progress
from billhook.cli.streamed import check_streamed, matching_of
from billhook.engine import Batch, find_sites, fits, store_of, zeros_of
from billhook.model import (
    PRUNED,
    Preprocessor,
    kv_cache_bytes,
    load_preprocessor,
    load_tokenizer,
    may_have_preprocessor,
    prunable,
    stream,
    text_config,
    tokenizer_of,
    weight_of,
)
from billhook.progress import progress_bar
from billhook.pruning.plan import UnitPlan
from billhook.pruning.repair import RepairOption
from billhook.report.degradation import DenseReference, TextDegradation, accuracy, degradation_table, degradation_warning
from billhook.report.generation import generates
from billhook.report.predictions import BYTES as PREDICTIONS

if TYPE_CHECKING:
    from billhook.training.targets import Targets

DEFAULT_EXAMPLES = 40
"""Number of examples of each default text, without data."""
COUNTED = 4_000_000
"""Most tokens of a source to count, or labeled examples."""
SUPPLEMENT = 0.5
"""Default share of other text if weights are fitted to text files."""

Before = DenseReference | float | None
"""Measurement of the dense model: predictions on texts, an accuracy, or None."""
Degradation = list[TextDegradation] | float | None
"""Measurement of the changed model: degradation on each text, an accuracy, or None."""


def sizes_of(model: PreTrainedModel) -> dict[str, int | None]:
    """Returns the number of parameters, of zeros, and of KV-cache bytes per token."""
    return {"params": model.num_parameters(), "zeros": zeros_of(model), "kv_cache_bytes": kv_cache_bytes(model)}


def degradation_text(before: Before, degradation: Degradation) -> str | None:
    """Returns a table of the degradation on texts, or a line on the accuracy."""
    if isinstance(degradation, list):
        return degradation_table([text.to_json() for text in degradation])
    return None if degradation is None else f"Accuracy: {before:,.4g} before, {degradation:,.4g} after"


class OneShot:
    """A checkpoint that a command makes smaller, with its calibration and evaluation data.

    With `offload` the model stays in CPU memory, and blocks move to the device one at a time.

    Args:
        name: The dense model: a folder, a Hub name, or "tiny".
        out: Output folder.
        options: Data and device options.
        offload: If True, keeps the model in CPU memory and computes block by block on the device.
        refits: If True, weights are fitted to the text; text files are then supplemented with other text.
        calibrates: If False, the method uses no data. A model that generates no text is then not measured.
        streams: If False, the command does not support streamed models.
        repair: Settings of the repair. With `match`, a batch of text is a single example, because each step takes a batch.
        as_text: If True, text is measured in bits per byte, because the model will have another tokenizer.
        effort: How much is done so that the result stays close to the dense model. None polishes nothing.

    Raises:
        ValueError: If an option is not legal, before anything is computed.
    """

    def __init__(
        self,
        name: str,
        out: str,
        options: TextOptions,
        offload: bool = False,
        refits: bool = False,
        calibrates: bool = True,
        streams: bool = False,
        repair: RepairOption = None,
        as_text: bool = False,
        effort: Effort | None = None,
    ) -> None:
        check_target(out)
        check_not_source(model_path(name), out)
        options.check_sources()
        if options.stream:
            check_streamed(options, streams, offload)
        self.polish = None if effort is None else effort.polish_for(options, calibrates, offload)
        self._targets: Targets | None = None
        self._times = 1 if effort is None else EXAMPLES_OF[effort.effort]
        calibrates, refits = calibrates or self.polish is not None, refits or self.polish is not None
        self.name, self.out, self.options, self.calibrates, self.as_text = name, out, options, calibrates, as_text
        self.device = torch.device("cpu") if options.stream and options.device == "auto" else device_of(options.device)
        with file_progress(f"opening {name}" if options.stream else f"loading {name}"):
            self.model = stream(name, out, options.dtype, self.device) if options.stream else load(name, options.dtype)
        self.offloaded_blocks: list[nn.Module] = []
        if offload:
            self.offloaded_blocks = [site.module for site in find_sites(self.model, prunable(self.model), "block")]
        elif not options.stream:
            self.model.to(self.device)  # type: ignore[arg-type]
        self.length, self._text_folder = options.length_for(self.model), text_folder(out)
        self.trimmed: PreTrainedTokenizerBase | None = None
        self._counts = dict[str, torch.Tensor]()
        self.labeled = LabeledData(options, self.model, model_path(options.tokenizer or name), self.length)
        self.of_images = self.labeled.of_images
        if options.tokenizer is not None:
            if self.of_images:
                kind = type(self.model).__name__
                raise ValueError(f"tokenizer={options.tokenizer!r}: {kind} classifies images. Remove --tokenizer.")
            tokenizer_of(self.model, options.tokenizer)
        classifies = isinstance(options, Examples) and self.labeled.is_classifier
        self.metric = "accuracy" if classifies or self.of_images else "perplexity"
        if matching_of(repair) is not None and self.metric == "perplexity":
            self.options = options = replace(options, batch_size=1)
        self.uses_data = calibrates or options.data is not None or (self.metric == "perplexity" and can_generate(self.model))
        if options.supplement and self.metric == "accuracy":
            kind = type(self.model).__name__
            raise ValueError(f"supplement={options.supplement}: {kind} needs labels, so it takes no other text.")
        default = SUPPLEMENT if refits and options.only_files and can_generate(self.model) else 0.0
        self._supplement = default if options.supplement is None else options.supplement
        if options.data is None and self.uses_data:
            try:
                check_can_generate(self.model)
            except ValueError as error:
                raise ValueError(f"data=None: {error}. Pass a file with --data.") from error
            if options.stream and GENERATED in self.other_texts:
                raise ValueError(f"data=None: '{name}' has no tokenizer to read text with. Pass --tokenizer and --data.")
        if self.metric == "perplexity":
            check_other_texts(self.calibration, options.also)

    @cached_property
    def sizes(self) -> dict[str, int | None]:
        """Parameters, zeros, and KV-cache bytes per token of the dense model."""
        return sizes_of(self.model)

    @cached_property
    def other_texts(self) -> list[str]:
        """Packaged and self-generated text that the command uses without data, or next to it."""
        if self.options.data is not None and not self._supplement:
            return []
        reads = may_have_preprocessor(self._tokenizer_name)
        writes = can_generate(self.model) and not self.options.stream
        return [MIXED] * reads + [GENERATED] * (writes or not reads)

    @cached_property
    def calibration(self) -> Calibration:
        """Calibration data, as the options describe it."""
        options, others, weights = self.options, self.other_texts, None
        texts: Any = options.data if isinstance(options.data, list) else [options.data] * (options.data is not None)
        if texts and others:
            share = self._supplement
            weights = [(1 - share) / len(texts)] * len(texts) + [share / len(others)] * len(others)
        sources = [*texts, *others]
        count = options.examples or self._times * (EXAMPLES if texts else DEFAULT_EXAMPLES * len(others))
        return Calibration(
            sources if len(sources) > 1 else sources[0],
            weights,
            count * self.length,
            self.length,
            batch_size=options.batch_size,
            column=options.column,
            seed=options.seed,
            tokenizer=model_path(options.tokenizer or self.name),
        )

    def spill(self, statistics: int, sums: int = 0, runs: int = 0) -> str | None:
        """Spills block outputs and reference predictions to disk if `--memory` is too small.

        Args:
            statistics: Bytes of the largest Gram matrix, with the matrices that are computed from it.
            sums: Bytes of Gram matrices that may be spilled.
            runs: Number of runs of each example that wait within a block: two if a refit compares them.

        Returns:
            The folder of the files; None if block outputs stay in memory or on the device.
        """
        if self.options.memory is None:
            return None
        store, memory = store_of(self.model), parse_memory("memory", self.options.memory)
        calibrated, measured = sum(self.example_counts.values()), self.measured_count * self.measures
        text, itemsize = text_config(self.model.config), self.model.dtype.itemsize
        logits = 4 * self.length * text.vocab_size
        hidden = max(calibrated, measured) * self.length * text.hidden_size * itemsize
        widest = max((weight_of(layer).shape[1] for layer in prunable(self.model).values()), default=0)
        # within a block each waiting run holds a layer's inputs and the residual stream
        statistics += runs * calibrated * self.length * (widest + text.hidden_size) * itemsize
        activations = 2 * max(runs, 1) * hidden + min(PREDICTIONS, measured * logits)
        if not fits(store, statistics + self.options.batch_size * logits, activations + sums, memory):
            store.spill_folder = str(Path(self.out).resolve().parent)
        return store.spill_folder if self.model.device.type == "cpu" else None

    @property
    def example_counts(self) -> dict[str, int]:
        """Number of calibration examples of each source; labeled data has no name."""
        return {"": self.labeled.count} if self.metric == "accuracy" else self.calibration.examples(self.length)

    def _more_labeled(self, examples: int) -> LabeledData:
        """Returns labeled data with another number of calibration examples."""
        return LabeledData(replace(self.options, examples=examples), self.model, model_path(self._tokenizer_name), self.length)

    @property
    def _tokenizer_name(self) -> str:
        return self.options.tokenizer or self.name

    @property
    def _reads_unseen(self) -> bool:
        """True if packaged text of kinds that no command calibrates on is measured, too."""
        return may_have_preprocessor(self._tokenizer_name) and UNSEEN not in self.calibration.named

    @property
    def measured_count(self) -> int:
        """Number of examples that the model is measured on, if the texts are long enough."""
        texts = (
            1 if self.metric == "accuracy" else len(self.calibration.named) + len(self.options.also or ()) + self._reads_unseen
        )
        return texts * self.options.evaluate

    def batches(self, dry_run: bool = False) -> list[Batch]:
        """Reads the calibration batches; keeps self-generated text, except in a dry run."""
        if self.metric == "perplexity":
            batches = self.calibration.read(self.model, self.trimmed, None if dry_run else self._text_folder)
            return [Batch(batch | {"labels": batch["input_ids"].clone()}, batch.source) for batch in batches]
        return list(self.labeled.calibration_batches())

    @property
    def measures(self) -> bool:
        """True if accuracy or perplexity is measured."""
        return self.uses_data and self.options.evaluate > 0 and (self.metric == "accuracy" or generates(self.model))

    @property
    def must_generate(self) -> bool:
        """True if calibration data is self-generated by default; a dry run does not generate it."""
        return self.calibrates and self.options.data is None and GENERATED in self.other_texts

    def _on_device(self) -> AbstractContextManager[None]:
        """Runs the blocks of an offloaded model on the device within a `with` block."""
        return store_of(self.model).on(self.device, self.offloaded_blocks) if self.offloaded_blocks else nullcontext()

    @property
    def counted_sources(self) -> dict[str, Any]:
        """Texts to count tokens in, by name; empty for labeled data.

        Self-generated text is left out. Packaged text is a source too, unless `supplement` is 0.
        """
        if self.metric == "accuracy":
            return {}
        sources: dict[str, Any] = {name: source for name, source in self.calibration.named.items() if name != GENERATED}
        return sources if self.options.supplement == 0 else sources | {MIXED: MIXED}

    def read_tokens(self, before: Before) -> list[Batch]:
        """Reads text to count tokens in, up to `COUNTED` tokens of each source.

        Examples that the model is measured on are left out.
        """
        if self.metric == "accuracy":
            data = self._more_labeled(COUNTED)
            batches = [Batch(batch, data.source("train")) for batch in data.calibration_batches()]
        else:
            sources = list(self.counted_sources.values())
            measured = {tuple(ids.tolist()) for _, ids in before.rows} if isinstance(before, DenseReference) else set()
            read = replace(self.calibration, sources=sources, weights=None, tokens=COUNTED * len(sources)).read(self.model)
            rows = [(batch.source, ids) for batch in read for ids in batch["input_ids"]]
            batches = [Batch({"input_ids": ids[None]}, name) for name, ids in rows if tuple(ids.tolist()) not in measured]
        size = text_config(self.model.config).vocab_size
        for batch in batches:
            ids = batch["input_ids"][batch["attention_mask"].bool()] if "attention_mask" in batch else batch["input_ids"]
            count = self._counts.setdefault(batch.source, torch.zeros(size, dtype=torch.int64))
            count += torch.bincount(ids.flatten(), minlength=size)
        return batches

    def removed_share(self, plan: UnitPlan) -> str:
        """Describes how much of the counted text consists of the tokens that a plan removes."""
        counts = sum(self._counts.values())
        assert plan.tokens is not None
        assert isinstance(counts, torch.Tensor)
        kept = counts[torch.from_numpy(plan.tokens[0])]
        return f"{1 - int(kept.sum()) / int(counts.sum()):.2%} of the counted text"

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Continues with another tokenizer: for text, and to be saved."""
        self.trimmed = tokenizer
        if self.metric == "accuracy":  # whose data module loads the tokenizer by name
            folder = mkdtemp()
            weakref.finalize(self, shutil.rmtree, folder)
            tokenizer.save_pretrained(folder)
            self.labeled = LabeledData(self.options, self.model, folder, self.length)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model, or the one that is left of it."""
        return self.trimmed or load_tokenizer(self._tokenizer_name)

    def measure(self) -> Before:
        """Measures the dense model: accuracy, or predictions on texts; None if it does neither."""
        _ = self.sizes  # are counted before the model changes
        if not self.measures:
            return None
        with self._on_device():
            if self.metric == "perplexity":
                options = self.options
                also = [*(options.also or ()), *[UNSEEN] * self._reads_unseen]
                rows = evaluation_batches(
                    self.calibration, self.model, options.evaluate, also, None, not options.stream, self._text_folder
                )
                others = self.counted_sources if self.as_text else ()
                calibrated = list(self.calibration.named if self.calibrates else others)
                with model_progress(self.model, "measuring", "examples") as progress:
                    tokenizer = self.tokenizer if self.as_text else None
                    return DenseReference(self.model, rows, calibrated, progress=progress, tokenizer=tokenizer)
            batches = self.labeled.measured_batches()
            with progress_bar("measuring"):
                return None if batches is None else accuracy(self.model, batches)

    def predict(self, batches: Sequence[Batch]) -> None:
        """Stores the model's predictions before the model changes, if it is polished.

        Args:
            batches: The calibration batches. Without any they are read.
        """
        if self.polish is None:
            return
        from billhook.training.targets import Targets  # Lightning takes seconds to import

        with model_progress(self.model, "predicting", "examples") as progress:
            targets = Targets.of(self.model, batches or self.batches(), progress)
        self._targets = targets if targets.can_hold_out else None

    def measure_degradation(self, before: Before) -> Degradation:
        """Measures degradation on each text, or accuracy; None without an earlier measurement."""
        if isinstance(before, DenseReference):
            with self._on_device(), model_progress(self.model, "measuring again", "examples") as progress:
                return before.degradation(self.model, progress, self.trimmed)
        return None if before is None else cast(float, self.measure())

    def save(self, before: Before, what: str, record: Mapping[str, Any], *lines: object, not_refitted: str = "") -> None:
        """Measures again, saves the model with its record, and prints the results.

        Args:
            before: Measurement of the dense model.
            what: Description of the change, for the record.
            record: Settings of the change, for the record.
            lines: Lines to print before the results.
            not_refitted: Why layers were not refitted, for the record.
        """
        if self.polish is not None and self._targets is not None:
            from billhook.training.polish import polish

            with progress_bar("polishing", "steps") as progress:
                polished = polish(self.model, self._targets, how=self.polish, progress=progress)
            what, record, lines = f"{what}; {polished.words}", {**record, "polish": polished.to_json()}, (*lines, polished.text())
        event: dict[str, Any] = {"what": what, "before": self.sizes, "after": sizes_of(self.model)}
        if not_refitted:
            event["not_refitted"] = not_refitted
        record = {"events": [event], **record}
        if self.uses_data:
            data = self.calibration.to_json() if self.metric == "perplexity" else self.labeled.to_json()
            if self._counts:
                data["counted_tokens"] = {name: int(count.sum()) for name, count in self._counts.items()}
                if not self.calibrates:  # all of the text is counted
                    data = {name: value for name, value in data.items() if name not in ("tokens", "weights")}
            record["calibration" if self.calibrates else "text"] = data
        degradation, warning = self.measure_degradation(before), None
        metric, (old, new), examples = self.metric, (before, degradation), self.options.evaluate
        if isinstance(degradation, list):
            first = degradation[0]
            old, new, examples = first.before, first.after, first.rows
            if (bits := first.bits_per_byte) is not None:
                metric, (old, new) = "bits_per_byte", bits
            record["degradation"], warning = [text.to_json() for text in degradation], degradation_warning(degradation)
        elif degradation is not None:
            examples = len(self.labeled.measured_rows)
        record[metric] = {"before": old, "after": new, "examples": examples}
        if reused := store_of(self.model).reused:
            print(f"Reused {reused} block{'s' * (reused > 1)} from an interrupted run.")
        with file_progress("saving and verifying"):
            saved = save(self.model, self.out, self._preprocessor(), record)
        with suppress(OSError):  # there is no folder, or it has other files
            for file in self._text_folder.glob(f"*{KEPT}"):
                file.unlink()
            self._text_folder.rmdir()
        warning = warning and f"Warning: {warning}"
        used = self.labeled.used(self.calibrates, degradation is not None) if self.metric == "accuracy" else []
        for line in (*lines, *used, degradation_text(before, degradation), warning):
            if line:
                print(line)
        print(saved.text())
        print("\n".join(["", "Next steps:", *(f"  {line}" for line in self._next_steps(event))]))

    def _next_steps(self, event: Mapping[str, Any]) -> list[str]:
        """Returns commands to continue with, each with a comment."""
        if not generates(self.model):
            return [f"billhook summary {self.out}  # count parameters and operations"]
        text = f"--model.distillation.teacher {self.name} --data.data '[FILE,mixed,generated]' --data.weights '[2,1,1]'"
        text = "--data.data FILE" if self.trimmed is not None else text  # a teacher has the same vocabulary
        train = f"billhook fit --model.model {self.out} --model.lora '{{}}' {text} --trainer.max_steps 1000"
        export = f"--trainer.callbacks+=billhook.Export --trainer.callbacks.folder {self.out}-trained"
        # plain training would make zeros nonzero
        sparse = event["after"]["zeros"] - event["before"]["zeros"] > PRUNED * event["after"]["params"]
        return [
            f"billhook verdict {self.name} {self.out} --data FILE  # compare both models on more text, and what they write",
            *([] if sparse else [f"{train} {export}  # recovery training on your text"]),
            f"billhook serve-check {self.out}  # check the outputs in llama.cpp",
        ]

    def _preprocessor(self) -> Preprocessor | None:
        """Loads the tokenizer or image processor to save with the model, if there is one."""
        name = self._tokenizer_name
        if self.trimmed is not None:
            return self.trimmed
        if not may_have_preprocessor(name):
            print(f"No tokenizer saved: '{name}' has none. Add one with --tokenizer NAME.")
            return None
        return load_preprocessor(name) if self.of_images else load_tokenizer(name)

    def training_batches(self, examples: int, calibrated: Sequence[Batch], before: Before) -> list[Batch]:
        """Returns the calibration examples and others of the same files that are not measured."""
        if self.metric == "accuracy":
            data = self._more_labeled(examples)
            return [Batch(batch, data.source("train")) for batch in data.calibration_batches()]
        measured = {tuple(ids.tolist()) for _, ids in before.rows} if isinstance(before, DenseReference) else set()
        batches = list(calibrated)
        if files := [source for name, source in self.calibration.named.items() if name not in (GENERATED, MIXED)]:
            tokens = (examples + len(measured)) * self.length
            batches += replace(self.calibration, sources=files, weights=None, tokens=tokens).read(self.model, self.trimmed)
        rows = {tuple(ids.tolist()): (batch.source, ids) for batch in batches for ids in batch["input_ids"]}  # each example once
        return [Batch({"input_ids": ids[None]}, source) for key, (source, ids) in rows.items() if key not in measured]
