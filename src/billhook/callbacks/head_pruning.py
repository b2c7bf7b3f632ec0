"""The HeadPruning callback: masks attention heads during training and removes them."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from billhook.arguments import check_fraction, check_one_of, check_types
from billhook.callbacks.export import Export
from billhook.callbacks.head_masking import HeadMasking, Heads
from billhook.callbacks.polishing import PolishingCallback
from billhook.engine import blockwise, sizes_only
from billhook.fit.calibration import CalibrationLike, FitCalibration
from billhook.fit.event import Event, State, log_event
from billhook.fit.fit import Fit
from billhook.fit.ranks import check_identical, comm_of, fail_together
from billhook.fit.shape_event import check_no_shape_changes
from billhook.fit.targets import At, Targets, check_at, round_targets
from billhook.importance.gate_gradient import GateGradient
from billhook.importance.score import Importance, make_run, score_units
from billhook.model import Weights, apply_plan
from billhook.plots.heads import heads
from billhook.plots.style import Plot
from billhook.pruning.choice import HeadOptions, choose, choose_including
from billhook.pruning.plan import UnitPlan
from billhook.pruning.planning import plan_units
from billhook.pruning.repair import RepairOption
from billhook.repairs.polish import PolishConfig
from billhook.schedules import Schedule
from billhook.training.targets import Targets as Predictions
from billhook.units import Units, find_units


@dataclass
class HeadRecord:
    """History of head pruning by attention module: original indices, scores, and the metric."""

    first: dict[str, int] = field(default_factory=dict)  # original number of heads
    numbers: Heads = field(default_factory=dict)  # original indices of the remaining heads
    scores: dict[str, Tensor] = field(default_factory=dict)  # `[original heads]`, NaN for heads without a score
    # fraction of removed heads and metric, before and after each round
    curve: list[tuple[float, float]] = field(default_factory=list)
    metric: str = ""  # its name

    def begin(self, counts: Mapping[str, int]) -> None:
        """Sets the original number of heads, once."""
        self.first = self.first or dict(counts)
        self.numbers = self.numbers or {name: list(range(count)) for name, count in counts.items()}

    def scored(self, scores: Mapping[str, Tensor]) -> None:
        """Stores scores of the remaining heads."""
        self.scores = {name: torch.full([count], torch.nan) for name, count in self.first.items()}
        for name, values in scores.items():
            self.scores[name][self.numbers[name]] = values

    def removed(self, heads: Heads) -> None:
        """Drops removed heads."""
        for name, numbers in heads.items():
            self.numbers[name] = [number for i, number in enumerate(self.numbers[name]) if i not in numbers]

    def left(self, ratio: float) -> float:
        """Converts a fraction of the original heads to a fraction of the remaining heads."""
        first = sum(self.first.values())
        now = sum(map(len, self.numbers.values()))
        return max(0.0, (ratio * first - first + now) / now) if now else ratio

    def inactive(self, masked: Heads) -> Heads:
        """Returns the original indices of removed and masked heads."""
        inactive = {}
        for name, count in self.first.items():
            masked_here = masked.get(name, ())
            active = {number for i, number in enumerate(self.numbers[name]) if i not in masked_here}
            inactive[name] = sorted(set(range(count)) - active)
        return inactive

    def note(self, masked: Heads, metric: str, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """Adds a round to the curve."""
        share = sum(map(len, self.inactive(masked).values())) / sum(self.first.values())
        last = self.curve[-1][0] if self.curve else 0.0
        self.metric = metric
        self.curve += [(at, values[metric]) for at, values in ((last, before), (share, after)) if metric in values]

    def draw(self, masked: Heads) -> Plot:
        """Plots head scores, removed and masked heads, and the metric."""
        return heads(self.scores, self.inactive(masked), self.curve, self.metric, any(map(len, masked.values())))


Mode = Literal["max", "min"]
HIGHER = {
    "acc", "accuracy", "auc", "auroc", "bleu", "f", "mcc", "precision", "recall", "rouge", "rougel", "corr", "spearman",
    "pearson",
}  # fmt: skip
LOWER = {"loss", "nll", "ce", "kl", "perplexity", "ppl", "error", "err", "mse", "rmse", "mae", "wer", "cer"}
"""Words in names of metrics that are better when higher, or when lower."""


@dataclass(frozen=True)
class StopWhenWorse:
    """Undoes a round of pruning that makes a validation metric worse, and stops pruning.

    Reference: Michel et al., Are Sixteen Heads Really Better than One? (2019), section 4.1, https://arxiv.org/abs/1905.10650

    Args:
        monitor: Logged validation metric. If a round makes it worse than `keep` times its best value so far, that round is undone
            and pruning ends.
        keep: Fraction of the best value to keep, in (0, 1]. Defaults to 0.9.
        mode: `"max"` if higher is better, or `"min"` if lower is better (limit: 1 / `keep` times the best). Defaults to the
            direction that the name implies, such as `val_accuracy` or `val_loss`.

    Raises:
        ValueError: If an argument is not legal, or `mode` is None and the name implies no direction.

    >>> import billhook as bh
    >>> callback = bh.HeadPruning(0.5, stop=bh.StopWhenWorse("val_accuracy", keep=0.95))
    """

    monitor: str
    keep: float = 0.9
    mode: Mode | None = None

    def __post_init__(self) -> None:
        check_types(StopWhenWorse, vars(self))
        check_fraction("keep", self.keep, "(0, 1]")
        check_one_of("mode", self.direction, Mode)

    @property
    def direction(self) -> Mode:
        """Direction of improvement, `"max"` or `"min"`: `mode`, or inferred from the name."""
        return self.mode or _mode(self.monitor)

    def value(self, metrics: Mapping[str, float]) -> float:
        """Returns the metric; raises `ValueError` if validation does not log it."""
        if self.monitor not in metrics:
            logged = ", ".join(metrics) or "nothing"
            raise ValueError(f"monitor={self.monitor!r} is not logged in validation. Logged: {logged}.")
        return metrics[self.monitor]

    def best(self, value: float, earlier: float | None) -> float:
        """Returns the better of two values; NaN is worse than any number."""
        if earlier is None or earlier != earlier:
            return value
        return max(earlier, value) if self.direction == "max" else min(earlier, value)

    def is_worse(self, value: float, best: float) -> bool:
        """Returns whether a value is worse than `keep` times the best value."""
        loss = best - value if self.direction == "max" else value - best
        share = 1 - self.keep if self.direction == "max" else 1 / self.keep - 1
        return not loss <= share * abs(best)  # NaN is worse, too


def _mode(name: str) -> Mode:
    """Infers from a metric's name whether higher or lower is better.

    >>> _mode("val/f1"), _mode("val_loss/dataloader_idx_0")
    ('max', 'min')
    """
    words = set(re.findall("[a-z]+", name.partition("/dataloader_idx")[0].lower()))
    if bool(words & HIGHER) == bool(words & LOWER):
        raise ValueError(
            f"mode=None: cannot infer from monitor={name!r} whether higher or lower is better. Use mode='max' or mode='min'."
        )
    return "max" if words & HIGHER else "min"


Remove = Literal["end", "rounds", "never"]


class HeadPruning(PolishingCallback, HeadMasking):
    """Masks the least important attention heads during training, then removes them.

    Heads are scored again for each round, on training examples and the training loss. The ratio always refers to the original
    number of heads, so rounds do not compound. Optimizer state is remapped, checkpoints store masks and shapes, and a resumed run
    ends like an uninterrupted run.

    Reference: Michel et al., Are Sixteen Heads Really Better than One? (2019), section 4, https://arxiv.org/abs/1905.10650

    Args:
        ratio: Fraction of the heads to remove, in [0, 1), rounded down, or a schedule for pruning in rounds.
        at: When to prune: a step (int), a fraction of training (float), `"start"`, or a schedule of progress from 0 to 1.
        importance: Scores the heads. Defaults to `GateGradient()`, as in the paper.
        options: Head ranking and selection. Defaults to `HeadOptions()`.
        remove: When to remove masked heads from the tensors: after the last round (`"end"`), after each round (`"rounds"`), or
            `"never"`, which zeroes their consumer weights at the end of training. Defaults to `"end"`.
        stop: Criterion for undoing a round and ending pruning, as in the paper (which starts from a trained model). Defaults to
            None (off).
        repair: Least-squares repair of the consumer layers when heads are removed (see `RepairConfig`). `"auto"` uses
            `RepairConfig()` if there are enough examples. Defaults to None, which keeps the old weights, as in the paper. With
            several rounds, it requires `remove="rounds"`, because training adapts to masked heads.
        polish: Training toward the model before heads are removed, on the calibration data (see `PolishConfig`). Defaults to None
            (off). With several rounds, it requires `remove="rounds"`.
        calibration: Calibration data: batches, a `Calibration`, or a number of training examples. Defaults to 128 examples.
        measure_batches: Validation batches to run before and after each event. Defaults to all; 0 disables it.

    Raises:
        ValueError: If an argument is not legal, two arguments contradict each other, or a schedule decreases or leaves [0, 1).

    >>> import billhook as bh
    >>> callback = bh.HeadPruning(0.25, at="start", remove="rounds")  # for Trainer(callbacks=[callback])
    """

    def __init__(
        self,
        ratio: float | Schedule,
        at: At | Schedule = "start",
        importance: Importance | None = None,
        options: HeadOptions | None = None,
        remove: Remove = "end",
        stop: StopWhenWorse | None = None,
        repair: RepairOption = None,
        polish: PolishConfig | None = None,
        calibration: CalibrationLike = None,
        measure_batches: int | None = None,
    ) -> None:
        if not isinstance(ratio, Schedule):
            check_fraction("ratio", ratio, of="the heads")
        check_at(at, ratio)
        check_types(HeadPruning, locals())
        self.options = options or HeadOptions()
        if self.options.min_heads < 1 and remove != "never":
            raise ValueError(
                f"min_heads={self.options.min_heads} must be at least 1 if heads are removed. Use min_heads=1, or remove='never'."
            )
        if stop is not None and measure_batches == 0:
            raise ValueError(
                f"measure_batches=0 disables the validation that monitor={stop.monitor!r} needs. Use None or a positive number."
            )
        several = isinstance(ratio, Schedule) or isinstance(at, Schedule)
        for name, setting in (("repair", repair), ("polish", polish)):
            if setting is not None and (remove == "never" or (remove == "end" and several)):
                removal = f"remove={remove!r}" + " and several rounds" * several
                raise ValueError(f"{name}={setting!r} cannot be combined with {removal}. Use remove='rounds'.")
        self.ratio = ratio
        self.at = at
        self.remove = remove
        self.stop = stop
        self.repair = repair
        self.polish = polish
        self.cuts_tensors = remove != "never"
        self.per = self.options.per
        self.importance = importance or GateGradient()
        super().__init__(FitCalibration.of(calibration), measure_batches)

    def reset(self) -> None:
        """Clears events, scores, and masks."""
        super().reset()
        self.record = HeadRecord()
        self.best: float | None = None
        self._stopped = False

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints."""
        return self._generate_state_key(importance=type(self.importance).__qualname__, per=self.per)

    @property
    def needs_data(self) -> bool:
        """True if the importance or the repair uses batches."""
        return self.importance.needs_data or self.repair is not None

    @property
    def only_at_start(self) -> bool:
        """True if no shape changes during training."""
        return self.remove == "never"

    def check(self, fit: Fit) -> None:
        """Raises `ValueError` if the model has no heads, or `Export` is listed first."""
        find_units(fit.module, "head")
        earlier = takewhile(lambda callback: callback is not self, fit.all_callbacks)
        if self.remove == "never" and any(isinstance(callback, Export) for callback in earlier):
            raise ValueError(
                "HeadPruning(remove='never') must be listed before Export, because it zeroes weights at the end of training."
            )

    def steps(self, fit: Fit) -> Targets:
        """Returns the target ratio of each round by step."""
        return round_targets(self.ratio, self.at, fit, "ratio")

    def shape_steps(self, fit: Fit) -> list[int]:
        """Returns the steps at which shapes change."""
        rounds = super().shape_steps(fit)
        return {"end": rounds[-1:], "rounds": rounds, "never": []}[self.remove]

    def resolve(self, fit: Fit) -> None:
        """Resolves the rounds and checks the ratio and other callbacks' shape changes."""
        super().resolve(fit)
        if self._stopped or not self._steps:
            self._steps = {}
            return
        first = min(self._steps)
        last = max(self._steps) if self.remove != "never" else sys.maxsize
        check_no_shape_changes(fit, self, first, last, "masked heads", lambda _: "")
        heads = find_units(fit.model, "head")
        ratio = max(self._steps.values())
        equal_scores = {name: torch.zeros(units.count(self.per)) for name, units in heads.items()}
        chosen = self._lowest(heads, self.record.left(ratio), equal_scores)
        if ratio > 0 and not chosen and not self.record.first:
            total = sum(map(len, equal_scores.values()))
            shares = (number / total for number in range(1, total))
            least = next((share for share in shares if self._lowest(heads, share, equal_scores)), None)
            fix = f"The smallest ratio that removes a head is {least:.4g}." if least else "No ratio removes a head of this model."
            raise ValueError(f"ratio={ratio} removes no head. {fix}")
        if self.cuts_tensors:
            with sizes_only(fit.model):
                plan_units(fit.model, chosen, per=self.per)

    def begin_training(self, fit: Fit) -> None:
        """Checks that the metric is logged and applies events that are due before the first step."""
        if self.stop is not None:
            self.stop.value(fit.validate(1))
        super().begin_training(fit)

    def apply_event(self, fit: Fit, step: int) -> None:
        """Masks the heads of a round; undoes it if the metric is worse; removes masked heads."""
        earlier = self.heads
        num_events = len(self.events)
        try:
            before = self.validate(fit)
            if self.stop is not None:
                self.best = self.stop.best(self.stop.value(before), self.best)
            with fail_together(fit, "HeadPruning"):
                chosen = self._choose(fit, self._steps[step])
                check_identical(fit, "HeadPruning", "the masked heads", chosen)
            self.mask(fit.module, chosen)
            after = self.validate(fit)
            what = f"{sum(map(len, chosen.values()))} heads masked"
            worse = False
            if self.stop is not None and self.best is not None:
                value = self.stop.value(after)
                worse = self.stop.is_worse(value, self.best)
                check_identical(fit, "HeadPruning", f"whether monitor={self.stop.monitor!r} is worse", worse)
                if worse:
                    self.mask(fit.module, earlier)
                    what += f", undone: {self.stop.monitor} {value:g}, at best {self.best:g}"
                    after = before
                self.best = self.stop.best(self.stop.value(after), self.best)
            change = partial(self._finish, fit, step, worse, what)
            if self.heads and (self.remove == "rounds" or (self.remove == "end" and (worse or step == max(self._steps)))):
                event = self.run_change(fit, before, change)
            else:
                event = self.record_event(fit, before, change)
        except BaseException:
            if len(self.events) == num_events:  # no event was completed
                self.mask(fit.module, earlier)
            raise
        event["after"] |= self.validate(fit) if "polish" in event else after
        log_event(fit, event)
        metric = next(iter(before), "") if self.stop is None else self.stop.monitor
        self.record.note(self.heads, metric, before, event["after"])

    def predictions(self, fit: Fit) -> Predictions:
        """Returns the predictions of the model with all of its heads, masked ones too."""
        self.unmask()
        try:
            return super().predictions(fit)
        finally:
            self.mask(fit.module, self.heads)

    def _choose(self, fit: Fit, ratio: float) -> Heads:
        """Returns the heads to mask, including masked heads; records the scores."""
        model = fit.model
        record = self.record
        heads = find_units(model, "head")
        record.begin({name: units.count(self.per) for name, units in heads.items()})
        with self.calibration.undisturbed(fit), fit.gradient_context(), blockwise(fit.module):
            pairs = self.calibration.pairs(fit) if self.importance.needs_data else ()
            trials = [make_run(model, heads, *pair) for pair in pairs]
            scores = score_units(model, heads, self.importance, trials, None, self.options.normalize, self.per, comm_of(fit))
        record.scored(scores)
        return choose_including(partial(self._lowest, heads, record.left(ratio)), self.heads, scores)

    def _lowest(self, heads: Mapping[str, Units], ratio: float, scores: Mapping[str, Tensor]) -> Heads:
        return choose(heads, scores, ratio, self.options.ranking, self.options.min_heads, self.per, self.cuts_tensors)

    def plots(self) -> dict[str, Plot]:
        """Returns a plot of head importance, removed heads, and the metric, once there are scores."""
        return {"heads": self.record.draw(self.heads)} if self.record.scores else {}

    def label(self, event: Event) -> str:
        """Returns the change, without the metric of a round that was undone."""
        return str(event["what"]).partition(": ")[0]

    def _finish(self, fit: Fit, step: int, worse: bool, what: str, optimizers: list[Optimizer] | None = None) -> str:
        """Ends a round, removing masked heads if optimizers are given; returns a description."""
        if optimizers is not None:
            self.unmask()
            plan = plan_units(fit.module, self.heads, per=self.per)
            assert isinstance(plan, UnitPlan)
            weights: Weights | None = None
            how = ""
            model = fit.model
            if self.repair is not None:
                with self.calibration.undisturbed(fit), fit.gradient_context(), blockwise(fit.module):
                    runs = [make_run(model, find_units(model, "head"), *pair) for pair in self.calibration.pairs(fit)]
                    weights, _, how = self.repaired(fit, plan, runs, self.repair)
                    del runs  # frees the batches
            apply_plan(fit.module, plan, optimizers, weights)
            self.record.removed(self.heads)
            self.heads = {}
            before, after = (sum(lengths[0] for lengths in counts.values()) for counts in (plan.before, plan.after))
            removed = f"{before} -> {after} attention heads ({type(self.importance).__name__}{how})"
            what = f"{removed}; {what}" if worse else removed
        self.last_event_step = step
        self.last_target = self._steps[step]
        self._stopped = worse
        self._steps = {} if worse else self._steps
        return what

    def state_dict(self) -> State:
        """Returns events, masked heads, and scores."""
        return super().state_dict() | {"record": dict(vars(self.record)), "best": self.best, "stopped": self._stopped}

    def load_state_dict(self, state_dict: State) -> None:
        """Restores events, masked heads, and scores."""
        super().load_state_dict(state_dict)
        self.best = state_dict["best"]
        self._stopped = state_dict["stopped"]
        self.record = HeadRecord(**state_dict["record"])
