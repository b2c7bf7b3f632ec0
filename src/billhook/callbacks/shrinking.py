"""Searches at a given step of a fit for the smaller model that loses least, and goes on with it."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from billhook.adapters.merge import adapter_layers, adapters_removed, base_layer_name, is_initial_lora
from billhook.arguments import check_types
from billhook.engine.batches import Run, run_with_loss
from billhook.engine.lazy import LazyTensors
from billhook.engine.passes import blockwise
from billhook.engine.store import store_of
from billhook.engine.trees import tree_leaves
from billhook.fit.calibration import CalibrationLike, FitCalibration, gradient_precision
from billhook.fit.event import Event, describe_callback, log_event, percent_change, record_not_refitted
from billhook.fit.ranks import check_close, check_identical, fail_together, from_first_rank
from billhook.fit.run import At, check_at, round_targets
from billhook.fit.shape_event import ShapeCallback
from billhook.fit.training_step import training_loss, training_runs
from billhook.importance.obs import OBS
from billhook.model.cache import signature
from billhook.model.find import find_transformer
from billhook.model.layers import is_linear
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.plan import UnitPlan
from billhook.pruning.planning import plan_units
from billhook.shrinking.cache import key_of
from billhook.shrinking.candidates import Candidates
from billhook.shrinking.choice import Chosen
from billhook.shrinking.divergence import divided, to_search
from billhook.shrinking.measurement import Measured, measure
from billhook.shrinking.planned import Planned, apply_in_turn
from billhook.shrinking.search import Budget, Search
from billhook.shrinking.shrink import Layers, choose_for, repair_for, shrunk_of
from billhook.shrinking.shrunk import Shrunk


class Shrinking(ShapeCallback):
    """Removes channels, heads and blocks within one budget at a given step, as much of each as loses least.

    This is `bh.shrink` in the middle of a fit, so that training recovers what is lost; with `TransformerModule(distillation=...)`
    the dense model teaches it. Optimizer state and gradients follow, checkpoints carry the shape, and a resumed run ends as the
    straight run does. Under DDP and FSDP2 each rank searches on the same batches, all of them, by what the first has measured;
    under FSDP2 one block is whole at a time, and candidates of layers are divided among ranks. With
    `TransformerModule(lora=...)` it comes at the start, and LoRA, cut too, trains what is left; the budget counts no adapters.
    For a budget of time, call `bh.shrink` before the fit: ranks would not agree on what they measure.

    Args:
        budget: What is left at most, such as `Budget(params=0.8)`; not `latency`. Where KV heads merge, for `kv_cache_bytes`,
            their optimizer state restarts, as they are in another basis; under LoRA heads are removed. For `max_loss` perplexity
            is by the model's own loss.
        layers: `"uniform"`: all feed-forwards keep as many channels and all attentions as many heads; `"free"`: each its own.
            Whole blocks may go in both.
        at: When: a step (int), a fraction of training (float in 0..1), or `"start"` (before the first step).
        calibration: Batches to fit and to measure on, text as a `Calibration`, or a number of training
            examples, by default 128; a fifth is held out to measure on.
        search: How it is searched for, as by `Search(generations=0)`.
        measure_batches: Validation batches to measure before and after; by default all of validation, 0 for none.

    Attributes:
        shrunk: What was found, once it has been; a resumed run does not know it.

    Raises:
        ValueError: If an argument is not legal; in `setup`, if the model cannot meet the budget.

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
        measure_batches: int | None = None,
    ) -> None:
        check_types(Shrinking, locals())
        check_at(at)
        if budget.latency is not None:
            raise ValueError(f"budget={budget.words}: ranks would not agree on what they measure: call bh.shrink before the fit")
        self.budget, self.layers, self.at, self.search = budget, layers, at, search or Search()
        self.amount = self.search.amount(budget)
        super().__init__(FitCalibration.of(calibration), measure_batches)

    def reset(self) -> None:
        """Forgets what was found."""
        super().reset()
        self.shrunk: Shrunk | None = None
        self._known: dict[Hashable, Candidates] = {}

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints."""
        # as when the class was called Shrink, so that checkpoints of then can be resumed
        return f"Shrink{{'amount': {str(self.amount)!r}, 'max_loss': {self.budget.max_loss!r}}}"

    @property
    def needs_data(self) -> bool:
        """True: it is measured what a smaller model loses."""
        return True

    def begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks the model once it exists, with its values."""
        with blockwise(pl_module):
            self.check(pl_module, trainer)

    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Refuses a budget that the model cannot meet, and adapters."""
        subject = find_transformer(model)
        if adapter_layers(subject) and self.at != "start":
            raise ValueError(
                f"at={self.at!r} must be 'start' where adapters are attached: Shrinking comes before they learn anything"
            )
        if trainer.ckpt_path is None:
            self._candidates(subject)

    def steps(self, total: int | None, trainer: pl.Trainer) -> dict[int, float]:
        """Returns the step at which it happens."""
        return round_targets(1.0, self.at, total, trainer, "at")

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Searches, removes and repairs."""
        metrics, model = self.validate(trainer, pl_module), find_transformer(pl_module)
        with fail_together(trainer, "Shrinking"), blockwise(pl_module):
            candidates, merges = self._candidates(model), not adapter_layers(model)
            self._known.clear()
            with adapters_removed(model):
                measured, chosen = self._search(trainer, pl_module, candidates, merges)
            check_identical(
                trainer, "Shrinking", "the plan of what is removed", lambda: [plan.to_json() for plan in chosen.planned.plans]
            )
        event = self.reshape(trainer, pl_module, metrics, partial(self._remove, model, chosen.planned))
        record_not_refitted(event, chosen.planned.not_refitted)
        self.last_event_step, self.last_target = step, 1.0
        with (
            fail_together(trainer, "Shrinking"),
            self.calibration.undisturbed(pl_module),
            gradient_precision(trainer),
            adapters_removed(model),
        ):
            self.shrunk = shrunk_of(measured, chosen)
        event["after"] |= self.validate(trainer, pl_module)
        log_event(trainer, event)

    def _candidates(self, model: PreTrainedModel) -> Candidates:
        """Finds what may be removed beneath adapters; refuses a budget that cannot be met, and adapters that have learned.

        What is found in `setup` is there once more at the event, if the model is then the same to the last bit.
        """
        for name, layer in adapter_layers(model).items():
            store_of(model).load(layer)
            if not is_initial_lora(layer):
                what = f"the adapter of {name} is not plain LoRA, or has learned something"
                raise ValueError(f"Shrinking: {what}: merge it (bh.training.merge)")
        with adapters_removed(model):
            lasts = self.at == "start" and not store_of(model).on_ranks  # training changes it, and shards are gathered anew
            seen = _seen(model) if lasts else None
            candidates = self._known.pop(seen, None) or Candidates.find(model, self.amount, self.layers == "uniform")
        self._known = {seen: candidates} if seen is not None else {}
        return candidates

    def _search(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, candidates: Candidates, merges: bool
    ) -> tuple[Measured, Chosen]:
        """Searches on the same batches on each rank; where adapters are attached, no heads merge."""
        model = candidates.model
        with self.calibration.undisturbed(pl_module), gradient_precision(trainer):
            batches = list(self.calibration.read(trainer, same_on_ranks=True))
            check_identical(trainer, "Shrinking", "its settings", partial(describe_callback, self))
            check_identical(
                trainer, "Shrinking", "the batches", [leaf for leaf in tree_leaves(batches) if isinstance(leaf, Tensor)]
            )
            check_close(trainer, "Shrinking", "the model", model, dict(model.named_parameters()))
            agreed = partial(from_first_rank, trainer, "Shrinking", "what it measures")
            fitted, held_out = divided(batches)
            runs, searched = (_runs(pl_module, model, some) for some in (fitted, to_search(fitted, candidates.widest)))
            repair, not_repaired = repair_for(candidates, runs, self.search.repair)
            if not_repaired:
                rank_zero_warn(f"Shrinking: {not_repaired}")
            predicting = training_runs(pl_module, model, held_out)
            measured = measure(
                candidates, searched, predicting, self.search.importance or OBS(), repair, merges=merges, agreed=agreed
            )
            how = self.search, self.calibration.seed
            chosen = choose_for(measured, self.budget, searched, runs, held_out, repair, *how)
            left = chosen.planned.not_refitted or not_repaired
            return measured, replace(chosen, planned=replace(chosen.planned, not_refitted=left))

    def label(self, event: Event) -> str:
        """Returns how much smaller the model is, or its cache."""
        cache = self.amount.target == "kv_cache_bytes"
        return f"shrink, KV cache {percent_change(event, 'kv_cache_bytes')}" if cache else f"shrink, {percent_change(event)}"

    def _remove(self, model: PreTrainedModel, planned: Planned, optimizers: list[Optimizer]) -> str:
        """Removes what is planned, of adapters too, and says how much that is."""
        layers = adapter_layers(model)
        weights = LazyTensors.of(planned.weights or {}).renamed(partial(base_layer_name, layers=layers))
        apply_in_turn(model, _above(model, planned) if layers else planned.plans, optimizers, weights)
        before, after = planned.parameters
        return f"{before:,} -> {after:,} parameters ({planned.words}; Shrinking)"


def _seen(model: PreTrainedModel) -> Hashable | None:
    """Returns what tells a model in its shape and with its values; None if something may decide it that cannot be seen."""
    seen = signature(model)
    return None if seen is None else (id(model), seen, key_of(model, None, {}, ()))


def _above(model: PreTrainedModel, planned: Planned) -> Iterator[UnitPlan | BlockPlan]:
    """Yields the same plans for a model with adapters, each once those before it have been carried out."""
    for plan in planned.cuts:
        if plan.units:
            yield plan_units(model, plan.units, dict.fromkeys(plan.kinds.values()))


def _runs(pl_module: pl.LightningModule, model: PreTrainedModel, batches: Sequence[Any]) -> list[Run]:
    """Returns runs of batches with the loss that is trained, and of each linear which tokens count."""
    losses = (training_loss(pl_module, number) for number in range(len(batches)))
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    return [run_with_loss(model, linears, *pair) for pair in zip(batches, losses, strict=True)]
