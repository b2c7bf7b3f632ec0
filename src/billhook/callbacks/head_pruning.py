"""Masks, ranks again and removes heads at given steps of a fit."""

import re
import sys
from collections.abc import Mapping
from functools import partial
from itertools import takewhile
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim import Optimizer

from billhook.arguments import a_path, annotated, fraction, one_of
from billhook.callbacks.export import Export
from billhook.callbacks.head_masking import HeadMasking
from billhook.callbacks.head_ranking import HeadRanking, HeadRecord
from billhook.fit.calibration import FitCalibration, Given
from billhook.fit.event import Event, log_event
from billhook.fit.measure import measure
from billhook.fit.ranks import check_agreed, together
from billhook.fit.run import At, callbacks_of, check_at, rounds_of
from billhook.fit.shape_event import refuse_shape_changes
from billhook.importance.gate_gradient import GateGradient
from billhook.importance.score import Importance
from billhook.model.find import find_transformer
from billhook.plots.style import PICTURES
from billhook.pruning.amount import Ranking
from billhook.pruning.choice import check_choice
from billhook.pruning.planning import prune_units
from billhook.schedules import Schedule
from billhook.units.find import find_units
from billhook.units.units import Per

Mode = Literal["max", "min"]
KEEP = 0.9
HIGHER = {
    "acc",
    "accuracy",
    "auc",
    "auroc",
    "bleu",
    "f",
    "mcc",
    "precision",
    "recall",
    "rouge",
    "rougel",
    "corr",
    "spearman",
    "pearson",
}
LOWER = {"loss", "nll", "ce", "kl", "perplexity", "ppl", "error", "err", "mse", "rmse", "mae", "wer", "cer"}
"""Words in the names of figures that are better when higher, or lower."""


class Monitor:
    """A validation figure that must stay within a share of the best that it has been (Michel et al., 2019, section 4.1).

    >>> monitor = Monitor("val_accuracy", keep=0.9)
    >>> monitor.begin({"val_accuracy": 0.8})
    >>> monitor.is_worse({"val_accuracy": 0.75}), monitor.is_worse({"val_accuracy": 0.7})
    (False, True)
    """

    def __init__(
        self, name: str | None, keep: float | None = None, mode: Mode | None = None, measure_batches: int | None = None
    ) -> None:
        if name is None and (given := [f"{key}={own!r}" for key, own in {"keep": keep, "mode": mode}.items() if own is not None]):
            raise ValueError(f"{given[0]} is of a figure that is monitored: give monitor, the name of one that validation logs")
        if name is not None and measure_batches == 0:
            raise ValueError(f"measure_batches=0: monitor={name!r} needs validation after each round")
        self.name, self.keep = name, KEEP if keep is None else keep
        fraction("keep", self.keep, "(0, 1]")
        self.mode = _mode(name) if mode is None and name is not None else mode
        one_of("mode", self.mode or "max", Mode)
        self.best: float | None = None

    def begin(self, values: Mapping[str, float]) -> None:
        """Takes a figure of the model as it is, of which the best counts."""
        value = self.of(values)
        if value is not None and (self.best is None or self._gain(value) > 0 or self.best != self.best):
            self.best = value

    def of(self, values: Mapping[str, float]) -> float | None:
        """Returns the figure, and refuses a validation that does not log it; None if none is monitored."""
        if self.name is None:
            return None
        if self.name not in values:
            logged = ", ".join(values) or "nothing"
            raise ValueError(f"monitor={self.name!r} is not logged by validation, which logs {logged}")
        return values[self.name]

    def is_worse(self, values: Mapping[str, float]) -> bool:
        """Returns whether the figure has become worse than allowed."""
        value = self.of(values)
        if value is None or self.best is None:
            return False
        share = 1 - self.keep if self.mode == "max" else 1 / self.keep - 1
        return not -self._gain(value) <= share * abs(self.best)  # NaN is worse, too

    def _gain(self, value: float) -> float:
        assert self.best is not None
        return value - self.best if self.mode == "max" else self.best - value


def _mode(name: str) -> Mode:
    """Reads off a figure's name whether higher or lower is better; refuses one that does not say it.

    >>> _mode("val/f1"), _mode("val_loss/dataloader_idx_0")
    ('max', 'min')
    """
    words = set(re.findall("[a-z]+", name.partition("/dataloader_idx")[0].lower()))
    if bool(words & HIGHER) == bool(words & LOWER):
        raise ValueError(f"mode: whether a higher or a lower {name!r} is better is not to be seen: give mode='max' or 'min'")
    return "max" if words & HIGHER else "min"


Remove = Literal["end", "rounds", "never"]


class HeadPruning(HeadMasking):
    """Masks the least important attention heads at given steps of a fit, and removes them.

    This is section 4 of Michel et al., 2019 (https://arxiv.org/abs/1905.10650). Scores are taken again for each round, from
    training examples and the training loss. The ratio is always of the heads that there were at first, so that rounds do not
    compound. Optimizer state follows, checkpoints carry masks and shape, and a resumed run ends as the straight run does.

    Args:
        ratio: Fraction of the heads that are removed, in [0, 1), rounded down; a schedule of it for rounds.
        at: When: a step (int), a fraction of training (float in 0..1), `"start"`, or a schedule of progress that rises to 1.
        importance: How much a head matters: any `Importance`; by default `GateGradient`, the paper's.
        ranking: `"layer"`: as many heads from each layer; `"global"`: the lowest of all layers, as in the paper.
        per: Whether heads are query heads (`"head"`), or KV heads with the query heads that they serve (`"kv_head"`).
        min_heads: How many are kept in each layer, at least; 0 only where none is removed.
        normalize: True to divide the scores of each layer by their L2 norm, as the paper does.
        remove: When masked heads are removed from the tensors: after the last round (`"end"`), at once (`"rounds"`), or
            `"never"`: they stay masked, and at the end of the fit the weights that read them become zero.
        monitor: A figure that validation logs. A round after which it is worse than `keep` times the best that it was before or
            after a round is undone, and is the last one (the paper's loop, whose model is trained already).
        keep: See `monitor`; by default 0.9.
        mode: Whether a higher figure is better (`"max"`) or a lower one (`"min"`: at most 1 / `keep` times as high); by default
            what the figure's name says, as of `val_accuracy` and `val_loss`, and refused if it says nothing.
        calibration: Batches that scores are taken from, text as a `Calibration`, or a number of training
            examples, by default 128.
        measure_batches: Validation batches to measure before and after each round; by default all of validation, 0 for none.
        plot_file: Path of a picture (PNG) of importance, remaining heads and metric; loggers that take figures get it too.

    Raises:
        ValueError: If an argument is not legal, two contradict each other, or a schedule falls or leaves [0, 1).

    >>> import billhook as bh
    >>> callback = bh.HeadPruning(0.25, at="start", remove="rounds")  # for Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        ratio: float | Schedule,
        at: At | Schedule = "start",
        importance: Importance | None = None,
        ranking: Ranking = "layer",
        per: Per = "head",
        min_heads: int = 1,
        normalize: bool = True,
        remove: Remove = "end",
        monitor: str | None = None,
        keep: float | None = None,
        mode: Mode | None = None,
        calibration: Given = None,
        measure_batches: int | None = None,
        plot_file: str | None = None,
    ) -> None:
        check_choice(0 if isinstance(ratio, Schedule) else ratio, ranking, min_heads, per, "heads")
        check_at(at, ratio)
        annotated(HeadPruning, locals())
        one_of("remove", remove, Remove)
        if plot_file is not None:
            a_path("plot_file", plot_file, PICTURES)
        if min_heads < 1 and remove != "never":
            raise ValueError(f"min_heads={min_heads}: where heads are removed, one at least stays in each layer")
        self.ratio, self.at, self.per, self.remove, self.plot_file = ratio, at, per, remove, plot_file
        self.cuts = remove != "never"
        self.importance = importance or GateGradient()
        self.ranking, self.min_heads, self.normalize = ranking, min_heads, normalize
        self.ranks = HeadRanking(self.importance, ranking, per, min_heads, normalize, remove != "never")
        self.watched = Monitor(monitor, keep, mode, measure_batches)
        self.monitor, self.keep, self.mode = monitor, self.watched.keep if monitor else None, self.watched.mode
        super().__init__(FitCalibration.of(calibration), measure_batches)

    def reset(self) -> None:
        """Forgets all events, scores and masks."""
        super().reset()
        self.record = HeadRecord()
        self.watched.best, self._stopped = None, False

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints."""
        return self._generate_state_key(importance=type(self.ranks.importance).__qualname__, per=self.per)

    @property
    def needs_data(self) -> bool:
        """True if scores take batches."""
        return self.ranks.importance.needs_data

    @property
    def only_at_start(self) -> bool:
        """True if no shape changes in the middle of the fit."""
        return self.remove == "never"

    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Refuses a model that has no heads, and a place in the list after `Export`."""
        find_units(model, "head")
        earlier = takewhile(lambda callback: callback is not self, callbacks_of(trainer, Callback))
        if self.remove == "never" and any(isinstance(callback, Export) for callback in earlier):
            raise ValueError("HeadPruning must stand before Export in the list of callbacks: it makes weights zero at the end")

    def moments(self, total: int | None, trainer: pl.Trainer) -> dict[int, float]:
        """Returns from which step on which ratio holds."""
        return rounds_of(self.ratio, self.at, total, trainer, "ratio")

    def steps(self, total: int | None, trainer: pl.Trainer) -> list[int]:
        """Returns the steps at which shapes change."""
        rounds = super().steps(total, trainer)
        return {"end": rounds[-1:], "rounds": rounds, "never": []}[self.remove]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the rounds, and refuses a ratio that cannot be reached, or shapes that change between rounds."""
        super().on_fit_start(trainer, pl_module)
        if self._stopped or not self._moments:
            self._moments = {}
            return
        first, last = min(self._moments), max(self._moments) if self.remove != "never" else sys.maxsize
        refuse_shape_changes(trainer, self, first, last, "masked heads", lambda _: "")
        self.ranks.check(find_transformer(pl_module), self.record, max(self._moments.values()))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks what validation logs, and carries out what is due before the first step."""
        if self.watched.name is not None:
            self.watched.of(measure(trainer, pl_module, 1))
        super().on_train_start(trainer, pl_module)

    def carry_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule, moment: int) -> None:
        """Masks the heads of a round, undoes it if the model has become worse, and removes masked heads when it is time."""
        with self.masked_again_after_errors(pl_module):
            before, earlier = self.measured(trainer, pl_module), self.heads
            self.watched.begin(before)
            with together(trainer, "HeadPruning"):
                ratio = self._moments[moment]
                chosen = self.ranks.choose(trainer, pl_module, self.calibration, self.record, earlier, ratio)
                check_agreed(trainer, "HeadPruning", "the heads that are masked", chosen)
            self.mask(pl_module, chosen)
            after, what = self.measured(trainer, pl_module), f"{sum(map(len, chosen.values()))} heads masked"
            worse = self.watched.is_worse(after)
            check_agreed(trainer, "HeadPruning", f"whether monitor={self.watched.name!r} is worse", worse)
            if worse:
                self.mask(pl_module, earlier)
                what += f", undone: {self.watched.name} {self.watched.of(after):g}, at best {self.watched.best:g}"
                after = before
            self.watched.begin(after)
            change = partial(self._finish, pl_module, moment, worse, what)
            if self.heads and (self.remove == "rounds" or (self.remove == "end" and (worse or moment == max(self._moments)))):
                event = self.reshape(trainer, pl_module, before, change)
            else:
                event = self.as_event(trainer, find_transformer(pl_module), before, change)
        event["after"] |= after
        log_event(trainer, event)
        self.record.draw(trainer, self.heads, self.watched.name or next(iter(before), ""), before, event["after"], self.plot_file)

    def label(self, event: Event) -> str:
        """Returns what was masked or removed, without the figure for which a round was undone."""
        return str(event["what"]).partition(": ")[0]

    def _finish(self, module: nn.Module, moment: int, worse: bool, what: str, optimizers: list[Optimizer] | None = None) -> str:
        """Ends a round; with optimizers, removes the heads that are masked, and says how many there were and are."""
        if optimizers is not None:
            self.unmask()
            plan = prune_units(module, self.heads, optimizers, per=self.per)
            self.record.removed(self.heads)
            self.heads = {}
            before, after = (sum(own[0] for own in counts.values()) for counts in (plan.before, plan.after))
            removed = f"{before} -> {after} attention heads ({type(self.ranks.importance).__name__})"
            what = f"{removed}; {what}" if worse else removed
        self.done, self.asked, self._stopped = moment, self._moments[moment], worse
        self._moments = {} if worse else self._moments
        return what

    def state_dict(self) -> dict[str, Any]:
        """Returns what has happened so far, and what is known of heads."""
        heads = {"record": dict(vars(self.record)), "best": self.watched.best, "stopped": self._stopped}
        return super().state_dict() | heads

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what had happened."""
        super().load_state_dict(state_dict)
        self.watched.best, self._stopped = state_dict["best"], state_dict["stopped"]
        self.record = HeadRecord(**state_dict["record"])
