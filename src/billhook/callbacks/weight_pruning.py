"""Weights become zero at given steps of a fit, and stay zero."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from billhook.callbacks.examples import aside, check_readable, on_device, runs_as_in_training, training_examples
from billhook.callbacks.hold import Hold
from billhook.callbacks.measure import measure
from billhook.callbacks.ranks import SumOverRanks
from billhook.callbacks.rounds import check_times, find_rounds
from billhook.callbacks.shape_event import At, Event, ShapeCallback, log_event
from billhook.report import summary
from billhook.run import callbacks_of, is_trial, training_steps
from billhook.schedules import Schedule
from billhook.sparsity.adapters import mask_as_weights, plain_adapters
from billhook.sparsity.allocation import Allocation
from billhook.sparsity.batches import Run
from billhook.sparsity.checks import adapters_to_count, check_pruning, needs_data
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.masks import sparsity_of
from billhook.sparsity.prune import plan_pruning
from billhook.sparsity.result import Pruning
from billhook.structure.shape import find_transformer
from billhook.walk import Sequential


class WeightPruning(Callback):
    """Zeroes the least important weights at given steps of a fit, and holds them at zero while training goes on.

    The sparsity is always of all weights, so that rounds do not compound. Masks are held through momentum, weight decay,
    accumulation, mixed precision and weight averaging, saved in checkpoints (one bit a weight), and the same after a resume.

    Args:
        criterion: How important a weight is: `Wanda` (2306.11695; the default), `Magnitude`, `SparseGPT`, `RIA`, `Random`.
        sparsity: Fraction of each linear's weights that become zero, in [0, 1); a schedule for rounds; None with a pattern N:M.
        pattern: `"unstructured"`, or `"N:M"`: N are kept of every M consecutive inputs.
        at: When, if `sparsity` is no schedule: a step (int), a fraction of training (float in 0..1), or `"start"`.
        calibration: Batches that the criterion sees: what can be read again and again, such as a list or a DataLoader; each is
            what the model's forward takes, as a dictionary, or what `training_step` takes. By default drawn from the training
            data.
        examples: How many training examples are drawn, on all devices together; the papers take 128.
        seed: Which ones.
        sequential: `"block"`, `"layer"` or `"none"`, as in `prune`.
        allocation: How much each linear gives, as in `prune`.
        skip: Glob patterns of linears to leave alone.
        output_embeddings: Whether an untied output embedding is pruned too.
        measure_batches: Validation batches on which the model is measured before and after each round; by default as many as
            validation takes, 0 for none.
        count_adapters: Whether LoRA counts in the scores, as in `prune`.
        mask_adapters: Whether LoRA acts only where weights are kept, from the first round on, so that `merge` leaves nothing of
            it out. Layers stay so after the fit; `unmask_adapters` undoes it. With `trainer.validate`, `test` and `predict` it
            acts where the weights that are loaded are not zero.

    Raises:
        ValueError: If an argument is not legal, two contradict each other, or a schedule goes down or leaves [0, 1).
    """

    def __init__(
        self,
        criterion: Criterion | None = None,
        sparsity: float | Schedule | None = None,
        pattern: str = "unstructured",
        at: At = "start",
        calibration: Iterable[Any] | None = None,
        examples: int = 128,
        seed: int = 0,
        sequential: Sequential = "block",
        allocation: Allocation | None = None,
        skip: list[str] | None = None,
        output_embeddings: bool = False,
        measure_batches: int | None = None,
        count_adapters: bool = False,
        mask_adapters: bool = False,
    ) -> None:
        check_times(sparsity, pattern, at)
        if examples < 1:
            raise ValueError(f"examples={examples} must be at least 1")
        if isinstance(calibration, Iterator):
            raise ValueError(f"calibration={type(calibration).__name__} can be read only once: give a list or a DataLoader")
        if measure_batches is not None and measure_batches < 0:
            raise ValueError(f"measure_batches={measure_batches} must be at least 0")
        self.criterion = criterion or Wanda()
        self.sparsity, self.pattern, self.at = sparsity, pattern, at
        self.calibration, self.examples, self.seed = calibration, examples, seed
        self.sequential, self.allocation, self.skip = sequential, allocation, list(skip or ())
        self.output_embeddings, self.measure_batches = output_embeddings, measure_batches
        self.count_adapters, self.mask_adapters = count_adapters, mask_adapters
        self.events: list[Event] = []
        self._rounds: dict[int, float | None] = {}
        self._done = -1
        self._adapted: list[str] = []
        self._hold = Hold()

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep this callback's state."""
        return self._generate_state_key(criterion=type(self.criterion).__qualname__, skip=self.skip)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The keep-masks that are held, bool, by the name of the linear in the transformers model."""
        return dict(self._hold.masks)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks the trainer, and starts anew."""
        if stage != "fit":
            return
        strategy = trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy) or isinstance(strategy, DeepSpeedStrategy):
            raise ValueError(
                f"WeightPruning works on one device and under DDP; the strategy is {type(strategy).__name__}. "
                "Prune first (bh.prune), then train the result."
            )
        if trainer.global_step == 0:
            self.events, self._done = [], -1
            self._hold.clear()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the rounds: from which step which sparsity holds; checks all that can be checked before training."""
        total = training_steps(trainer)
        self._rounds = find_rounds(self.sparsity, self.at, total, is_trial(trainer))
        model = find_transformer(pl_module)
        linears = check_pruning(
            model, self.criterion, self.pattern, self.sequential, self.allocation, self.skip, self.output_embeddings
        )
        if self.count_adapters:
            adapters_to_count(model, self.criterion, linears)
        self._adapted = list(plain_adapters(model, linears, "mask_adapters=True")) if self.mask_adapters else []
        self._check_shapes(trainer, total)

    def _check_shapes(self, trainer: pl.Trainer, total: int | None) -> None:
        """Refuses what changes shapes after the first mask exists."""
        first, seen = min(self._rounds, default=sys.maxsize), False
        for callback in callbacks_of(trainer, Callback):
            seen |= callback is self
            if isinstance(callback, ShapeCallback):
                last = max(callback.steps(total or sys.maxsize, trainer), default=-1)
                if (last, seen) > (first, False):
                    raise ValueError(
                        f"{type(callback).__name__} changes shapes at step {last}, after WeightPruning has made masks at step "
                        f"{first}: let it come first, at an earlier step or before it in the list of callbacks"
                    )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Holds what a checkpoint held, and carries out what is due before the first step."""
        if self._needs_data and self.calibration is None:
            check_readable(trainer)
        self._hold.attach(find_transformer(pl_module), trainer.optimizers, _averaged(trainer), self._adapted)
        self._run(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Carries out what is due at the step that has just been taken."""
        self._run(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes zero what other callbacks may have put in the place of the weights."""
        self._hold.apply()
        if late := [step for step in self._rounds if step > trainer.global_step]:
            rank_zero_warn(
                f"WeightPruning: training has ended at step {trainer.global_step}, before the pruning at "
                f"{'step' if len(late) == 1 else f'{len(late)} steps up to'} {max(late)}"
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Outside of a fit, masks LoRA as the weights say that have been loaded."""
        if self.mask_adapters and trainer.state.fn != TrainerFn.FITTING:
            mask_as_weights(find_transformer(pl_module))

    on_test_start = on_predict_start = on_validation_start

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        due = [step for step in self._rounds if self._done < step <= trainer.global_step]
        if due:
            self._prune(trainer, pl_module, max(due))

    def _prune(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        limit = self.measure_batches
        model = find_transformer(pl_module)
        before = summary(model).numbers() | ({} if limit == 0 else measure(trainer, pl_module, limit))
        pruning = self._plan(trainer, pl_module, self._rounds[step])
        masks = pruning.masks(model)
        pruning.apply(model)
        self._hold.hold(masks)
        self._done = step
        zeros = sparsity_of(masks.values())
        after = summary(model).numbers() | ({} if limit == 0 else measure(trainer, pl_module, limit)) | {"sparsity": zeros}
        what = f"{type(self.criterion).__name__}, {self.pattern}: sparsity {zeros:.4f} in {len(masks)} linears"
        event: Event = {"step": trainer.global_step, "what": what, "before": before, "after": after}
        self.events.append(event)
        rank_zero_info(f"billhook, step {event['step']}: {what}")
        log_event(trainer, event)

    @property
    def _needs_data(self) -> bool:
        return needs_data(self.criterion) or (self.allocation is not None and self.allocation.measures)

    def _plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule, sparsity: float | None) -> Pruning:
        model = find_transformer(pl_module)
        context = trainer.precision_plugin.forward_context() if self._needs_data else nullcontext()
        with aside(pl_module, self.seed), context:
            return plan_pruning(
                model, self.criterion, self._runs(trainer, pl_module) if self._needs_data else None, sparsity, self.pattern,
                self.sequential, self.allocation, self.skip, self.output_embeddings,
                None if trainer.world_size == 1 else SumOverRanks(trainer), count_adapters=self.count_adapters,
            )  # fmt: skip

    def _runs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Run]:
        if self.calibration is None:
            batches = training_examples(trainer, self.examples)
        else:
            batches = islice(self.calibration, trainer.global_rank, None, trainer.world_size)
        return runs_as_in_training(pl_module, find_transformer(pl_module), on_device(trainer, batches))

    def state_dict(self) -> dict[str, Any]:
        """What has happened so far, and the masks."""
        return {"events": self.events, "done": self._done, "masks": self._hold.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what had happened."""
        self.events, self._done = state_dict["events"], state_dict["done"]
        self._hold.load_state_dict(state_dict["masks"])

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes zero what other callbacks may have put in the place of the weights, and lets go of the optimizers."""
        self._hold.detach()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets go of the optimizers (Lightning does not call `teardown` then)."""
        self._hold.detach()


def _averaged(trainer: pl.Trainer) -> list[nn.Module]:
    """The copies of the model that callbacks for weight averaging keep."""
    found = [getattr(callback, "_average_model", None) for callback in callbacks_of(trainer, Callback)]
    modules = [copy.module if isinstance(copy, AveragedModel) else copy for copy in found if copy is not None]
    return [find_transformer(module) for module in modules]
