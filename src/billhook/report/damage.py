"""Tells what a change of a language model costs on texts: perplexity, and how far predictions are from the dense model's."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from billhook.report.table import aligned
from billhook.running.batches import source_of
from billhook.running.undisturbed import undisturbed

BYTES = 2**28
"""How much of the dense model's predictions is held, to be compared with those of the changed one: evenly spaced positions."""
TWICE = 2.0
"""A text outside of the calibration that loses so many times as much as those inside is warned of."""


@dataclass(frozen=True)
class Damage:
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


@dataclass(frozen=True)
class _Row:
    """One row of text, and what the dense model says of it: its loss, and log-probabilities at some positions, float16."""

    source: str
    ids: Tensor
    loss: float
    positions: Tensor
    predictions: Tensor


class Dense:
    """Predictions of a dense language model on rows of text, held so that a changed one can be compared with it.

    Args:
        model: The dense model.
        batches: Rows of text, `{"input_ids": [batch, length]}`, with the names of their sources (`Batch`).
        inside: The sources that the change is calibrated on.

    Example:
        >>> import billhook as bh
        >>> from billhook.report.damage import Dense
        >>> model = bh.load("tiny")
        >>> dense = Dense(model, bh.generated(model, examples=4, length=64), inside=["generated"])
        >>> found = dense.damage(model)
        >>> [(one.source, one.ratio, round(one.kl, 6)) for one in found]
        [('generated', 1.0, 0.0)]
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[Any], inside: Sequence[str] = ()) -> None:
        self.inside = set(inside)
        rows = [(source_of(batch), ids[None]) for batch in batches for ids in batch["input_ids"]]
        vocabulary = int(model.config.get_text_config().vocab_size)
        few = max(BYTES // (2 * vocabulary * max(len(rows), 1)), 1)
        self.rows = [self._read(model, source, ids, few) for source, ids in rows]

    @staticmethod
    def _read(model: PreTrainedModel, source: str, ids: Tensor, few: int) -> _Row:
        logits, loss = _predict(model, ids)
        count = len(logits)
        positions = torch.linspace(0, count - 1, min(few, count)).round().long()
        return _Row(source, ids, loss, positions, logits[positions].log_softmax(-1).half())

    def damage(self, model: PreTrainedModel) -> list[Damage]:
        """Compares a changed model with the dense one, by source."""
        found: dict[str, list[tuple[float, float, float]]] = {}
        for row in self.rows:
            logits, loss = _predict(model, row.ids)
            now, then = logits[row.positions].log_softmax(-1), row.predictions.float().log_softmax(-1)
            kl = float(kl_div(now, then, reduction="batchmean", log_target=True))
            found.setdefault(row.source, []).append((row.loss, loss, kl))
        return [self._of(source, own) for source, own in found.items()]

    def _of(self, source: str, rows: Sequence[tuple[float, float, float]]) -> Damage:
        before, after, kl = (torch.tensor(own, dtype=torch.float64) for own in zip(*rows, strict=True))
        ratio = math.exp(float((after - before).mean()))
        return Damage(
            source,
            source in self.inside,
            math.exp(float(before.mean())),
            math.exp(float(after.mean())),
            ratio * _error(after - before),
            float(kl.mean()),
            _error(kl),
            len(rows),
        )


def _error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan


def _predict(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, float]:
    """Returns the logits of each next token, on the CPU, float32, `[length - 1, vocabulary]`, and the mean loss."""
    with undisturbed(model):
        logits = model(input_ids=ids.to(model.device)).logits[0, :-1].float().cpu()
    return logits, float(cross_entropy(logits, ids[0, 1:].cpu()))


def table(damage: Sequence[Damage]) -> str:
    """Shows what a change costs, a row for each text: ± are standard errors over rows, KL is to the dense model, in nats."""
    rows = [["perplexity on", "", "before", "after", "ratio", "KL"]]
    for one in damage:
        ratio, kl = (_with_error(*own) for own in ((one.ratio, one.ratio_error), (one.kl, one.kl_error)))
        where = "calibrated on" if one.inside else "not calibrated on"
        rows.append([one.source, where, f"{one.before:,.4g}", f"{one.after:,.4g}", ratio, kl])
    return aligned(rows, 2)


def _with_error(value: float, error: float) -> str:
    return f"{value:,.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def warning_of(damage: Sequence[Damage]) -> str | None:
    """Names the texts outside of the calibration lose over twice as much log-perplexity as those inside, beyond chance."""
    inside = [math.log(one.ratio) for one in damage if one.inside]
    if not inside:
        return None
    usual = sum(inside) / len(inside)
    certain = {one.source: math.log(one.ratio) - 2 * one.ratio_error / one.ratio for one in damage}
    worse = [one for one in damage if not one.inside and certain[one.source] > max(TWICE * usual, 0)]
    if not worse:
        return None
    what = ", ".join(f"{one.source} ({one.ratio:.2f} times its perplexity)" for one in worse)
    return f"what was not calibrated on has lost over twice as much as what was: {what}; calibrate on text of this kind too"
