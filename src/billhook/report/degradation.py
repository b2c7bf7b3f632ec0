"""Degradation of a model: perplexity ratio, and comparison of outputs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.calibration.reading import Rows
from billhook.checkpoints.card import Record, degradation_rows, written_rows
from billhook.display import render_table
from billhook.engine import (
    SINGLE_PROCESS,
    Comm,
    Outputs,
    Run,
    activation_files,
    evaluating_without_grad,
    is_sharded,
    run_side_by_side,
    runs_of,
    source_of,
    store_of,
)
from billhook.model import check_ids
from billhook.progress import OnProgress
from billhook.report.generation import generates
from billhook.report.predictions import Comparison, Example, ExampleText, Predictions, compared_outputs, mean_loss


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Rows | None, examples: int, progress: OnProgress | None = None) -> float | None:
    """Returns the perplexity on the first examples; None without next-token predictions.

    Args:
        model: The model.
        rows: Tokenized examples. None returns None.
        examples: Number of examples.
        progress: Callback with the number of finished examples and the total.
    """
    if rows is None or not examples or not generates(model):
        return None
    dataset: Any = rows
    texts = []
    for number in range(min(examples, len(dataset))):
        texts.append(torch.tensor([dataset[number]["input_ids"]], device=model.device))
        check_ids(model, texts[-1])
    losses = {}

    def read(number: int) -> None:
        logits = model(input_ids=texts[number], use_cache=False).logits[0, :-1].float()
        losses[number] = cross_entropy(logits, texts[number][0, 1:], reduction="none").cpu().double().sum()
        if progress is not None:
            progress(len(losses), len(texts))

    run_side_by_side(model, [partial(read, number) for number in range(len(texts))])
    return math.exp(sum(losses.values()) / sum(ids.shape[1] - 1 for ids in texts))


@torch.no_grad()
def accuracy(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> float | None:
    """Returns the accuracy on labeled examples; None without examples."""
    correct = []
    for batch in batches:
        inputs: dict[str, Any] = {
            name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in batch.items()
            if name != "labels"
        }
        correct += (model(**inputs).logits.argmax(-1).cpu() == batch["labels"]).tolist()
    return sum(correct) / len(correct) if correct else None


SAME = 1e-3
"""Models whose losses on every example differ by less than this ratio count as the same model."""
NUMBERS = ("before", "after", "ratio_error", *(f"{name}{end}" for name in Comparison._fields for end in ("", "_error")))
"""Numbers of a text in records."""
TWICE = 2.0
"""A warning lists out-of-domain texts that degrade more than this many times as much as in-domain texts."""


@dataclass(frozen=True)
class TextDegradation:
    """Degradation on a text.

    Attributes:
        source: Name of the text.
        inside: True if the text is a source of the calibration data.
        before: Perplexity of the dense model. NaN, as all figures that do not apply, if it predicts no next token.
        after: Perplexity of the changed model.
        ratio_error: Paired standard error of after / before over examples.
        kl: Mean KL divergence of predictions from the dense model's, in nats.
        kl_error: Standard error of `kl` over examples.
        rows: Number of examples.
        agreement: Share of positions at which both models have the same most likely token, or label.
        agreement_error: Standard error of `agreement` over examples.
        acceptance: Share of this model's drafted tokens that the dense model accepts in speculative sampling, sum of min(p, q).
        acceptance_error: Standard error of `acceptance` over examples.
        cosine: Mean cosine of the token states of models without logits.
        cosine_error: Standard error of `cosine` over examples.
        token_bytes: Bytes of text per token of the dense model. Set if the changed model has another tokenizer; `after` is then
            per token of the dense model too, and there is no `kl`, `agreement`, or `acceptance`.
        token_ratio: Tokens of the changed model per token of the dense model.
    """

    source: str
    inside: bool
    before: float
    after: float
    ratio_error: float
    kl: float
    kl_error: float
    rows: int
    agreement: float = math.nan
    agreement_error: float = math.nan
    acceptance: float = math.nan
    acceptance_error: float = math.nan
    cosine: float = math.nan
    cosine_error: float = math.nan
    token_bytes: float | None = None
    token_ratio: float = 1.0

    @property
    def ratio(self) -> float:
        """Perplexity after / before."""
        return self.after / self.before

    @property
    def bits_per_byte(self) -> tuple[float, float] | None:
        """Bits per byte of text before and after. None if both models have the same tokenizer."""
        if self.token_bytes is None:
            return None
        return math.log2(self.before) / self.token_bytes, math.log2(self.after) / self.token_bytes

    @property
    def shown_ratio(self) -> tuple[float, float]:
        """Ratio of perplexities, or of bits per byte, with its standard error."""
        if (bits := self.bits_per_byte) is None:
            return self.ratio, self.ratio_error
        return bits[1] / bits[0], self.ratio_error / self.ratio / math.log(self.before)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON-compatible data; non-finite numbers become strings."""
        plain: dict[str, Any] = {"source": self.source, "inside": self.inside, "rows": self.rows}
        for name in ("ratio", *NUMBERS):
            value = getattr(self, name)
            plain[name] = value if math.isfinite(value) else str(value)
        if self.token_bytes is not None:
            plain |= {"token_bytes": self.token_bytes, "token_ratio": self.token_ratio, "bits_per_byte": self.bits_per_byte}
            plain["bits_ratio_error"] = self.shown_ratio[1]
        return plain


def _examples(rows: Iterable[tuple[str, Tensor]]) -> list[Example]:
    return [Example(ids) for _, ids in rows]


class DenseReference:
    """Stored losses and outputs of a dense model, for comparing changed models.

    A model that predicts next tokens is compared by its loss and predictions, others by logits or token states alone.

    Args:
        model: The dense model.
        batches: Examples, `{"input_ids": [batch, length]}`, with the names of their sources (`Batch`).
        inside: Names of the sources of the calibration data.
        comm: Ranks, each of which evaluates a share of the examples.
        tokenizer: The model's tokenizer, if the changed model will have another. Examples are then compared as texts.
        stored: What `tensors` of an equal object has returned; the model is then not evaluated.

    Attributes:
        rows: The examples, each with the name of its source.
        losses: The dense model's loss on each example, float64, `[rows]`; of a model that predicts no next token, the root mean
            square of a fixed component of its outputs, which tells two models apart.

    Raises:
        ValueError: If the model has neither logits nor token states.

    Example:
        >>> import billhook as bh
        >>> from billhook.report.degradation import DenseReference
        >>> model = bh.load("tiny")
        >>> dense = DenseReference(model, bh.generated(model, examples=4, length=64), inside=["generated"])
        >>> [(text.source, text.ratio, round(text.kl, 6)) for text in dense.degradation(model)]
        [('generated', 1.0, 0.0)]
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Any],
        inside: Sequence[str] = (),
        comm: Comm = SINGLE_PROCESS,
        progress: OnProgress | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.inside, self._comm, self._has_loss = set(inside), comm, generates(model)
        self.rows = [(source_of(batch), ids.cpu()) for batch in batches for ids in batch["input_ids"]]
        self._texts = [ExampleText.of(ids, tokenizer) for _, ids in self.rows] if tokenizer else []
        self._examples = [text.encoded(tokenizer) for text in self._texts] if tokenizer else _examples(self.rows)
        self._rank_rows = range(comm.rank, len(self.rows), comm.size)
        self._predictions = dict[int, Predictions]()
        if stored:
            self.losses = stored["losses"]
            for row in self._rank_rows:
                is_logits = f"logs.{row}" in stored
                values = stored[f"logs.{row}" if is_logits else f"states.{row}"].float()
                values = values.log_softmax(-1) if is_logits else values  # rounded probabilities do not sum to one
                self._predictions[row] = Predictions(stored[f"positions.{row}"], values, is_logits)
            return
        losses = torch.zeros(len(self.rows), dtype=torch.float64)

        def visit(row: int, outputs: Outputs, loss: float) -> None:
            predicted = Predictions.of(outputs, len(self._rank_rows))
            losses[row] = loss
            self._predictions[row] = predicted if files is None else replace(predicted, values=files.copy(predicted.values))

        with activation_files(store_of(model)) as files:
            self._evaluate(model, self._examples, visit, progress)
        self.losses = comm(losses)

    def _evaluate(
        self,
        model: PreTrainedModel,
        examples: Sequence[Example],
        visit: Callable[[int, Outputs, float], None],
        progress: OnProgress | None,
    ) -> None:
        """Calls `visit` with each of this rank's examples, its outputs, and its mean loss."""
        finished = set()

        def read(row: int, run: Run) -> None:
            example, outputs = examples[row], compared_outputs(model, run)
            if self._has_loss:
                outputs = outputs._replace(values=outputs.values[example.first - 1 : -1])
                loss = mean_loss(outputs.values, example.ids[example.first :].to(outputs.values.device))
            else:
                # a last norm fixes the mean square of states, but not that of their components in one direction
                direction = torch.arange(outputs.values.shape[-1], device=outputs.values.device).float().cos()
                loss = float((outputs.values.float() @ direction).square().mean().sqrt())
            visit(row, outputs, loss)
            finished.add(row)
            if progress is not None:
                progress(len(finished), len(self._rank_rows))

        # ranks with fewer examples repeat the first one, so that all ranks gather shards equally often
        most = math.ceil(len(self.rows) / self._rank_rows.step) if is_sharded(model) else 0
        padded = [*self._rank_rows, *[0] * (most - len(self._rank_rows))]
        runs = runs_of(model, [{"input_ids": examples[row].ids[None]} for row in padded])
        reads = [partial(read, row, run) for row, run in zip(self._rank_rows, runs, strict=False)]
        with evaluating_without_grad(model):
            run_side_by_side(model, [*reads, *(run.forward for run in runs[len(reads) :])])

    def degradation(
        self, model: PreTrainedModel, progress: OnProgress | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[TextDegradation]:
        """Compares a changed model with the dense model, by source.

        `progress` is called with the number of finished examples and the total. `tokenizer` is the changed model's, if it is not
        the dense model's; this object must have been made with a tokenizer then.
        """
        results = torch.zeros(len(self.rows), 1 + len(Comparison._fields), dtype=torch.float64)  # the loss is first
        examples = [text.encoded(tokenizer) for text in self._texts] if tokenizer else self._examples
        num_before, num_after = ([example.predicted for example in encoded] for encoded in (self._examples, examples))

        def visit(row: int, outputs: Outputs, loss: float) -> None:
            dense = self._predictions.get(row) if tokenizer is None else None
            results[row, 0] = loss * num_after[row] / num_before[row]  # per token of the dense model
            comparison = Comparison() if dense is None else dense.compare(outputs)
            if not self._has_loss:
                comparison = comparison._replace(acceptance=math.nan)
            results[row, 1:] = torch.tensor(comparison)

        self._evaluate(model, examples, visit, progress)
        self._comm.sum_(results)
        rows_by_source: dict[str, list[int]] = {}
        for row, (source, _) in enumerate(self.rows):
            rows_by_source.setdefault(source, []).append(row)
        degradation = []
        for source, rows in rows_by_source.items():
            before, (after, *compared) = self.losses[rows], results[rows].T
            if not self._has_loss:
                before = after = torch.full_like(before, math.nan)
            others = dict[str, float]()
            for name, values in zip(Comparison._fields, compared, strict=True):
                others |= {name: float(values.mean()), f"{name}_error": _error(values)}
            if tokenizer:
                count = sum(num_before[row] for row in rows)
                others["token_bytes"] = sum(self._texts[row].bytes for row in rows) / count
                others["token_ratio"] = sum(num_after[row] for row in rows) / count
            degradation.append(
                TextDegradation(
                    source,
                    source in self.inside,
                    before=math.exp(float(before.mean())),
                    after=math.exp(float(after.mean())),
                    ratio_error=math.exp(float((after - before).mean())) * _error(after - before),
                    rows=len(rows),
                    **others,
                )
            )
        return degradation

    def tensors(self) -> dict[str, Tensor]:
        """Returns the losses and outputs to store (float16; states in bfloat16)."""
        tensors = {"losses": self.losses}
        for row, predicted in self._predictions.items():
            values = predicted.values.cpu()
            tensors[f"positions.{row}"] = predicted.positions.cpu()
            tensors |= {f"logs.{row}": values.half()} if predicted.is_logits else {f"states.{row}": values.bfloat16()}
        return tensors

    def state_dict(self) -> dict[str, Any]:
        """Returns the examples and the dense model's losses, without its large predictions."""
        sources, ids = map(list, zip(*self.rows, strict=True))
        return {"sources": sources, "ids": ids, "losses": self.losses, "inside": sorted(self.inside)}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Restores the examples and losses of an earlier process.

        Returns:
            True if this process's dense model has the same losses on the same examples. If not, its predictions are dropped, and
            the divergence is NaN.
        """
        rows = list(zip(state["sources"], state["ids"], strict=True))
        texts = len(rows) == len(self.rows) and all(
            source == name and torch.equal(ids, now) for (source, ids), (name, now) in zip(rows, self.rows, strict=True)
        )
        same = texts and torch.allclose(self.losses, state["losses"], rtol=SAME, atol=0)
        self.rows, self.losses, self.inside = rows, state["losses"], set(state["inside"])
        self._examples = _examples(rows)
        if not same:
            self._predictions, self._rank_rows = {}, range(self._rank_rows.start, len(rows), self._rank_rows.step)
        return same


def _error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def degradation_table(degradation: Sequence[Record], written: Sequence[Record] = ()) -> str:
    """Formats records of `TextDegradation`, and of `Written` if any, as tables."""
    tables = [degradation_rows(degradation), *([written_rows(written)] if written else [])]
    return "\n\n".join(render_table(heads, rows, aligns="<<>") for heads, rows in tables)


def degradation_warning(degradation: Sequence[TextDegradation]) -> str | None:
    """Lists out-of-domain texts that degrade more than twice as much as in-domain texts.

    The difference must exceed two standard errors. If in-domain texts do not degrade, any significant increase counts.
    """
    increases, errors = list[float](), list[float]()  # of log-perplexity or log bits per byte, in-domain
    for text in degradation:
        ratio, error = text.shown_ratio
        if text.inside:
            increases.append(math.log(ratio))
            errors.append(error / ratio)
    if not increases:
        return None
    mean = sum(increases) / len(increases)
    allowed, allowed_error = TWICE * max(mean, 0.0), TWICE * math.hypot(*errors) / len(errors)
    worse = []
    for text in degradation:
        ratio, error = text.shown_ratio
        significant = math.log(ratio) - allowed > 2 * math.hypot(error / ratio, allowed_error)
        if significant and not text.inside:
            worse.append(f"{text.source} ({ratio:.2f}x {'perplexity' if text.bits_per_byte is None else 'bits per byte'})")
    if not worse:
        return None
    degraded = "more than twice as much as the calibration texts" if mean > 0 else "and the calibration texts did not"
    return f"out-of-domain texts degraded {degraded}: {', '.join(worse)}. Add similar text to the calibration data."
