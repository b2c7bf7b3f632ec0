"""Tells what a change of a language model costs on texts: perplexity, and how far predictions are from the dense model's."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from typing_extensions import Self

from billhook.calibration.reading import Rows
from billhook.display import render_table
from billhook.engine.batches import Run, runs_of, source_of
from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.engine.passes import activation_files, run_side_by_side
from billhook.engine.sharding import is_sharded
from billhook.engine.state import evaluating_without_grad
from billhook.engine.store import store_of
from billhook.progress import OnProgress
from billhook.report.generation import generates
from billhook.report.predictions import Predictions, compute_logits, mean_loss


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Rows | None, examples: int, progress: OnProgress | None = None) -> float | None:
    """Measures exp of the mean negative log-likelihood of each next token; None for a model that predicts none.

    `progress` is called with how many rows have been read, and how many will be.
    """
    if rows is None or not examples or not generates(model):
        return None
    every: Any = rows
    texts = [torch.tensor([every[number]["input_ids"]], device=model.device) for number in range(min(examples, len(every)))]
    losses = dict[int, Tensor]()

    def read(number: int) -> None:
        logits = model(input_ids=texts[number], use_cache=False).logits[0, :-1].float()
        losses[number] = cross_entropy(logits, texts[number][0, 1:], reduction="none").cpu().double().sum()
        if progress is not None:
            progress(len(losses), len(texts))

    run_side_by_side(model, [partial(read, number) for number in range(len(texts))])
    return math.exp(sum(losses.values()) / sum(ids.shape[1] - 1 for ids in texts))


@torch.no_grad()
def accuracy(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> float | None:
    """Measures the share of examples whose label has the highest logit; None if there are no examples."""
    right = list[bool]()
    for batch in batches:
        inputs: dict[str, Any] = {
            name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
            for name, tensor in batch.items()
            if name != "labels"
        }
        right += (model(**inputs).logits.argmax(-1).cpu() == batch["labels"]).tolist()
    return sum(right) / len(right) if right else None


SAME = 1e-3
"""Two models that lose the same on every row but for such a share are one, computed elsewhere."""
TWICE = 2.0
"""A text outside of the calibration that loses so many times as much as those inside is warned of."""


@dataclass(frozen=True)
class TextDegradation:
    """Costs of a change on one text.

    Attributes:
        source: The name of the text.
        inside: Whether the change was calibrated on such text.
        before: Perplexity of the dense model.
        after: Perplexity of the changed model.
        ratio_error: Standard error of after / before, of the differences row by row.
        kl: Mean KL divergence of the changed model's next-token predictions from the dense model's, in nats.
        kl_error: Its standard error, over rows.
        rows: How many rows of text were read.
    """

    source: str
    inside: bool
    before: float
    after: float
    ratio_error: float
    kl: float
    kl_error: float
    rows: int

    @property
    def ratio(self) -> float:
        """Perplexity after to before."""
        return self.after / self.before

    def to_json(self) -> dict[str, Any]:
        """Returns plain data; numbers that are not finite as words."""
        plain = {name: getattr(self, name) for name in ("source", "inside", "rows")}
        numbers = {name: getattr(self, name) for name in ("before", "after", "ratio", "ratio_error", "kl", "kl_error")}
        return plain | {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Self:
        """Reads what `to_json` returns."""
        numbers = {name: float(plain[name]) for name in ("before", "after", "ratio_error", "kl", "kl_error")}
        return cls(source=plain["source"], inside=plain["inside"], rows=plain["rows"], **numbers)


class DenseReference:
    """Predictions of a dense language model on rows of text, held so that a changed one can be compared with it.

    Args:
        model: The dense model.
        batches: Rows of text, `{"input_ids": [batch, length]}`, with the names of their sources (`Batch`).
        inside: The sources that the change is calibrated on.
        comm: The ranks, each of which reads a share of the rows.

    Attributes:
        rows: The rows, each with the name of its source.
        losses: What the dense model loses on each, float64, `[rows]`.

    Raises:
        ValueError: If the model predicts nothing, as it has no `logits`.

    Example:
        >>> import billhook as bh
        >>> from billhook.report.degradation import DenseReference
        >>> model = bh.load("tiny")
        >>> dense = DenseReference(model, bh.generated(model, examples=4, length=64), inside=["generated"])
        >>> found = dense.degradation(model)
        >>> [(one.source, one.ratio, round(one.kl, 6)) for one in found]
        [('generated', 1.0, 0.0)]
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Any],
        inside: Sequence[str] = (),
        comm: Comm = SINGLE_PROCESS,
        progress: OnProgress | None = None,
    ) -> None:
        self.inside, self._comm = set(inside), comm
        self.rows = [(source_of(batch), ids.cpu()) for batch in batches for ids in batch["input_ids"]]
        self._read_here = range(comm.rank, len(self.rows), comm.size)
        self._predictions = dict[int, Predictions]()
        losses = torch.zeros(len(self.rows), dtype=torch.float64)

        def take(row: int, logits: Tensor, loss: float) -> None:
            predicted = Predictions.of(logits, len(self._read_here))
            losses[row] = loss
            self._predictions[row] = predicted if files is None else replace(predicted, logs=files.copy(predicted.logs))

        with activation_files(store_of(model)) as files:
            self._each(model, take, progress)
        self.losses = comm(losses)

    def _each(self, model: PreTrainedModel, take: Callable[[int, Tensor, float], None], progress: OnProgress | None) -> None:
        """Reads the rows that are read here; `take` is given each, its logits `[length - 1, vocabulary]` and its mean loss."""
        done = set[int]()

        def read(row: int, run: Run) -> None:
            logits = compute_logits(model, run)[:-1]
            take(row, logits, mean_loss(logits, self.rows[row][1][1:].to(logits.device)))
            done.add(row)
            if progress is not None:
                progress(len(done), len(self._read_here))

        most = math.ceil(len(self.rows) / self._read_here.step) if is_sharded(model) else 0
        others = [0] * (most - len(self._read_here))  # so that all ranks gather what is sharded equally often
        runs = runs_of(model, [{"input_ids": self.rows[row][1][None]} for row in (*self._read_here, *others)])
        reads = [partial(read, row, run) for row, run in zip(self._read_here, runs, strict=False)]
        with evaluating_without_grad(model):
            run_side_by_side(model, [*reads, *(run.forward for run in runs[len(reads) :])])

    def degradation(self, model: PreTrainedModel, progress: OnProgress | None = None) -> list[TextDegradation]:
        """Compares a changed model with the dense one, by source; `progress` is called with how many rows are done."""
        now = torch.zeros(len(self.rows), 2, dtype=torch.float64)  # loss and divergence

        def take(row: int, logits: Tensor, loss: float) -> None:
            dense = self._predictions.get(row)
            now[row, 0] = loss
            now[row, 1] = math.nan if dense is None else dense.divergence(logits) / len(dense.positions)

        self._each(model, take, progress)
        self._comm.sum_(now)
        of_source: dict[str, list[int]] = {}
        for row, (source, _) in enumerate(self.rows):
            of_source.setdefault(source, []).append(row)
        degradation = []
        for source, rows in of_source.items():
            before, (after, kl) = self.losses[rows], now[rows].T
            degradation.append(
                TextDegradation(
                    source,
                    source in self.inside,
                    before=math.exp(float(before.mean())),
                    after=math.exp(float(after.mean())),
                    ratio_error=math.exp(float((after - before).mean())) * _error(after - before),
                    kl=float(kl.mean()),
                    kl_error=_error(kl),
                    rows=len(rows),
                )
            )
        return degradation

    def state_dict(self) -> dict[str, Any]:
        """Returns the rows and what the dense model loses on them, but not its predictions, which would be large."""
        sources, ids = map(list, zip(*self.rows, strict=True))
        return {"sources": sources, "ids": ids, "losses": self.losses, "inside": sorted(self.inside)}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Takes the rows and losses of an earlier process.

        Returns:
            Whether the model that was read here is the same, by its losses on the same rows: if not, its predictions are
            dropped, and no divergence is told.
        """
        rows = list(zip(state["sources"], state["ids"], strict=True))
        texts = len(rows) == len(self.rows) and all(
            source == name and torch.equal(ids, now) for (source, ids), (name, now) in zip(rows, self.rows, strict=True)
        )
        same = texts and torch.allclose(self.losses, state["losses"], rtol=SAME, atol=0)
        self.rows, self.losses, self.inside = rows, state["losses"], set(state["inside"])
        if not same:
            self._predictions, self._read_here = {}, range(self._read_here.start, len(rows), self._read_here.step)
        return same


def _error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def degradation_table(degradation: Sequence[TextDegradation]) -> str:
    """Shows what a change costs, a row for each text: ± are standard errors over rows, KL is to the dense model, in nats."""
    rows = []
    for text in degradation:
        ratio, kl = _with_error(text.ratio, text.ratio_error), _with_error(text.kl, text.kl_error)
        where = "calibrated on" if text.inside else "not calibrated on"
        rows.append([text.source, where, f"{text.before:,.4g}", f"{text.after:,.4g}", ratio, kl])
    return render_table(["perplexity on", "", "before", "after", "ratio", "KL"], rows, aligns="<<>")


def _with_error(value: float, error: float) -> str:
    if math.isnan(value):
        return "unknown"
    return f"{value:,.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def degradation_warning(degradation: Sequence[TextDegradation]) -> str | None:
    """Names the texts outside of the calibration that lose over twice as much log-perplexity as those inside, beyond chance.

    Beyond chance is further than two standard errors of the difference; where those inside lose nothing, any loss is.
    """
    inside = [text for text in degradation if text.inside]
    if not inside:
        return None
    mean = sum(math.log(text.ratio) for text in inside) / len(inside)
    usual = TWICE * max(mean, 0.0)
    error = TWICE * math.hypot(*(text.ratio_error / text.ratio for text in inside)) / len(inside)
    worse = list[str]()
    for text in degradation:
        beyond_chance = math.log(text.ratio) - usual > 2 * math.hypot(text.ratio_error / text.ratio, error)
        if beyond_chance and not text.inside:
            worse.append(f"{text.source} ({text.ratio:.2f} times its perplexity)")
    if not worse:
        return None
    lost = "has lost over twice as much as what was" if mean > 0 else "has lost, and what was has not"
    return f"what was not calibrated on {lost}: {', '.join(worse)}; calibrate on text of this kind too"
