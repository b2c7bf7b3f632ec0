"""The frame of one-shot commands: load, calibrate, measure, change, measure, record, save, print."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from billhook.arguments import parse_memory
from billhook.assets import model_path
from billhook.atomic_folder import check_not_source, check_target, replacement_note
from billhook.calibration.calibration import Calibration, check_other_texts, evaluation_batches, num_self_generated
from billhook.calibration.generated import GENERATED, can_generate, check_can_generate
from billhook.checkpoints.equivalent import cache_as_saved
from billhook.checkpoints.save import load, save
from billhook.cli.examples import EXAMPLES, Examples, Labelled, Text
from billhook.cli.machine import device_of, files, over
from billhook.cli.streamed import check_streamed, reads
from billhook.engine.batches import Batch
from billhook.engine.memory import fits
from billhook.engine.state import evaluating
from billhook.engine.store import store_of
from billhook.engine.walk import find_sites
from billhook.engine.zeros import zeros_by_name, zeros_of
from billhook.model.config_fields import text_config
from billhook.model.inputs import small_inputs
from billhook.model.layers import PRUNED, prunable, weight_of
from billhook.model.preprocessors import Preprocessor, load_preprocessor, load_tokenizer, may_have_preprocessor
from billhook.model.streamed import stream
from billhook.progress import format_duration, progress_bar
from billhook.report.degradation import DenseReference, TextDegradation, accuracy, degradation_table, degradation_warning
from billhook.report.generation import generates
from billhook.report.predictions import BYTES as PREDICTIONS

FEW = 8
"""Tokens of a first example, which also pays for what is done but once."""
SOON = 120.0
"""Seconds from which on it is said how long all examples take."""


@torch.no_grad()
def forward(model: PreTrainedModel, length: int) -> float:
    """Runs a model on an example of random tokens, and returns the seconds that it took."""
    inputs = small_inputs(model, 1, length)
    with evaluating(model):
        start = time.monotonic()
        outputs = model(**inputs, return_dict=True)
        float(outputs[0].sum())  # waits for a device
        return time.monotonic() - start


Before = DenseReference | float | None
"""What is measured before a model is changed: predictions on texts, or an accuracy."""
Cost = list[TextDegradation] | float | None
"""What is measured afterwards: the degradation on texts, or an accuracy."""


def sizes_of(model: PreTrainedModel, zeros: int | None) -> dict[str, int | None]:
    """Returns the numbers of parameters and of those that are zero, and the bytes of the key/value cache per token."""
    return {"params": model.num_parameters(), "zeros": zeros, "kv_cache_bytes": cache_as_saved(model)}


def shown(before: Before, cost: Cost) -> str | None:
    """Shows what a model has lost."""
    if isinstance(cost, list):
        return degradation_table(cost)
    return None if cost is None else f"accuracy {before:,.4g} before, {cost:,.4g} after"


def commands(model: PreTrainedModel, name: str, out: str, event: Mapping[str, Any]) -> list[str]:
    """Returns commands that may follow, each with what it is for; training would undo zeros.

    Args:
        model: The smaller model.
        name: What it was made of.
        out: Where it is.
        event: What was done, with the numbers of parameters and zeros before and after.
    """
    if not generates(model):
        return [f"billhook summary {out}  # counts parameters and operations"]
    train = f"billhook fit --model.model {out} --model.lora '{{}}' --data.data FILE --trainer.max_steps 1000"
    export = f"--trainer.callbacks+=billhook.Export --trainer.callbacks.folder {out}-trained"
    sparse = event["after"]["zeros"] - event["before"]["zeros"] > PRUNED * event["after"]["params"]
    return [
        f"billhook evaluate {name} {out} --text FILE  # compares both on text of yours",
        *([] if sparse else [f"{train} {export}  # trains it on such text"]),
        f"billhook serve-check {out}  # asks whether llama.cpp computes the same",
    ]


WRITTEN = 40
"""How many the model writes."""
BESIDE = 0.25
"""Share of the examples that it writes beside texts that linears are refitted to."""


class OneShot:
    """A checkpoint that becomes a smaller one, on the data that it is scored and measured on.

    With `offload` the model stays in the CPU's memory, and is measured block by block on the device. One that `refits` linears is
    shown what the model writes, too, whatever texts are given. One that does not calibrate needs no data: without any, a model
    that writes none is not measured. Where `streams` is False, a model must be in memory.
    """

    def __init__(
        self,
        name: str,
        out: str,
        examples: Text,
        offload: bool = False,
        refits: bool = False,
        calibrates: bool = True,
        streams: bool = False,
    ) -> None:
        check_target(out)
        check_not_source(model_path(name), out)
        examples.check_there()
        if examples.stream:
            check_streamed(examples, streams, offload, calibrates or examples.evaluate > 0)
        self.name, self.out, self.examples = name, out, examples
        self.device = torch.device("cpu") if examples.stream and examples.device == "auto" else device_of(examples.device)
        with files(f"opening {name}" if examples.stream else f"loading {name}"):
            self.model = stream(name, out, examples.dtype, self.device) if examples.stream else load(name, examples.dtype)
        self._visiting: list[nn.Module] = []
        if offload:
            self._visiting = [site.module for site in find_sites(self.model, prunable(self.model), "block")]
        elif not examples.stream:
            self.model.to(self.device)  # type: ignore[arg-type]
        self.length = examples.length_for(self.model)
        self._labelled = Labelled(examples, self.model, model_path(examples.tokenizer or name), self.length)
        if examples.tokenizer is not None:
            if self._labelled.of_images:
                raise ValueError(f"tokenizer={examples.tokenizer!r}: a {type(self.model).__name__} reads no text: leave it out")
            load_tokenizer(examples.tokenizer)
        classifies = isinstance(examples, Examples) and self._labelled.is_classifier
        self.metric = "accuracy" if classifies or self._labelled.of_images else "perplexity"
        self.calibrates = calibrates
        self.reads = calibrates or examples.data is not None or (self.metric == "perplexity" and can_generate(self.model))
        self.beside = self._beside(refits)
        self.of_images = self._labelled.of_images
        if self.metric == "perplexity":
            check_other_texts(self.calibration, examples.also)

    @cached_property
    def sizes(self) -> dict[str, int | None]:
        """The parameters of the model as it was, those that are zero, and bytes of the key/value cache per token."""
        return sizes_of(self.model, None if self.zeros is None else sum(self.zeros.values()))

    @cached_property
    def zeros(self) -> dict[str, int] | None:
        """How many weights of the model as it was are zero, by name; None where that is not known."""
        return zeros_by_name(self.model)

    def _beside(self, refits: bool) -> float:
        """Returns the share of the examples that the model writes beside texts; refuses one that it cannot write."""
        share, texts_alone = self.examples.generated, self.examples.alone
        try:
            check_can_generate(self.model)
        except ValueError as error:
            if self.examples.data is None and self.reads:
                raise ValueError(f"data=None: {error}: name a file") from error
            if share:
                raise ValueError(f"generated={share}: {error}") from error
            return 0.0
        if share is None:
            share = BESIDE if refits and texts_alone and not self.examples.stream else 0.0
        return share

    @cached_property
    def calibration(self) -> Calibration:
        """Where the text comes from that scores are taken from."""
        examples = self.examples
        sources: Any = GENERATED if examples.data is None else examples.data
        weights = None
        if self.beside:
            read = sources if isinstance(sources, list) else [sources]
            sources, weights = [*read, GENERATED], [(1 - self.beside) / len(read)] * len(read) + [self.beside]
        count = examples.examples or (WRITTEN if examples.data is None else EXAMPLES)
        return Calibration(
            sources,
            weights,
            count * self.length,
            self.length,
            batch_size=examples.batch_size,
            column=examples.column,
            seed=examples.seed,
            tokenizer=model_path(examples.tokenizer or self.name),
        )

    def rest(self, moments: int, sums: int = 0, inside: int = 0) -> str | None:
        """Has what modules give, and predictions to compare with, lie in files where memory is limited and too small for it.

        Args:
            moments: Bytes of the largest second moments, with what is made of them.
            sums: Bytes of moments that may lie in files.
            inside: How many runs of each example wait within a block: two where a refit compares them.

        Returns:
            The folder in which the files are; None for memory.
        """
        if self.examples.memory is None:
            return None
        store, memory = store_of(self.model), parse_memory("memory", self.examples.memory)
        shown, measured = sum(self.rows), self._measured * self._measures
        text, itemsize = text_config(self.model.config), self.model.dtype.itemsize
        logits, hidden = 4 * self.length * text.vocab_size, max(shown, measured) * self.length * text.hidden_size * itemsize
        widest = max((weight_of(linear).shape[1] for linear in prunable(self.model).values()), default=0)
        # what no module gives, a product and a sum; and what goes into a block, and comes out
        moments += inside * shown * self.length * (widest + text.hidden_size) * itemsize
        activations = 2 * max(inside, 1) * hidden + min(PREDICTIONS, measured * logits)
        if not fits(store, moments + self.examples.batch_size * logits, activations + sums, memory):
            store.spill_folder = str(Path(self.out).resolve().parent)
        return store.spill_folder

    @property
    def rows(self) -> list[int]:
        """How many examples there are of each source."""
        return [self._labelled.count] if self.metric == "accuracy" else list(self.calibration.examples(self.length).values())

    @property
    def sources(self) -> list[str]:
        """The names of the sources of examples."""
        return [""] if self.metric == "accuracy" else list(self.calibration.named)

    @property
    def parts(self) -> int:
        """The parts of the examples of which one at a time is held out of a refit: sources, or two of one source."""
        return max(2, len(self.calibration.named)) if self.metric == "perplexity" else 2

    def tell(self, *steps: str, passes: int = 1, exactly: bool = True, beside: Sequence[object] = ()) -> None:
        """Prints what will be done, before it is; of a streamed model also what so many passes read, at most, beside others'."""
        each = " of each text" if self.examples.data or self.examples.also else " that it writes; --data FILE names a text"
        many = f"{self.examples.evaluate} examples{'' if self.metric == 'accuracy' else each}"
        measure = [f"measure the {self.metric} before and after, on {many}"] if self._measures else []
        print(f"{self.name}, {self.model.num_parameters():,} parameters:")
        store, more = store_of(self.model), 2 * self._measures
        streams = [reads(store, passes + more, exactly, beside)] if not store.holds_all else []
        for step in (*steps, *measure, *streams, f"save to {self.out}{replacement_note(self.out)}"):
            print(f"  {step}", flush=True)
        if pace := self._pace():  # which a large model needs a while to say
            print(f"  {pace}")
        print(flush=True)

    def _pace(self) -> str | None:
        """Times a forward of one example of a model that is in memory, and says how long all take; None where that is soon."""
        shown, measured = sum(self.rows) if self.calibrates else 0, self._measured if self._measures else 0
        if self.examples.stream or self._visiting or not (shown or measured):
            return None
        forward(self.model, FEW)
        each = forward(self.model, self.length)
        if each * (shown + 2 * measured) < SOON:
            return None
        times = (
            [f"{format_duration(each * shown)} each time that {shown} examples are shown, thrice that with gradients"]
            if shown
            else []
        )
        times += [f"{format_duration(2 * each * measured)} to measure on {measured} twice"] if measured else []
        return f"an example takes {each:.2g} s here: {', '.join(times)}"

    @property
    def _measured(self) -> int:
        """How many examples it is measured on, as far as they are there."""
        texts = 1 if self.metric == "accuracy" else len(self.calibration.named) + len(self.examples.also or ())
        return texts * self.examples.evaluate

    @property
    def shown(self) -> str:
        """The words for the examples that the model is shown."""
        if self.metric == "accuracy":
            return f"{self._labelled.count} examples of {self.examples.data}"
        rows = self.calibration.examples(self.length)
        texts = [f"{count} {'that it writes' if name == GENERATED else f'of {name}'}" for name, count in rows.items()]
        return f"{' and '.join(texts)}, examples of {self.length} tokens"

    def batches(self) -> list[Batch]:
        """Draws the batches to calibrate on."""
        if self.metric == "perplexity":
            with progress_bar("reading text"):
                read = self.calibration.read(self.model)
            return [Batch(batch | {"labels": batch["input_ids"].clone()}, batch.source) for batch in read]
        return list(self._labelled.shown())

    @property
    def _measures(self) -> bool:
        """True where there is something to measure: a classifier's answers, or what a model writes."""
        return self.reads and self.examples.evaluate > 0 and (self.metric == "accuracy" or generates(self.model))

    @property
    def unread(self) -> bool:
        """True where what the model is shown is only what it would first have to write, which a dry run does not have it do."""
        return self.metric == "perplexity" and self.examples.data is None

    def tell_dry(self, plan: str = "") -> None:
        """Prints the plan of a dry run, which ends with it, and how much the model would write."""
        if plan:
            print(f"{plan}\n")
        print(f"A dry run: nothing was changed, and nothing written to {self.out}.")
        if tokens := {what: rows * self.length for what, rows in self._written.items() if rows}:
            more = "" if plan else "; with --data FILE a dry run shows the plan, too"
            print(f"The model would write {sum(tokens.values()):,} tokens to be {' and '.join(tokens)}{more}.")

    @property
    def _written(self) -> dict[str, int]:
        """How many examples the model writes to be shown, and to be measured on."""
        if self.metric == "accuracy" or not can_generate(self.model):
            return {}
        measures = self._measures and not self.examples.stream
        return {
            "shown": self.calibration.examples(self.length).get(GENERATED, 0) if self.calibrates else 0,
            "measured on": num_self_generated(self.calibration, self.examples.evaluate, self.length) if measures else 0,
        }

    def _offloaded(self) -> AbstractContextManager[None]:
        """Has blocks of a model that stays in the CPU's memory compute on the device, one at a time, within."""
        return store_of(self.model).on(self.device, self._visiting) if self._visiting else nullcontext()

    def measure(self) -> Before:
        """Measures the model before it is changed: accuracy, or what it predicts on texts; None for one that does neither."""
        _ = self.sizes
        if not self._measures:
            return None
        with self._offloaded():
            if self.metric == "perplexity":
                with progress_bar("reading text"):
                    written = not self.examples.stream
                    read = evaluation_batches(
                        self.calibration, self.model, self.examples.evaluate, self.examples.also, written=written
                    )
                inside = [name for name in self.calibration.named if not (self.beside and name == GENERATED)]
                with over(self.model, "measuring", "examples") as progress:
                    return DenseReference(self.model, read, inside if self.calibrates else [], progress=progress)
            rows = self._labelled.measured()
            with progress_bar("measuring"):
                return None if rows is None else accuracy(self.model, rows)

    def cost(self, before: Before) -> Cost:
        """Measures what the model has lost: on each text, or the accuracy that is left; None where nothing was measured."""
        if isinstance(before, DenseReference):
            with self._offloaded(), over(self.model, "measuring again", "examples") as progress:
                return before.degradation(self.model, progress)
        return None if before is None else cast(float, self.measure())

    def save(self, before: Before, what: str, record: Mapping[str, Any], *says: object, not_refitted: str = "") -> None:
        """Measures again, saves the model with a record of what was done, and prints `says` and what it costs.

        The record says what was cut and `not_refitted`.
        """
        event: dict[str, Any] = {"what": what, "before": self.sizes, "after": sizes_of(self.model, zeros_of(self.model))}
        if not_refitted:
            event["not_refitted"] = not_refitted
        record = {"events": [event], **record}
        if self.reads:
            read = self.calibration.to_json() if self.metric == "perplexity" else self._labelled.to_json()
            record["calibration" if self.calibrates else "text"] = read
        figures: dict[str, Any] = {"before": None, "after": None, "examples": self.examples.evaluate}
        cost, warning = self.cost(before), None
        if isinstance(cost, list):
            figures = {"before": cost[0].before, "after": cost[0].after, "examples": cost[0].rows}
            record["degradation"], warning = [text.to_json() for text in cost], degradation_warning(cost)
        elif cost is not None:
            figures = {"before": before, "after": cost, "examples": len(self._labelled.drawn)}
        if reused := store_of(self.model).reused:
            were = "block was" if reused == 1 else "blocks were"
            print(f"{reused} {were} there from an earlier run, and not changed again")
        with files("saving, loading again and comparing"):
            saved = save(self.model, self.out, self._preprocessor(), record | {self.metric: figures})
        for line in filter(None, (*says, self._named(cost), shown(before, cost), warning and f"Warning: {warning}")):
            print(line)
        print(f"{saved.folder} ({saved.megabytes:.1f} MB): {saved.says}; largest difference of logits {saved.difference:.3g}")
        print("\n".join(["", "Next:", *(f"  {line}" for line in commands(self.model, self.name, self.out, event))]))

    def _preprocessor(self) -> Preprocessor | None:
        """Loads what lies beside the model, or is named, to be saved along; None if there is nothing, as nothing was read."""
        name = self.examples.tokenizer or self.name
        if not may_have_preprocessor(name):
            print(f"'{name}' has no tokenizer, so none is saved along; --tokenizer NAME names one")
            return None
        return load_preprocessor(name) if self._labelled.of_images else load_tokenizer(name)

    def loader(self, examples: int, batch_size: int, calibrated: Sequence[Batch], before: Before) -> DataLoader[Any]:
        """Reads so many examples to train on, if there are: what was calibrated on and more, but nothing that is measured on."""
        chance = torch.Generator().manual_seed(self.examples.seed)
        if self.metric == "accuracy":
            return self._labelled.loader(batch_size, chance)
        rows = [ids for batch in calibrated for ids in batch["input_ids"]]
        measured = {tuple(ids.tolist()) for _, ids in before.rows} if isinstance(before, DenseReference) else set()
        if files := [source for name, source in self.calibration.named.items() if name != GENERATED]:
            more = replace(self.calibration, sources=files, weights=None, tokens=(examples + len(measured)) * self.length)
            rows += [ids for batch in more.read(self.model) for ids in batch["input_ids"]]
        unseen = {tuple(ids.tolist()): ids.cpu() for ids in rows}
        data: Any = [{"input_ids": ids, "labels": ids} for row, ids in unseen.items() if row not in measured]
        return DataLoader(data, batch_size, shuffle=True, generator=chance)

    def _named(self, cost: Cost) -> str | None:
        """Names the text that was calibrated and measured on, where no table of texts does."""
        if isinstance(cost, list):
            return None
        if self.metric == "perplexity":
            return f"text to calibrate on: {', '.join(self.calibration.named)}; measured on nothing"
        measured = "nothing" if cost is None else f"its split '{self._labelled.split}'"
        what = "images" if self._labelled.of_images else "text"
        return f"{what} to calibrate on: the split 'train' of {self.examples.data}; measured on {measured}"
