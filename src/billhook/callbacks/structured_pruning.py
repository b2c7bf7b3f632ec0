"""Ranks and removes coupled structures at given steps of a fit."""

from dataclasses import asdict
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from billhook.arguments import check_int, check_types
from billhook.engine.passes import blockwise
from billhook.fit.calibration import CalibrationLike, FitCalibration, gradient_precision
from billhook.fit.event import Event, log_event, percent_change, record_not_refitted
from billhook.fit.ranks import check_close, check_identical, comm_of, fail_together
from billhook.fit.run import At, check_at, round_targets
from billhook.fit.shape_event import ShapeCallback
from billhook.importance.score import Importance, make_run
from billhook.model.find import find_transformer
from billhook.model.plan import Weights, apply_plan
from billhook.pruning.amount import Amount
from billhook.pruning.plan import UnitPlan
from billhook.pruning.planning import default_importance, plan_from_search
from billhook.pruning.repair import RepairOption, repair_if_requested
from billhook.pruning.target import Baseline, RatioSearch
from billhook.repairs.repair import RepairConfig
from billhook.schedules import Schedule


class StructuredPruning(ShapeCallback):
    """Removes the least important heads, channels, experts or residual channels at given steps of a fit.

    This is LLM-Pruner (Ma et al., 2023, https://arxiv.org/abs/2305.11627) in the middle of a fit. A trace finds which tensors
    belong together (`bh.trace`). Scores are taken again for each round, from training examples and the training loss.
    Optimizer state, gradients and adapters follow, checkpoints carry the shape, and a resumed run ends as the straight run
    does. Ratios and fractions are always of what there was at first, so that rounds do not compound.

    Args:
        amount: How much is removed: a ratio for each kind of unit, or one target, such as a number of parameters; see `Amount`.
        at: When: a step (int), a fraction of training (float in 0..1), `"start"` (before the first step), or a schedule of
            progress: the share of the amount that is removed by a step, which rises to 1.
        rounds: In how many rounds each event takes place; scores are taken again in each.
        importance: How much a unit matters: any `Importance`; by default `OutputNorm`, or `Taylor`, the paper's, where no module
            reads some units alone, as experts.
        repair: How the linears that read removed units make up for them: least squares on the examples (see `RepairConfig`);
            `"auto"`: by `RepairConfig()` where scores are taken from examples, and these are enough; None: they keep their
            weights, as in the paper.
        calibration: Batches that scores are taken from, text as a `Calibration`, or a number of training
            examples, by default 128.
        measure_batches: Validation batches to measure before and after each event; by default all of validation, 0 for none.

    Raises:
        ValueError: If an argument is not legal, or two contradict each other; in `setup`, if the model cannot give the amount.

    >>> import billhook as bh
    >>> progress = bh.schedules.Linear(final=1.0, end=0.5, every=100)
    >>> callback = bh.StructuredPruning(bh.Amount(channels=0.2), at=progress)  # for Trainer(callbacks=[callback])
    """

    blockwise = True

    def __init__(
        self,
        amount: Amount,
        at: At | Schedule = "start",
        rounds: int = 1,
        importance: Importance | None = None,
        repair: RepairOption = "auto",
        calibration: CalibrationLike = None,
        measure_batches: int | None = None,
    ) -> None:
        if not isinstance(amount, Amount):
            raise ValueError(f"amount={amount!r} must be an Amount, as in Amount(channels=0.2); a schedule is given as at")
        check_types(StructuredPruning, locals())
        check_at(at)
        check_int("rounds", rounds)
        self.amount, self.at, self.rounds = amount, at, rounds
        self.importance, self.repair = importance, repair
        super().__init__(FitCalibration.of(calibration), measure_batches)

    def reset(self) -> None:
        """Forgets all events, and what the model was at first."""
        super().reset()
        self._first: Baseline | None = None

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints."""
        name = type(self.importance).__qualname__ if self.importance else None
        return self._generate_state_key(amount=str(self.amount), importance=name)

    @property
    def needs_data(self) -> bool:
        """True if scores or the repair take batches."""
        return self.importance is None or self.importance.needs_data or isinstance(self.repair, RepairConfig)

    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Refuses an amount that the model cannot give."""
        if trainer.ckpt_path is None:
            RatioSearch(find_transformer(model), self.amount).check()

    def steps(self, total: int | None, trainer: pl.Trainer) -> dict[int, float]:
        """Returns from which step on which share of the amount is removed."""
        return round_targets(1.0, self.at, total, trainer, "amount")

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Removes what is due in rounds, each scored again."""
        metrics, before, goal = self.validate(trainer, pl_module), len(self.events), self._steps[step]
        for number in range(1, self.rounds + 1):
            share = self.last_target + (goal - self.last_target) * number / self.rounds
            with fail_together(trainer, "StructuredPruning"):
                made, weights, how, left = self._plan(trainer, pl_module, share)
            if made is not None:
                first = len(self.events) == before
                change = partial(self._remove, pl_module, made, weights, how)
                event = self.reshape(trainer, pl_module, metrics if first else {}, change)
                record_not_refitted(event, left)
        self.last_event_step, self.last_target = step, goal
        for event in self.events[before:][-1:]:
            event["after"] |= self.validate(trainer, pl_module)
        for event in self.events[before:]:
            log_event(trainer, event)

    def _plan(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, share: float
    ) -> tuple[UnitPlan | None, Weights | None, str, str]:
        """Plans a share of the amount for the model as it is, in one trace.

        Returns:
            What goes, None for nothing, repaired weights, by what, and which linears were not refitted.
        """
        model = find_transformer(pl_module)
        search = RatioSearch(model, self.amount)
        self._first = self._first or Baseline.of(search)
        part = self._first.part(search, share)
        if part is None:  # by the numbers of units alone, which are the same on all ranks
            return None, None, "", ""
        with self.calibration.undisturbed(pl_module), gradient_precision(trainer), blockwise(pl_module):
            comm = comm_of(trainer, self.calibration.shared(trainer))
            pairs = self.calibration.pairs(trainer, pl_module) if self.needs_data else ()
            runs = [make_run(model, part.units, *pair) for pair in pairs]
            importance = self.importance or default_importance(part.units)
            made = plan_from_search(part, importance, runs, comm=comm)
            weights, why = repair_if_requested(model, made, runs, self.repair if self.needs_data else None, comm)
            check_identical(trainer, "StructuredPruning", "the plan of what is removed", made.to_json)
            check_close(trainer, "StructuredPruning", "what is refitted", model, weights or {})
            done = "repaired" if weights else why
            return made, weights, f"{type(importance).__name__}{f', {done}' if done else ''}", why

    def label(self, event: Event) -> str:
        """Returns how much smaller the model is."""
        return f"structure, {percent_change(event)}"

    def _remove(self, model: nn.Module, made: UnitPlan, weights: Weights | None, how: str, optimizers: list[Optimizer]) -> str:
        """Removes what is planned, and says how much that is."""
        apply_plan(model, made, optimizers, weights)
        before, after = made.parameters
        words = "; ".join([f"without {made.words}", how, *(f"left in each: {row}" for row in made.rows)])
        return f"{before:,} -> {after:,} parameters ({words})"

    def state_dict(self) -> dict[str, Any]:
        """Returns what has happened so far, and what the model was at first."""
        return super().state_dict() | {"first": None if self._first is None else asdict(self._first)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what had happened."""
        super().load_state_dict(state_dict)
        self._first = None if state_dict["first"] is None else Baseline(**state_dict["first"])
