"""Coupled structures are ranked and removed at given steps of a fit, and training goes on (LLM-Pruner, 2305.11627)."""

import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from billhook.fit.event import At, ShapeCallback, log_event
from billhook.fit.examples import Pair, aside, check_calibration, check_readable, gradient_precision, scoring_batches
from billhook.fit.measure import measure
from billhook.fit.ranks import SumOverRanks, check_agreed, together
from billhook.fit.rounds import shares_of
from billhook.fit.run import callbacks_of, is_trial, training_steps
from billhook.importance.base import Importance
from billhook.importance.score import run_of
from billhook.importance.taylor import Taylor
from billhook.model.find import find_transformer
from billhook.model.plan import Weights, apply
from billhook.pruning.amount import Amount, Ranking
from billhook.pruning.plan import UnitPlan
from billhook.pruning.planning import plan
from billhook.pruning.progress import First, first_from
from billhook.pruning.repair import repair
from billhook.pruning.target import Search
from billhook.repairs.repair import Repair
from billhook.schedules import Schedule, check_step, resolve_step
from billhook.tracing.trace import trace
from billhook.units.find import units_of


class StructuredPruning(ShapeCallback):
    """Removes the least important heads, channels, experts or residual channels at given steps of a fit.

    What belongs together is found by itself (`bh.trace`). Scores are taken anew for each round, from training examples and the
    training loss. Optimizer state, gradients and adapters follow, checkpoints carry the shape, and a resumed run ends as the
    straight run does. Ratios and fractions are always of what there was at first, so that rounds do not compound.

    Args:
        heads: Fraction of the query heads that go, as many of each KV head.
        kv_heads: Fraction of the KV heads that go, with the query heads that they serve.
        channels: Fraction of the channels of feed-forward blocks.
        residual: Fraction of the channels of the residual stream (the hidden size).
        experts: Fraction of the experts.
        params: Target instead of ratios: parameters that are left at most, a number (int) or a fraction (float). KV heads and
            channels go in equal ratios for it, unless theirs is given; see `bh.plan`.
        flops: Target: operations of the forward pass, per token.
        kv_cache_bytes: Target: bytes that the key/value cache takes for each token.
        bytes: Target: bytes of all parameters.
        at: When: a step (int), a fraction of training (float in 0..1), `"start"` (before the first step), or a schedule that
            rises to 1: how much of the amount has gone at which step.
        rounds: In how many rounds each event takes place; scores are taken anew in each.
        importance: What a unit is worth: `Taylor` (the paper's; the default), `OBS`, `OutputNorm`, `GateGradient`, `WeightNorm`,
            `ActivationNorm` or `RandomUnits`.
        ranking: `"layer"`: as many go in each layer; `"global"`: the lowest of all layers.
        first: Blocks at the beginning of each stack that keep their heads, channels and experts.
        last: Blocks at the end that do.
        round_to: The number of channels that stay is a multiple of it.
        repair: How the linears that read what goes make up for it: least squares on the examples (see `Repair`); by default they
            keep their weights, as in the paper.
        normalize: Whether the scores of each place are divided by their L2 norm.
        calibration: Batches that scores are taken from: what `training_step` takes, and can be read again and again. By default
            drawn from the training data.
        examples: How many training examples are drawn, on all devices together.
        seed: Which ones.
        measure_batches: Validation batches on which the model is measured before and after each event; by default as many as
            validation takes, 0 for none.

    Raises:
        ValueError: If an argument is not legal, or two contradict each other; in `setup`, if the model cannot give what is asked.
    """

    def __init__(
        self,
        heads: float | None = None,
        kv_heads: float | None = None,
        channels: float | None = None,
        residual: float | None = None,
        experts: float | None = None,
        params: int | float | None = None,
        flops: int | float | None = None,
        kv_cache_bytes: int | float | None = None,
        bytes: int | float | None = None,
        at: At | Schedule = "start",
        rounds: int = 1,
        importance: Importance | None = None,
        ranking: Ranking = "layer",
        first: int = 0,
        last: int = 0,
        round_to: int = 1,
        repair: Repair | None = None,
        normalize: bool = False,
        calibration: Iterable[Any] | None = None,
        examples: int = 128,
        seed: int = 0,
        measure_batches: int | None = None,
    ) -> None:
        super().__init__([], measure_batches)
        self.amount = Amount(
            heads, kv_heads, channels, residual, experts, None, params, flops, kv_cache_bytes, bytes,
            ranking, normalize, first, last, round_to,
        )  # fmt: skip
        if not isinstance(at, Schedule) and at != "start":
            check_step(at, "at")
        for name, value in {"rounds": rounds, "examples": examples}.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        check_calibration(calibration)
        self.moment, self.rounds, self.importance = at, rounds, importance or Taylor()
        self.repair, self.calibration, self.examples, self.seed = repair, calibration, examples, seed
        self._moments: dict[int, float] = {}
        self._reset()

    def _reset(self) -> None:
        self._first: First | None = None
        self._done = -1
        self._plan: UnitPlan | None = None
        self._weights: Weights | None = None

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep this callback's state."""
        return self._generate_state_key(amount=str(self.amount), importance=type(self.importance).__qualname__)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes checkpoints carry the shape, checks that the model can give what is asked, and starts anew."""
        if stage == "fit" and trainer.global_step == 0:
            self._reset()
        super().setup(trainer, pl_module, stage)

    @property
    def only_at_start(self) -> bool:
        """Never: scores are taken when the fit runs."""
        return False

    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Refuses an amount that the model cannot give, and a second callback of the same kind."""
        others = [c for c in callbacks_of(trainer, StructuredPruning) if c.state_key == self.state_key and c is not self]
        if others:
            raise ValueError("two StructuredPruning ask for the same amount: one is enough, with a schedule")
        if trainer.ckpt_path is None:
            Search(find_transformer(model), self.amount)

    def steps(self, total_steps: int, trainer: pl.Trainer) -> list[int]:
        """The steps at which shapes change."""
        return sorted(self._progress(total_steps, trainer))

    def _progress(self, total: int | None, trainer: pl.Trainer) -> dict[int, float]:
        """From which step how much of the amount has gone."""
        if not isinstance(self.moment, Schedule):
            moment = 0 if self.moment == "start" else self.moment
            if isinstance(moment, float) and total is None:
                raise ValueError(f"at={moment} is a fraction of training, whose length is not known: set max_steps")
            moment = min(moment, total or 0) if is_trial(trainer) and isinstance(moment, int) else moment
            return {resolve_step(moment, sys.maxsize if total is None else total, "at"): 1.0}
        if total is None:
            raise ValueError("at: a schedule needs the length of training, which is not known: set max_steps")
        return shares_of(self.moment, total, is_trial(trainer), "how much has gone")

    def is_done(self, model: nn.Module, stage: int) -> bool:
        """Never: events are counted, as a shape does not tell them."""
        return False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the moments: from which step how much has gone."""
        self._moments = self._progress(training_steps(trainer), trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Carries out what is due before the first step."""
        if (self.importance.needs_data or self.repair is not None) and self.calibration is None:
            check_readable(trainer)
        self._last_step = trainer.global_step
        self._carry_out(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Carries out what is due at the step that has just been taken."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            self._carry_out(trainer, pl_module)

    def _carry_out(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = [step for step in self._moments if self._done < step <= trainer.global_step]
        if not due:
            return
        model, limit, step = find_transformer(pl_module), self.measure_batches, max(due)
        self._first = self._first or First.of(model, self.amount)
        earlier = max((share for moment, share in self._moments.items() if moment <= self._done), default=0.0)
        metrics = {} if limit == 0 else measure(trainer, pl_module, limit)
        before = len(self.events)
        for number in range(1, self.rounds + 1):
            share = earlier + (self._moments[step] - earlier) * number / self.rounds
            with together(trainer, "StructuredPruning"):
                self._plan = self._planned(trainer, pl_module, share)
                decided = [None if self._plan is None else self._plan.to_json(), self._weights]
                check_agreed(trainer, "StructuredPruning", "the plan of what goes", decided)
            if self._plan is not None:
                self._reshape(trainer, pl_module, 0, metrics if len(self.events) == before else {})
        self._done, self._plan, self._weights = step, None, None
        for event in self.events[before:][-1:]:
            event["after"] |= {} if limit == 0 else measure(trainer, pl_module, limit)
        for event in self.events[before:]:
            log_event(trainer, event)

    def _planned(self, trainer: pl.Trainer, pl_module: pl.LightningModule, share: float) -> UnitPlan | None:
        """What goes for a share of the amount, of the model as it is; None if nothing does."""
        model = find_transformer(pl_module)
        assert self._first is not None
        amount = self._first.part(model, self.amount, share)
        if amount is None:
            return None
        with aside(pl_module, self.seed), gradient_precision(trainer):
            reduce = None if trainer.world_size == 1 else SumOverRanks(trainer)
            units = units_of(model, trace(model), amount.kinds)
            trials = [run_of(model, units, *pair) for pair in self._pairs(trainer, pl_module)]
            made = plan(model, self.importance, trials, amount=amount, reduce=reduce)
            assert isinstance(made, UnitPlan)
            self._weights = repair(model, made, trials, self.repair, reduce) if self.repair else None
            return made

    def _pairs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterable[Pair]:
        needed = self.importance.needs_data or self.repair is not None
        return scoring_batches(trainer, pl_module, self.calibration, self.examples) if needed else ()

    def change(self, model: nn.Module, stage: int, optimizers: list[Optimizer]) -> str:
        """Removes what is planned, and says how much that is."""
        assert self._plan is not None
        apply(model, self._plan, optimizers, self._weights)
        before, after = self._plan.parameters
        return f"{before:,} -> {after:,} parameters ({self._plan.words}; {type(self.importance).__name__})"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warns if training has ended before all events."""
        if late := [step for step in self._moments if step > max(trainer.global_step, self._done)]:
            rank_zero_warn(
                f"StructuredPruning: training has ended at step {trainer.global_step}, before the event at step {max(late)}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What has happened so far, and what the model was at first."""
        first = None if self._first is None else asdict(self._first)
        return {"events": self.events, "done": self._done, "first": first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what had happened."""
        self.events, self._done, self._first = state_dict["events"], state_dict["done"], first_from(state_dict["first"])
