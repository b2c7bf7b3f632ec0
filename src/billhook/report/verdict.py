"""Verdict on a changed model, compared with the dense model and with limits."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.arguments import check_fraction, check_int, check_number, check_types
from billhook.checkpoints.card import degradation_rows, table, written_rows
from billhook.display import Printable
from billhook.engine import Batch, check_batches, fingerprint, identity_of, replace_file, source_of
from billhook.model import check_values, text_config, tokenizer_of
from billhook.progress import OnProgress
from billhook.report.degradation import DenseReference, TextDegradation, degradation_table
from billhook.report.generation import generates
from billhook.report.predictions import OutputsKind, outputs_kind
from billhook.report.writing import TEMPERATURES, DenseWriting, Written

CERTAIN = 2.0
"""Standard errors between a figure and its limit from which the comparison is certain."""


@dataclass(frozen=True)
class Limits:
    """How much a changed model may differ from the dense model. None sets no limit.

    Args:
        max_ratio: Most that the perplexity on each calibrated text may rise, as a ratio (bits per byte with another tokenizer).
        max_unseen_ratio: The same for each text that was not calibrated on.
        max_loops: Largest share, in [0, 1], of texts that loop where the dense model's text does not.
        min_agreement: Smallest share, in [0, 1], of positions of each text with the same most likely token, or label.
        min_cosine: Smallest mean cosine, in [0, 1], of the token states of models without logits, on each text.

    Raises:
        ValueError: If a limit is out of range.

    Example:
        >>> Limits(max_ratio=1.2, max_loops=0.05)
        Limits(max_ratio=1.2, max_unseen_ratio=None, max_loops=0.05, min_agreement=None, min_cosine=None)
    """

    max_ratio: float | None = None
    max_unseen_ratio: float | None = None
    max_loops: float | None = None
    min_agreement: float | None = None
    min_cosine: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_ratio", "max_unseen_ratio"):
            if (ratio := getattr(self, name)) is not None:
                check_number(name, ratio, above=0)
        for name in ("max_loops", "min_agreement", "min_cosine"):
            if (share := getattr(self, name)) is not None:
                check_fraction(name, share, "[0, 1]")


@dataclass(frozen=True)
class Check:
    """A figure and its limit.

    Attributes:
        limit: Name of the limit.
        of: Name of the text, or what was written.
        value: The figure.
        error: Its standard error.
        bound: The limit.
        examples: Number of examples of the figure.
    """

    limit: str
    of: str
    value: float
    error: float
    bound: float
    examples: int

    @property
    def passes(self) -> bool:
        """Returns whether the figure is within the limit."""
        within = self.value >= self.bound if self.limit.startswith("min") else self.value <= self.bound
        return within and not math.isnan(self.value)

    def text(self) -> str:
        """Returns a line with the figure, its standard error, and the limit."""
        line = f"{self.limit}={self.bound:g}: {self.of} {self.value:.3f} ± {self.error:.3f}"
        distance = abs(self.value - self.bound)
        if not distance < CERTAIN * self.error:
            return line
        if distance == 0:
            return f"{line} (undecided)"
        needed = math.ceil(self.examples * (CERTAIN * self.error / distance) ** 2)
        return f"{line} (undecided: {self.examples} examples, and about {needed:,} would decide)"


@dataclass(frozen=True, repr=False)
class Verdict(Printable):
    """Result of `verdict`.

    Attributes:
        texts: Comparison of predictions on each text.
        written: What both models have written, by temperature; empty if nothing was.
        limits: The limits.
    """

    texts: Sequence[TextDegradation]
    written: Sequence[Written] = ()
    limits: Limits = field(default_factory=Limits)

    @property
    def checks(self) -> list[Check]:
        """All figures that have a limit."""
        return list(self._checks())

    @property
    def broken(self) -> list[Check]:
        """Figures beyond their limits."""
        return [check for check in self.checks if not check.passes]

    def _checks(self) -> Iterator[Check]:
        limits = self.limits
        for text in self.texts:
            name = "max_ratio" if text.inside else "max_unseen_ratio"
            if (bound := getattr(limits, name)) is not None:
                yield Check(name, text.source, *text.shown_ratio, bound, text.rows)
            for name in ("agreement", "cosine"):
                if (bound := getattr(limits, f"min_{name}")) is not None:
                    yield Check(f"min_{name}", text.source, getattr(text, name), getattr(text, f"{name}_error"), bound, text.rows)
        if limits.max_loops is not None:
            for written in self.written:
                of = f"texts written at T={written.temperature:g}" if written.temperature else "texts written greedily"
                yield Check("max_loops", of, *written.new_loops(), limits.max_loops, len(written.after.loops))

    def text(self) -> str:
        """Returns tables of predictions and of written text, and a line for each limit."""
        plain = self.to_json()
        lines = [degradation_table(plain["degradation"], plain["written"])]
        for check in self.checks:
            lines += [f"{'pass' if check.passes else 'FAIL'}  {check.text()}"]
        return "\n".join(lines)

    def markdown(self) -> str:
        """Returns the tables and limits in Markdown, such as for a pull request."""
        plain = self.to_json()
        parts = [table(*degradation_rows(plain["degradation"]))]
        parts += [table(*written_rows(plain["written"]))] * bool(self.written)
        parts += ["\n".join(f"- {'pass' if check.passes else '**FAIL**'} {check.text()}" for check in self.checks)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        checks = [asdict(check) | {"passes": check.passes} for check in self.checks]
        checks = [{name: None if value != value else value for name, value in check.items()} for check in checks]  # not a number
        plain = {"degradation": [text.to_json() for text in self.texts], "written": [texts.to_json() for texts in self.written]}
        return plain | {"checks": checks}

    def _renderables(self) -> list[RenderableType]:
        return [self.text()]


def verdict(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    batches: Iterable[Any],
    inside: Sequence[str] = (),
    limits: Limits | None = None,
    prompts: int = 4,
    seed: int = 0,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
    folder: Path | None = None,
    progress: OnProgress | None = None,
) -> Verdict:
    """Compares outputs of a changed model with the dense model's, and text that both write.

    Outputs are compared on all batches: next-token predictions, else the logits or states of each token. Language models also
    continue the first 32 tokens of some examples by at most 256 tokens, greedily and at a temperature of 0.7; a model with a chat
    template is asked to continue the text. A text loops if fewer than 0.55 of its 4-grams are distinct, or if it does not end and
    its last phrase of at least two tokens repeats three times.

    Args:
        dense: The dense model.
        model: The changed model.
        batches: Examples to compare on, `{"input_ids": [batch, length]}`, with the names of their sources (`Batch`).
        inside: Names of sources that the model was calibrated on.
        limits: How much the models may differ. Defaults to no limits.
        prompts: Number of texts to write for each source and temperature. 0 writes none, as do models that predict no next token.
        seed: Sampling seed.
        tokenizers: Tokenizers of both models. Defaults to those saved with them.
        folder: Folder that keeps the dense model's figures for further models. Defaults to None.
        progress: Callback with the number of finished examples and texts, and the total.

    Raises:
        ValueError: If the models are not causal language models or encoders of text, their outputs are of different kinds, there
            is no text, or a figure with a limit cannot be measured.

    Example:
        >>> import torch, billhook as bh
        >>> from billhook.report.verdict import Limits
        >>> dense, model = bh.load("tiny"), bh.load("tiny")
        >>> batches = [{"input_ids": torch.arange(i, i + 32)[None]} for i in range(4)]
        >>> result = bh.verdict(dense, model, batches, limits=Limits(max_unseen_ratio=1.1), prompts=0)
        >>> result.broken, result.texts[0].agreement
        ([], 1.0)
    """
    check_types(verdict, locals())
    check_int("prompts", prompts, 0)
    check_int("seed", seed, 0)
    limits = limits or Limits()
    for name, candidate in {"dense": dense, "model": model}.items():
        check_compared(name, candidate)
        check_values(candidate)
    rows = [Batch({"input_ids": ids[None]}, source_of(batch)) for batch in check_batches(batches) for ids in _ids(batch)]
    if not rows:
        raise ValueError("batches is empty. Pass at least one example.")
    kind, size = outputs_kind(dense)
    if outputs_kind(model) != (kind, size):
        sizes = f" of size {size:,} for each token" if size else ""
        raise ValueError(f"model: {type(model).__name__} does not return {kind}{sizes}, as {type(dense).__name__} does.")
    prompts = prompts if generates(dense) else 0
    before, after = tokenizers or (None, None)
    resized = text_config(dense.config).vocab_size != text_config(model.config).vocab_size
    if tokenizers is None and (prompts or resized):
        if not (dense.name_or_path and model.name_or_path):
            choice = "" if resized else ", or prompts=0"
            raise ValueError(f"tokenizers: a model does not say where it came from. Pass both tokenizers{choice}.")
        before, after = tokenizer_of(dense, None), tokenizer_of(model, None)
    differ = before is not None and after is not None and before.get_vocab() != after.get_vocab()
    if differ and not generates(dense):
        raise ValueError("tokenizers: the tokens of encoders are compared one by one. Pass models with the same tokenizer.")
    counts = Counter(batch.source for batch in rows)
    check_measured(limits, counts, inside, prompts, kind, differ)
    file, stored = None, dict[str, Tensor]()
    if folder is not None:
        examples = [(batch.source, batch["input_ids"]) for batch in rows]  # the sources decide on the prompts
        writer = before and (before.name_or_path, before.chat_template)
        key = fingerprint(identity_of(dense), examples, prompts, seed, writer, differ)
        file = folder / f"{key[:16]}.safetensors"
        with suppress(OSError):
            stored = load_file(file)
    texts = len(TEMPERATURES) * sum(min(prompts, count) for count in counts.values())
    done, total = 0, (len(rows) + texts) * (1 if stored else 2)

    def report(finished: int, of: int) -> None:
        nonlocal done
        if progress is not None:
            progress(done + finished, total)
        done += of if finished == of else 0

    reference = DenseReference(dense, rows, inside, progress=report, tokenizer=before if differ else None, stored=stored)
    writing = None
    if prompts:
        assert before is not None
        writing = DenseWriting(dense, reference.rows, prompts, before, seed, progress=report, stored=stored)
    if file is not None and not stored:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(".draft")
        save_file(reference.tensors() | (writing.tensors() if writing else {}), draft)
        replace_file(draft, file)
    degradation = reference.degradation(model, report, after if differ else None)
    return Verdict(degradation, writing.compare(model, after, report) if writing else (), limits)


def _ids(batch: Any) -> Tensor:  # noqa: ANN401 - whatever is in a user's batches
    """Returns the tokens of a batch, `[batch, length]`. Raises if it has none, or padding."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2:
        shape = list(ids.shape) if isinstance(ids, Tensor) else type(batch if ids is None else ids).__name__
        raise ValueError(f'batches: a batch must have "input_ids", [batch, length], of at least 2 tokens; got {shape}.')
    mask = batch.get("attention_mask")
    if mask is not None and not mask.all():
        raise ValueError("batches: an example is padded. Pass each example in a batch without padding.")
    return ids


def check_compared(name: str, model: PreTrainedModel) -> None:
    """Raises if a model is neither a causal language model nor an encoder of text."""
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise ValueError(f"{name}: {type(model).__name__} is neither a causal language model nor an encoder of text.")


def check_measured(
    limits: Limits, sources: Collection[str], inside: Sequence[str], prompts: int, kind: OutputsKind, differ: bool = False
) -> None:
    """Raises if a figure with a limit will not be measured."""
    no_loss = "" if kind == "next-token predictions" else "the models predict no next token"
    states = kind == "token states"
    problems = {
        "max_ratio": no_loss or ("" if {*inside} & {*sources} else "no text was calibrated on"),
        "max_unseen_ratio": no_loss or ("" if {*sources} - {*inside} else "every text was calibrated on"),
        "max_loops": no_loss or ("" if prompts else "prompts=0 writes no text"),
        "min_agreement": "the models have different tokenizers" if differ else "the models have no logits" * states,
        "min_cosine": "" if states else "the models have logits",
    }
    for name, problem in problems.items():
        if problem and (bound := getattr(limits, name)) is not None:
            raise ValueError(f"{name}={bound:g} has no figure, because {problem}. Remove the limit.")
