"""The StructuredPruning callback: removes coupled groups during training."""

from dataclasses import asdict
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from billhook.arguments import check_int, check_types
from billhook.callbacks.polishing import PolishingCallback
from billhook.engine import blockwise
from billhook.fit.calibration import CalibrationLike, FitCalibration
from billhook.fit.event import Event, log_event, percent_change, record_not_refitted
from billhook.fit.fit import Fit
from billhook.fit.ranks import check_identical, comm_of, fail_together
from billhook.fit.shape_event import ShapeCallback
from billhook.fit.targets import At, check_at
from billhook.importance.score import Importance, make_run
from billhook.model import Weights, apply_plan
from billhook.pruning.amount import Amount
from billhook.pruning.plan import UnitPlan
from billhook.pruning.planning import default_importance, plan_from_search
from billhook.pruning.repair import RepairOption
from billhook.pruning.target import Baseline, RatioSearch
from billhook.repairs.polish import PolishConfig
from billhook.repairs.repair import RepairConfig
from billhook.report.summary import parameter_count
from billhook.schedules import Schedule


class StructuredPruning(PolishingCallback, ShapeCallback):
    """Removes the least important heads, channels, experts, or hidden dimensions.

    Coupled groups come from dependency tracing (`bh.trace`). Units are scored again for each round, on training examples and the
    training loss. Amounts always refer to the original model, so rounds do not compound. Optimizer state, gradients, and adapters
    are remapped, checkpoints store the shape, and a resumed run ends like an uninterrupted run.

    Reference: Ma et al., LLM-Pruner (2023), https://arxiv.org/abs/2305.11627

    Args:
        amount: A pruning ratio for each kind of unit but tokens, or one budget such as a parameter count. See `Amount`.
        at: When to prune: a step (int), a fraction of training (float), `"start"` (before the first step), or a schedule of
            progress from 0 to 1.
        rounds: Number of score-and-prune rounds in each event.
        importance: Scores the units. Defaults to `OutputNorm()`, or to `Taylor()`, the paper's, if no module reads some units
            alone, as for experts.
        repair: Least-squares repair of the consumer layers (see `RepairConfig`). `"auto"` uses `RepairConfig()` if scores come
            from examples and there are enough of them. None keeps the old weights, as in the paper.
        polish: Training toward the model before each round, on the calibration data (see `PolishConfig`). Defaults to None (off).
        calibration: Calibration data: batches, a `Calibration`, or a number of training examples. Defaults to 128 examples.
        measure_batches: Validation batches to run before and after each event. Defaults to all; 0 disables it.

    Raises:
        ValueError: If an argument is not legal, or two arguments contradict each other. In `setup`, if the amount cannot be
            removed.

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
        polish: PolishConfig | None = None,
        calibration: CalibrationLike = None,
        measure_batches: int | None = None,
    ) -> None:
        if not isinstance(amount, Amount):
            raise ValueError(f"amount={amount!r} must be an Amount, such as Amount(channels=0.2). Pass a schedule as at.")
        if amount.tokens is not None:
            raise ValueError(
                f"amount: tokens={amount.tokens} cannot be removed in training, because the training data has them. Remove them "
                "before, with bh.plan(tokens=) or `billhook prune-vocabulary`."
            )
        check_types(StructuredPruning, locals())
        check_at(at)
        check_int("rounds", rounds)
        self.amount, self.at, self.rounds = amount, at, rounds
        self.importance, self.repair, self.polish = importance, repair, polish
        super().__init__(FitCalibration.of(calibration), measure_batches)

    def reset(self) -> None:
        """Clears events and the original size."""
        super().reset()
        self._first: Baseline | None = None

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints."""
        name = type(self.importance).__qualname__ if self.importance else None
        return self._generate_state_key(amount=str(self.amount), importance=name)

    @property
    def needs_data(self) -> bool:
        """True if scores or the repair use batches."""
        return self.importance is None or self.importance.needs_data or isinstance(self.repair, RepairConfig)

    def check(self, fit: Fit) -> None:
        """Raises `ValueError` if the amount cannot be removed."""
        if not fit.resumes:
            RatioSearch(fit.model, self.amount).check()

    def apply_event(self, fit: Fit, step: int) -> None:
        """Removes the amount that is due, in rounds with new scores each."""
        metrics, before, goal = self.validate(fit), len(self.events), self._steps[step]
        for number in range(1, self.rounds + 1):
            share = self.last_target + (goal - self.last_target) * number / self.rounds
            with fail_together(fit, "StructuredPruning"):
                model = fit.model
                search = RatioSearch(model, self.amount)
                self._first = self._first or Baseline.of(search)
                part = self._first.part(search, share)
                if part is None:  # depends on numbers of units only, which are equal on all ranks
                    continue
                with self.calibration.undisturbed(fit), fit.gradient_context(), blockwise(fit.module):
                    pairs = self.calibration.pairs(fit) if self.needs_data else ()
                    runs = [make_run(model, part.units, *pair) for pair in pairs]
                    importance = self.importance or default_importance(part.model, part.units)
                    plan = plan_from_search(part, importance, runs, comm=comm_of(fit, self.calibration.shared(fit)))
                    check_identical(fit, "StructuredPruning", "the plan", plan.to_json)
                    weights, why, how = self.repaired(fit, plan, runs, self.repair if self.needs_data else None)
                    del runs  # frees the batches
            change = partial(self._remove, fit.module, plan, weights, f"{type(importance).__name__}{how}")
            event = self.run_change(fit, {} if self.events[before:] else metrics, change)
            record_not_refitted(event, why)
        self.last_event_step, self.last_target = step, goal
        for event in self.events[before:][-1:]:
            event["after"] |= self.validate(fit)
        for event in self.events[before:]:
            log_event(fit, event)

    def label(self, event: Event) -> str:
        """Returns the change in size of the model."""
        return f"structure, {percent_change(event)}"

    def _remove(self, model: nn.Module, plan: UnitPlan, weights: Weights | None, how: str, optimizers: list[Optimizer]) -> str:
        before = parameter_count(model)
        apply_plan(model, plan, optimizers, weights)
        words = "; ".join([f"without {plan.words}", how, *(f"left in each: {width}" for width in plan.widths)])
        return f"{before:,} -> {parameter_count(model):,} parameters ({words})"

    def state_dict(self) -> dict[str, Any]:
        """Returns events and the original size."""
        return super().state_dict() | {"first": None if self._first is None else asdict(self._first)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores events and the original size."""
        super().load_state_dict(state_dict)
        self._first = None if state_dict["first"] is None else Baseline(**state_dict["first"])
