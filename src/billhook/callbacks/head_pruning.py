"""Heads are masked, ranked again and removed at given steps of a fit (Michel et al., 1905.10650)."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from billhook.callbacks.export import Export
from billhook.callbacks.head_record import HeadRecord
from billhook.checkpoints.export import MASKED
from billhook.fit.event import At, ShapeCallback, log_event
from billhook.fit.examples import aside, check_readable, check_source, gradient_precision, scoring_batches
from billhook.fit.measure import measure
from billhook.fit.ranks import SumOverRanks, check_agreed, together
from billhook.fit.rounds import find_rounds, still_due
from billhook.fit.run import callbacks_of, is_trial, training_steps
from billhook.importance.base import Importance
from billhook.importance.gate_gradient import GateGradient
from billhook.importance.score import run_of, score
from billhook.model.find import find_transformer
from billhook.pruning.amount import Ranking
from billhook.pruning.choice import check_choice, choose
from billhook.pruning.planning import plan_units, prune_units
from billhook.report.summary import summary
from billhook.running.shards import gathered, unsharded
from billhook.schedules import Schedule, check_step
from billhook.units.find import find_units
from billhook.units.gates import Mask, mask
from billhook.units.units import Per
from billhook.units.zero import zero_units

Remove = Literal["end", "rounds", "never"]


class HeadPruning(ShapeCallback):
    """Masks the least important attention heads at given steps of a fit, and removes them (1905.10650, section 4).

    Scores are taken anew for each round, from training examples and the training loss. The ratio is always of the heads that
    there were at first, so that rounds do not compound. Optimizer state follows, checkpoints carry masks and shape, and a
    resumed run ends as the straight run does.

    Args:
        ratio: Fraction of the heads that go, in [0, 1), rounded down; a schedule for rounds.
        at: When, if `ratio` is no schedule: a step (int), a fraction of training (float in 0..1), or `"start"`.
        importance: How much a head matters: `GateGradient` (the paper's; the default), `Taylor`, `WeightNorm`, `ActivationNorm`,
            `Ablation` or `RandomUnits`.
        ranking: `"layer"`: as many heads go in each layer, so that plain `from_pretrained` loads the outcome where the config can
            say it; `"global"`: the lowest of all layers, as in the paper.
        per: Whether heads are query heads (`"head"`), or KV heads with the query heads that they serve (`"kv_head"`).
        min_heads: How many stay in each layer, at least; 0 only where none is removed.
        normalize: Whether the scores of each layer are divided by their L2 norm, as the paper does.
        remove: When masked heads are removed from the tensors: `"end"` (after the last round), `"rounds"` (at once), or
            `"never"`: they stay masked, and at the end of the fit the weights that read them become zero.
        monitor: A value that validation logs. A round after which it is worse than `keep` times what it was at first is taken
            back, and is the last one (the paper's loop).
        keep: See `monitor`.
        mode: Whether a higher value is better (`"max"`) or a lower one (`"min"`: at most 1 / `keep` times as high).
        calibration: Batches that scores are taken from: what `training_step` takes, and can be read again and again. By default
            drawn from the training data.
        examples: How many training examples are drawn, on all devices together.
        seed: Which ones.
        measure_batches: Validation batches on which the model is measured before and after each round; by default as many as
            validation takes, 0 for none.
        plot_file: Where a picture of each round goes (PNG): importance, the heads that are left, and the metric. Loggers that
            take figures, such as TensorBoard's, get it too.

    Raises:
        ValueError: If an argument is not legal, two contradict each other, or a schedule goes down or leaves [0, 1).
    """

    def __init__(
        self,
        ratio: float | Schedule,
        at: At = "start",
        importance: Importance | None = None,
        ranking: Ranking = "layer",
        per: Per = "head",
        min_heads: int = 1,
        normalize: bool = True,
        remove: Remove = "end",
        monitor: str | None = None,
        keep: float = 0.9,
        mode: Literal["max", "min"] = "max",
        calibration: Iterable[Any] | None = None,
        examples: int = 128,
        seed: int = 0,
        measure_batches: int | None = None,
        plot_file: str | None = None,
    ) -> None:
        super().__init__([], measure_batches)
        check_choice(0 if isinstance(ratio, Schedule) else ratio, ranking, min_heads, per, "heads")
        if isinstance(ratio, Schedule) and at != "start":
            raise ValueError(f"at={at!r}: the schedule says when; give it start and end instead")
        if at != "start":
            check_step(at, "at")
        if remove not in get_args(Remove):
            raise ValueError(f"remove={remove!r} must be one of {', '.join(get_args(Remove))}")
        if min_heads < 1 and remove != "never":
            raise ValueError(f"min_heads={min_heads}: where heads are removed, one at least stays in each layer")
        if monitor is not None and (not 0 < keep <= 1 or mode not in ("max", "min") or measure_batches == 0):
            raise ValueError(
                f"monitor={monitor!r} needs keep={keep} in (0, 1], mode={mode!r} 'max' or 'min', and measure_batches"
            )
        check_source(examples, calibration)
        self.ratio, self.moment, self.importance = ratio, at, importance or GateGradient()
        self.ranking, self.per, self.min_heads, self.normalize, self.remove = ranking, per, min_heads, normalize, remove
        self.monitor, self.keep, self.mode, self.plot_file = monitor, keep, mode, plot_file
        self.calibration, self.examples, self.seed = calibration, examples, seed
        self._rounds: dict[int, float | None] = {}
        self._reset()

    def _reset(self) -> None:
        self.heads: dict[str, list[int]] = {}
        self.record = HeadRecord()
        self._start: float | None = None
        self._done, self._stopped = -1, False
        self._asked: float | None = None
        self._mask: Mask | None = None

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep this callback's state."""
        return self._generate_state_key(importance=type(self.importance).__qualname__, per=self.per)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes checkpoints carry the shape, checks the model, and starts anew."""
        if stage == "fit" and trainer.global_step == 0:
            self._unmask()
            self._reset()
        super().setup(trainer, pl_module, stage)

    @property
    def only_at_start(self) -> bool:
        """Whether no shape changes in the middle of the fit."""
        return self.remove == "never"

    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Refuses a model that has no heads, and a second callback of the same kind."""
        find_units(model, "head")
        others = [c for c in callbacks_of(trainer, HeadPruning) if c.state_key == self.state_key and c is not self]
        if others:
            raise ValueError(f"two HeadPruning by {type(self.importance).__name__}: one is enough, with a schedule")
        earlier = takewhile(lambda callback: callback is not self, callbacks_of(trainer, Callback))
        if self.remove == "never" and any(isinstance(callback, Export) for callback in earlier):
            raise ValueError("HeadPruning must stand before Export in the list of callbacks: it makes weights zero at the end")

    def _check_ratio(self, model: nn.Module, ratio: float) -> None:
        """Refuses a ratio that cannot be reached, and heads that cannot be removed."""
        heads = find_units(model, "head")
        flat = {name: torch.zeros(one.count(self.per)) for name, one in heads.items()}
        take = partial(choose, heads, flat, ranking=self.ranking, min_units=self.min_heads, per=self.per, remove=self._removes)
        chosen = take(self.record.left(ratio))
        if ratio > 0 and not chosen and not self.record.first:
            total = sum(map(len, flat.values()))
            least = next((number / total for number in range(1, total) if take(number / total)), None)
            raise ValueError(f"ratio={ratio} takes not a single head: " + (f"{least:.4g} does" if least else "no ratio does"))
        if self._removes:
            plan_units(model, chosen, per=self.per)

    def _check_others(self, trainer: pl.Trainer, total: int) -> None:
        """Refuses what changes shapes between rounds, or where heads stay masked."""
        first, last = min(self._rounds), max(self._rounds) if self._removes else sys.maxsize
        seen = False
        for callback in callbacks_of(trainer, ShapeCallback):
            seen |= callback is self
            steps = [] if callback is self else callback.steps(total, trainer)
            if between := [step for step in steps if (first, False) < (step, seen) < (last, True)]:
                raise ValueError(
                    f"{type(callback).__name__} changes shapes at step {between[0]}, after HeadPruning has masked heads at step "
                    f"{first}: let it come first, at an earlier step or before it in the list of callbacks"
                )

    def steps(self, total_steps: int, trainer: pl.Trainer) -> list[int]:
        """The steps at which shapes change."""
        rounds = find_rounds(self.ratio, self.moment, total_steps, is_trial(trainer), "ratio")
        return {"end": sorted(rounds)[-1:], "rounds": sorted(rounds), "never": []}[self.remove]

    def is_done(self, model: nn.Module, stage: int) -> bool:
        """Never: rounds are counted, as a shape does not tell them."""
        return False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the rounds: from which step which ratio holds."""
        total = training_steps(trainer)
        rounds = find_rounds(self.ratio, self.moment, total, is_trial(trainer), "ratio")
        self._rounds = still_due(rounds, self._done, self._asked, lambda ratio: ratio or 0.0, "ratio")
        if self._rounds:
            self._check_others(trainer, total or sys.maxsize)
        if self._rounds and not self._stopped:
            self._check_ratio(find_transformer(pl_module), max(ratio or 0.0 for ratio in self._rounds.values()))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Masks what a checkpoint says is masked, and carries out what is due before the first step."""
        if self.importance.needs_data and self.calibration is None:
            check_readable(trainer)
        self._put_mask(pl_module, self.heads)
        if self.monitor is not None:
            self._monitored(measure(trainer, pl_module, 1))
        self._last_step = trainer.global_step
        self._due(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Carries out what is due at the step that has just been taken."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._due(trainer, pl_module)

    def _due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = [step for step in self._rounds if self._done < step <= trainer.global_step]
        if due and not self._stopped:
            with self._undone_by_errors(pl_module):
                self._round(trainer, pl_module, max(due))

    @contextmanager
    def _undone_by_errors(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Puts back the masks, and what is known of rounds, if an error is raised before anything has come of this one."""
        heads, events = self.heads, len(self.events)
        known = self._start, self._done, self._asked, self._stopped
        try:
            yield
        except BaseException:
            if len(self.events) == events:
                self._start, self._done, self._asked, self._stopped = known
                self._put_mask(pl_module, heads)
            raise

    def _round(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        model, limit = find_transformer(pl_module), self.measure_batches
        before = {} if limit == 0 else measure(trainer, pl_module, limit)
        self._start = self._monitored(before) if self._start is None else self._start
        earlier, numbers = self.heads, summary(model).numbers()
        with together(trainer, "HeadPruning"):
            chosen = self._choose(trainer, pl_module, self._rounds[step] or 0.0)
            check_agreed(trainer, "HeadPruning", "the heads that are masked", chosen)
        self._put_mask(pl_module, chosen)
        after = {} if limit == 0 else measure(trainer, pl_module, limit)
        self._done, self._asked = step, self._rounds[step] or 0.0
        what = f"{sum(map(len, chosen.values()))} heads masked"
        self._stopped = self._worse(self._monitored(after))
        check_agreed(trainer, "HeadPruning", f"whether monitor={self.monitor!r} is worse", self._stopped)
        if self._stopped:
            self._put_mask(pl_module, earlier)
            what = f"{what}, taken back: {self.monitor} {self._monitored(after):g}, at first {self._start:g}"
            after = before
        last = self._stopped or step == max(self._rounds)
        if self.heads and (self.remove == "rounds" or (self.remove == "end" and last)):
            event = self._reshape(trainer, pl_module, 0, before)
            event["after"] |= after
            event["what"] += f"; {what}" if self._stopped else ""
        else:
            event = {"step": trainer.global_step, "what": what, "before": numbers | before, "after": numbers | after}
            self.events.append(event)
            rank_zero_info(f"billhook, step {event['step']}: {what}")
        log_event(trainer, event)
        metric = self.monitor or next(iter(before), "")
        self.record.draw(trainer, self.heads, metric, before, event["after"], self.plot_file)

    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule, ratio: float) -> dict[str, list[int]]:
        """The heads of the model as it is that are to be masked, those that are already among them."""
        model = find_transformer(pl_module)
        heads = find_units(model, "head")
        self.record.begin({name: one.count(self.per) for name, one in heads.items()})
        whole = unsharded(pl_module), gathered(pl_module)
        with aside(pl_module, self.seed), gradient_precision(trainer), whole[0], whole[1]:
            needed = self.importance.needs_data
            pairs = scoring_batches(trainer, pl_module, self.calibration, self.examples) if needed else ()
            trials = [run_of(model, heads, *pair) for pair in pairs]
            reduce = None if trainer.world_size == 1 else SumOverRanks(trainer)
            scores = score(model, heads, self.importance, trials, None, self.normalize, self.per, reduce)
        self.record.scored(scores)
        for name, own in self.heads.items():
            scores[name][own] = -torch.inf
        return choose(heads, scores, self.record.left(ratio), self.ranking, self.min_heads, self.per, self._removes)

    @property
    def _removes(self) -> bool:
        return self.remove != "never"

    def _monitored(self, values: dict[str, float]) -> float | None:
        if self.monitor is None:
            return None
        if self.monitor not in values:
            raise ValueError(f"monitor={self.monitor!r} is not logged by validation, which logs {', '.join(values) or 'nothing'}")
        return values[self.monitor]

    def _worse(self, value: float | None) -> bool:
        if value is None or self._start is None:
            return False
        share = 1 - self.keep if self.mode == "max" else 1 / self.keep - 1
        worse = self._start - value if self.mode == "max" else value - self._start
        return not worse <= share * abs(self._start)  # NaN is worse, too

    def _put_mask(self, pl_module: nn.Module, heads: dict[str, list[int]]) -> None:
        self._unmask()
        self.heads = heads
        if heads:
            self._mask = mask(pl_module, heads, per=self.per)

    def _unmask(self) -> None:
        if self._mask is not None:
            self._mask.remove()
        self._mask = None

    def change(self, model: nn.Module, stage: int, optimizers: list[Optimizer]) -> str:
        """Removes the heads that are masked, and says how many there are then."""
        gone = self.heads
        self._unmask()
        try:
            plan = prune_units(model, gone, optimizers, per=self.per)
        except BaseException:
            self._put_mask(model, gone)
            raise
        self.record.removed(gone)
        self.heads = {}
        before, after = (sum(own[0] for own in counts.values()) for counts in (plan.before, plan.after))
        return f"{before} -> {after} attention heads ({type(self.importance).__name__})"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes zero what reads heads that stay masked, so that whatever is saved computes the same."""
        self._zero(pl_module)
        late = [step for step in self._rounds if step > max(trainer.global_step, self._done) and not self._stopped]
        if late:
            rank_zero_warn(f"HeadPruning: training has ended at step {trainer.global_step}, before the round at step {max(late)}")

    def _zero(self, pl_module: nn.Module) -> None:
        if self._mask is not None:
            zero_units(pl_module, self.heads, per=self.per)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Outside of a fit, masks what the checkpoint says is masked."""
        if trainer.state.fn != TrainerFn.FITTING and self._mask is None:
            self._put_mask(pl_module, self.heads)

    on_test_start = on_predict_start = on_validation_start

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts shape and masks where `billhook export` finds them."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.heads:
            checkpoint[MASKED] = {"per": self.per, "heads": self.heads}

    def state_dict(self) -> dict[str, Any]:
        """What has happened so far, and which heads are masked."""
        own = {"done": self._done, "asked": self._asked, "heads": self.heads, "start": self._start, "stopped": self._stopped}
        return {"events": self.events, "record": self.record.state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what had happened."""
        self.events, self._done, self.heads = state_dict["events"], state_dict["done"], state_dict["heads"]
        self._start, self._stopped, self._asked = state_dict["start"], state_dict["stopped"], state_dict.get("asked")
        self.record.load_state_dict(state_dict["record"])

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the LightningModule as it was found, but for what was pruned, also if averaged weights have come in since."""
        if stage == "fit":
            self._zero(pl_module)
        self._unmask()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the LightningModule as it was found (Lightning does not call `teardown` then)."""
        self._unmask()
        super().on_exception(trainer, pl_module, exception)
