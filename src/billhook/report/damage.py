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

from billhook.bar import Told
from billhook.calibration.reading import Rows
from billhook.display import aligned
from billhook.engine.batches import Run, runs_of, source_of
from billhook.engine.comm import ALONE, Comm
from billhook.engine.passes import activation_files, together
from billhook.engine.sharding import is_sharded
from billhook.engine.state import undisturbed
from billhook.engine.store import store_of
from billhook.report.generation import generates
from billhook.report.predictions import Predictions, logits_now, loss_of


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Rows | None, examples: int, progress: Told | None = None) -> float | None:
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

    together(model, [partial(read, number) for number in range(len(texts))])
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
class TextDamage:
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


class Dense:
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
        >>> from billhook.report.damage import Dense
        >>> model = bh.load("tiny")
        >>> dense = Dense(model, bh.generated(model, examples=4, length=64), inside=["generated"])
        >>> found = dense.damage(model)
        >>> [(one.source, one.ratio, round(one.kl, 6)) for one in found]
        [('generated', 1.0, 0.0)]
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Any],
        inside: Sequence[str] = (),
        comm: Comm = ALONE,
        progress: Told | None = None,
    ) -> None:
        self.inside, self._comm = set(inside), comm
        self.rows = [(source_of(batch), ids.cpu()) for batch in batches for ids in batch["input_ids"]]
        self._here = range(comm.rank, len(self.rows), comm.size)
        self._held = dict[int, Predictions]()
        losses = torch.zeros(len(self.rows), dtype=torch.float64)

        def take(row: int, logits: Tensor, loss: float) -> None:
            held = Predictions.of(logits, len(self._here))
            losses[row] = loss
            self._held[row] = held if files is None else replace(held, logs=files.copy(held.logs))

        with activation_files(store_of(model)) as files:
            self._each(model, take, progress)
        self.losses = comm(losses)

    def _each(self, model: PreTrainedModel, take: Callable[[int, Tensor, float], None], progress: Told | None) -> None:
        """Reads the rows that are read here; `take` is given each, its logits `[length - 1, vocabulary]` and its mean loss."""
        done = set[int]()

        def read(row: int, run: Run) -> None:
            logits = logits_now(model, run)[:-1]
            take(row, logits, loss_of(logits, self.rows[row][1][1:].to(logits.device)))
            done.add(row)
            if progress is not None:
                progress(len(done), len(self._here))

        most = math.ceil(len(self.rows) / self._here.step) if is_sharded(model) else 0
        others = [0] * (most - len(self._here))  # so that all ranks gather what is sharded equally often
        runs = runs_of(model, [{"input_ids": self.rows[row][1][None]} for row in (*self._here, *others)])
        reads = [partial(read, row, run) for row, run in zip(self._here, runs, strict=False)]
        with undisturbed(model):
            together(model, [*reads, *(run.forward for run in runs[len(reads) :])])

    def damage(self, model: PreTrainedModel, progress: Told | None = None) -> list[TextDamage]:
        """Compares a changed model with the dense one, by source; `progress` is called with how many rows are done."""
        found = torch.zeros(len(self.rows), 2, dtype=torch.float64)

        def take(row: int, logits: Tensor, loss: float) -> None:
            held = self._held.get(row)
            found[row, 0] = loss
            found[row, 1] = math.nan if held is None else held.divergence(logits) / len(held.positions)

        self._each(model, take, progress)
        self._comm.sum_(found)
        places: dict[str, list[int]] = {}
        for row, (source, _) in enumerate(self.rows):
            places.setdefault(source, []).append(row)
        return [self._of(source, self.losses[own], *found[own].T) for source, own in places.items()]

    def _of(self, source: str, before: Tensor, after: Tensor, kl: Tensor) -> TextDamage:
        ratio = math.exp(float((after - before).mean()))
        return TextDamage(
            source,
            source in self.inside,
            math.exp(float(before.mean())),
            math.exp(float(after.mean())),
            ratio * _error(after - before),
            float(kl.mean()),
            _error(kl),
            len(before),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the rows and what the dense model loses on them, but not its predictions, which would be large."""
        sources, ids = (list(own) for own in zip(*self.rows, strict=True))
        return {"sources": sources, "ids": ids, "losses": self.losses, "inside": sorted(self.inside)}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Takes the rows and losses of an earlier process.

        Returns:
            Whether the model that was read here is the same, by its losses on the same rows: if not, its predictions are
            dropped, and no divergence is told.
        """
        rows = list(zip(state["sources"], state["ids"], strict=True))
        texts = len(rows) == len(self.rows) and all(
            one == other and torch.equal(ids, now) for (one, ids), (other, now) in zip(rows, self.rows, strict=True)
        )
        same = texts and torch.allclose(self.losses, state["losses"], rtol=SAME, atol=0)
        self.rows, self.losses, self.inside = rows, state["losses"], set(state["inside"])
        if not same:
            self._held, self._here = {}, range(self._here.start, len(rows), self._here.step)
        return same


def _error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def table(damage: Sequence[TextDamage]) -> str:
    """Shows what a change costs, a row for each text: ± are standard errors over rows, KL is to the dense model, in nats."""
    rows = []
    for one in damage:
        ratio, kl = (_with_error(*own) for own in ((one.ratio, one.ratio_error), (one.kl, one.kl_error)))
        where = "calibrated on" if one.inside else "not calibrated on"
        rows.append([one.source, where, f"{one.before:,.4g}", f"{one.after:,.4g}", ratio, kl])
    return aligned(["perplexity on", "", "before", "after", "ratio", "KL"], rows, aligns="<<>")


def _with_error(value: float, error: float) -> str:
    if math.isnan(value):
        return "unknown"
    return f"{value:,.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def warning_of(damage: Sequence[TextDamage]) -> str | None:
    """Names the texts outside of the calibration that lose over twice as much log-perplexity as those inside, beyond chance.

    Beyond chance is further than two standard errors of the difference; where those inside lose nothing, any loss is.
    """
    inside = [one for one in damage if one.inside]
    if not inside:
        return None
    mean = sum(math.log(one.ratio) for one in inside) / len(inside)
    usual = TWICE * max(mean, 0.0)
    error = TWICE * math.hypot(*(one.ratio_error / one.ratio for one in inside)) / len(inside)

    def beyond_chance(one: TextDamage) -> bool:
        return math.log(one.ratio) - usual > 2 * math.hypot(one.ratio_error / one.ratio, error)

    worse = [one for one in damage if not one.inside and beyond_chance(one)]
    if not worse:
        return None
    what = ", ".join(f"{one.source} ({one.ratio:.2f} times its perplexity)" for one in worse)
    lost = "has lost over twice as much as what was" if mean > 0 else "has lost, and what was has not"
    return f"what was not calibrated on {lost}: {what}; calibrate on text of this kind too"
