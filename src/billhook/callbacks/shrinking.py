"""The Shrinking callback: budgeted search during training."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from billhook.adapters.merge import adapter_layers, adapters_removed, base_layer_name, is_initial_lora
from billhook.arguments import check_types
from billhook.callbacks.polishing import PolishingCallback
from billhook.engine import LazyTensors, Run, blockwise, run_with_loss, store_of, tree_leaves
from billhook.fit.calibration import CalibrationLike, FitCalibration
from billhook.fit.event import Event, describe_callback, log_event, percent_change, record_not_refitted
from billhook.fit.fit import Fit
from billhook.fit.ranks import check_close, check_identical, fail_together, from_first_rank
from billhook.fit.shape_event import ShapeCallback
from billhook.fit.targets import At, check_at
from billhook.importance.obs import OBS
from billhook.model import expert_layers, is_linear, signature
from billhook.pruning.planning import plan_units
from billhook.repairs.polish import PolishConfig
from billhook.shrinking.divergence import search_batches, split_batches
from billhook.shrinking.measurement import Measurement, measure
from billhook.shrinking.result import Budget, Search, Shrunk
from billhook.shrinking.scope import SearchScope
from billhook.shrinking.selection import SearchResult, select_for_budget
from billhook.shrinking.shrink import Layers, measure_result, resolve_repair
from billhook.shrinking.shrink_plan import ShrinkPlan, apply_plans
from billhook.shrinking.variants import cache_key


class Shrinking(PolishingCallback, ShapeCallback):
    """Searches for the best model within a budget at a given step, and applies it.

    Runs `bh.shrink` during training, so that training recovers the loss. With `TransformerModule(distillation=...)`, the dense
    model is the teacher. Optimizer state and gradients are remapped, checkpoints store the shape, and a resumed run ends like an
    uninterrupted run. With `TransformerModule(lora=...)`, it runs at the start: LoRA is pruned too and trains the remaining
    weights, and the budget excludes adapters. Under DDP and FSDP2, all ranks search on the same batches with the first rank's
    measurements; under FSDP2, one block is gathered at a time.

    Args:
        budget: Budget, such as `Budget(params=0.8)`. For `max_loss`, perplexity comes from the model's own loss.
        layers: `"uniform"` keeps the same number of channels and heads in all blocks; `"free"` chooses per block. Both may remove
            blocks.
        at: When to apply it: a step (int), a fraction of training (float), or `"start"` (before the first step).
        calibration: Calibration data: batches, a `Calibration`, or a number of training examples. Defaults to 128 examples.
            A fifth is held out for measuring.
        search: Search settings, such as `Search(generations=0)`. Defaults to `Search()`.
        polish: Training toward the dense model on the calibration data, after the search (see `PolishConfig`). Defaults to None
            (off).
        measure_batches: Validation batches to run before and after each event. Defaults to all; 0 disables it.

    Attributes:
        shrunk: Search results, once the event has happened. Not restored when a run is resumed.

    Raises:
        ValueError: If an argument is not legal. In `setup`, if the model cannot meet the budget.

    >>> import billhook as bh
    >>> callback = bh.Shrinking(bh.Budget(params=0.8), calibration=64)  # for Trainer(callbacks=[callback])
    """

    blockwise = True

    def __init__(
        self,
        budget: Budget,
        layers: Layers = "uniform",
        at: At = "start",
        calibration: CalibrationLike = None,
        search: Search | None = None,
        polish: PolishConfig | None = None,
        measure_batches: int | None = None,
    ) -> None:
        check_types(Shrinking, locals())
        check_at(at)
        self.budget, self.layers, self.at, self.search = budget, layers, at, search or Search()
        self.polish = polish
        self.amount = budget.amount(self.search)
        super().__init__(FitCalibration.of(calibration), measure_batches)

    def reset(self) -> None:
        """Clears events and results."""
        super().reset()
        self.shrunk: Shrunk | None = None
        self._known: dict[Hashable, SearchScope] = {}

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints."""
        return f"Shrinking{{'amount': {str(self.amount)!r}, 'max_loss': {self.budget.max_loss!r}}}"

    @property
    def needs_data(self) -> bool:
        """True: the search measures candidates on calibration data."""
        return True

    def begin(self, fit: Fit) -> None:
        """Checks the model and its weights once it exists."""
        with blockwise(fit.module):
            self.check(fit)

    def check(self, fit: Fit) -> None:
        """Raises `ValueError` if the model cannot meet the budget, or adapters have been trained."""
        subject = fit.model
        if adapter_layers(subject) and self.at != "start":
            raise ValueError(
                f"at={self.at!r} must be 'start' if the model has adapters, because Shrinking needs untrained adapters."
            )
        if not fit.resumes:
            self._candidates(subject)

    def apply_event(self, fit: Fit, step: int) -> None:
        """Searches, then removes units and repairs the rest."""
        metrics, model = self.validate(fit), fit.model
        with fail_together(fit, "Shrinking"), blockwise(fit.module):
            scope = self._candidates(model)
            self._known.clear()
            with adapters_removed(model):
                measurement, chosen = self._search(fit, scope)
            check_identical(fit, "Shrinking", "the plan", lambda: [plan.to_json() for plan in chosen.planned.plans])
        event = self.run_change(fit, metrics, partial(self._remove, model, chosen.planned))
        record_not_refitted(event, chosen.planned.not_refitted)
        self.last_event_step, self.last_target = step, 1.0
        with fail_together(fit, "Shrinking"), self.calibration.undisturbed(fit), fit.gradient_context(), adapters_removed(model):
            self.shrunk = measure_result(measurement, chosen)
        event["after"] |= self.validate(fit)
        log_event(fit, event)

    def _candidates(self, model: PreTrainedModel) -> SearchScope:
        """Finds the candidates, or reuses them from `setup` if the model is bitwise identical."""
        for name, layer in adapter_layers(model).items():
            store_of(model).load(layer)
            if not is_initial_lora(layer):
                raise ValueError(
                    f"Shrinking: the adapter of {name} is trained or is not plain LoRA. Merge it first (bh.training.merge)."
                )
        with adapters_removed(model):
            lasts = self.at == "start" and not store_of(model).on_ranks  # training changes it, and shards are gathered again
            shape = signature(model) if lasts else None
            seen = None if shape is None else (id(model), shape, cache_key(model, None, {}, ()))
            scope = self._known.pop(seen, None) or SearchScope.find(model, self.amount, self.layers == "uniform")
        self._known = {seen: scope} if seen is not None else {}
        return scope

    def _search(self, fit: Fit, scope: SearchScope) -> tuple[Measurement, SearchResult]:
        """Searches on the same batches on each rank."""
        model = scope.model
        with self.calibration.undisturbed(fit), fit.gradient_context():
            batches = list(self.calibration.read(fit, same_on_ranks=True))
            check_identical(fit, "Shrinking", "the settings", partial(describe_callback, self))
            check_identical(fit, "Shrinking", "the batches", [leaf for leaf in tree_leaves(batches) if isinstance(leaf, Tensor)])
            check_close(fit, "Shrinking", "the model", model, dict(model.named_parameters()))
            broadcast = partial(from_first_rank, fit, "Shrinking", "the measurements")
            repair_batches, held_out = split_batches(batches)
            runs = _runs(fit, model, repair_batches)
            search_runs = _runs(fit, model, search_batches(repair_batches, scope.widest))
            repair, not_repaired = resolve_repair(scope, runs, self.search.repair)
            if not_repaired:
                rank_zero_warn(f"Shrinking: {not_repaired}")
            importance, held_out_runs = self.search.importance or OBS(), fit.runs(model, held_out)
            measurement = measure(scope, search_runs, held_out_runs, importance, repair, broadcast=broadcast)
            chosen = select_for_budget(measurement, self.budget, runs, held_out, repair, self.search, self.calibration.seed)
            not_refitted = chosen.planned.not_refitted or not_repaired
            return measurement, replace(chosen, planned=replace(chosen.planned, not_refitted=not_refitted))

    def label(self, event: Event) -> str:
        """Returns the change in size of the model."""
        return f"shrink, {percent_change(event)}"

    def _remove(self, model: PreTrainedModel, planned: ShrinkPlan, optimizers: list[Optimizer]) -> str:
        """Applies the plans, also to adapters, and returns a description."""
        layers = adapter_layers(model)
        weights = LazyTensors.of(planned.weights or {}).renamed(partial(base_layer_name, layers=layers))
        # made in turn, because a plan for a model with adapters needs the plans before it applied
        adapted = (plan_units(model, plan.units, dict.fromkeys(plan.kinds.values())) for plan in planned.plans if plan.units)
        apply_plans(model, adapted if layers else planned.plans, optimizers, weights)
        before, after = planned.parameters
        return f"{before:,} -> {after:,} parameters ({planned.words}; Shrinking)"


def _runs(fit: Fit, model: PreTrainedModel, batches: Sequence[Any]) -> list[Run]:
    """Returns runs with the training loss and each linear layer's non-padding tokens."""
    with expert_layers(model):
        linear_layers = {name: module for name, module in model.named_modules() if is_linear(module)}
        return [run_with_loss(model, linear_layers, batch, fit.loss(number)) for number, batch in enumerate(batches)]
