"""Weights become zero at given steps of a fit, and stay zero."""

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from billhook.adapters.masked import mask_as_weights, plain_adapters
from billhook.fit.carry import carry, put, release
from billhook.fit.event import At, Event, FollowsShapes, ShapeCallback, log_event
from billhook.fit.examples import aside, check_readable, check_source, on_device, runs_as_in_training, training_examples
from billhook.fit.going_on import GoingOn
from billhook.fit.measure import check_limit, measure
from billhook.fit.ranks import SumOverRanks, check_agreed, together
from billhook.fit.rounds import check_times, find_rounds, still_due
from billhook.fit.run import callbacks_of, is_trial, training_steps
from billhook.fit.strategies import check_masks
from billhook.model.find import find_transformer
from billhook.report.summary import summary
from billhook.running.batches import Run
from billhook.running.shards import gathered, unsharded, whole
from billhook.running.walk import Sequential
from billhook.schedules import Schedule
from billhook.sparsity.allocation import Allocation
from billhook.sparsity.checks import adapters_to_count, check_pruning, needs_data
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.hold import Hold
from billhook.sparsity.masks import check_amount
from billhook.sparsity.plan import WeightPlan
from billhook.sparsity.prune import prune


class WeightPruning(FollowsShapes):
    """Zeroes the least important weights at given steps of a fit, and holds them at zero while training goes on.

    The sparsity is always of all weights, so that rounds do not compound. Masks are held through momentum, weight decay,
    accumulation, mixed precision and weight averaging, saved in checkpoints (one bit a weight), and the same after a resume.
    Where shapes change afterwards, masks follow: what is zero stays zero, what is averaged is zero where all of it was, and
    weights that are mixed anew are masked again by a later round.

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

    keeps_what_it_did = True

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
        check_source(examples, calibration)
        check_limit(measure_batches)
        self.criterion = criterion or Wanda()
        self.sparsity, self.pattern, self.at = sparsity, pattern, at
        self.calibration, self.examples, self.seed = calibration, examples, seed
        patterns = [skip] if isinstance(skip, str) else skip or []
        if not isinstance(patterns, list | tuple) or not all(isinstance(one, str) for one in patterns):
            raise ValueError(f"skip={skip!r} must be glob patterns of linears, as in ['*.down_proj']")
        self.sequential, self.allocation, self.skip = sequential, allocation, list(patterns)
        self.output_embeddings, self.measure_batches = output_embeddings, measure_batches
        self.count_adapters, self.mask_adapters = count_adapters, mask_adapters
        self.events: list[Event] = []
        self._rounds: dict[int, float | None] = {}
        self._done = -1
        self._asked: float | None = None
        self._adapted: list[str] = []
        self._hold = Hold()
        self._released: GoingOn | None = None

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep this callback's state."""
        return self._generate_state_key(criterion=type(self.criterion).__qualname__, skip=self.skip)

    @property
    def masks(self) -> dict[str, Tensor]:
        """The keep-masks that are held, bool, by the name of the linear in the transformers model.

        Where the model is sharded they are gathered: all ranks ask for them together.
        """
        return {name: whole(mask) for name, mask in self._hold.masks.items()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes checkpoints carry the shape, checks the trainer, and starts anew."""
        if stage == "fit":
            check_masks(trainer, type(self).__name__, adapters=self.count_adapters or self.mask_adapters)
        carry(pl_module)
        self._released = None
        if stage != "fit":
            return
        if trainer.global_step == 0:
            self.events, self._done, self._asked = [], -1, None
            self._hold.clear()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the rounds: from which step which sparsity holds; checks all that can be checked before training."""
        total = training_steps(trainer)
        rounds = find_rounds(self.sparsity, self.at, total, is_trial(trainer))
        self._rounds = still_due(rounds, self._done, self._asked, lambda amount: check_amount(amount, self.pattern), "sparsity")
        model = find_transformer(pl_module)
        linears = check_pruning(
            model, self.criterion, self.pattern, self.sequential, self.allocation, self.skip, self.output_embeddings
        )
        if self.count_adapters:
            adapters_to_count(model, self.criterion, linears)
        self._adapted = list(plain_adapters(model, linears, "mask_adapters=True")) if self.mask_adapters else []
        self._check_shapes(trainer, total)

    def _check_shapes(self, trainer: pl.Trainer, total: int | None) -> None:
        """Refuses what changes shapes after the first mask exists, where masks cannot follow."""
        first, seen = min(self._rounds, default=sys.maxsize), False
        for callback in callbacks_of(trainer, Callback):
            seen |= callback is self
            if isinstance(callback, ShapeCallback):
                last = max(callback.steps(total or sys.maxsize, trainer), default=-1)
                why = self._cannot_follow(callback)
                if (last, seen) > (first, False) and why:
                    raise ValueError(
                        f"{type(callback).__name__} changes shapes at step {last}, after WeightPruning has made masks at step "
                        f"{first}, {why}: let it come first, at an earlier step or before it in the list of callbacks"
                    )

    def _cannot_follow(self, callback: ShapeCallback) -> str:
        """Why masks cannot follow what a callback does; nothing if they can."""
        if self.pattern != "unstructured":
            return f"and pattern={self.pattern!r} is of inputs that stand beside each other"
        if self.mask_adapters:
            return "and mask_adapters=True masks LoRA by the shapes of then"
        return "and moves weights that masks hold" if callback.moves else ""

    def follow(self) -> None:
        """Takes the shape that the model has been given in the middle of the fit."""
        self._hold.follow()

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
        with together(trainer, "WeightPruning"):
            pruning = self._plan(trainer, pl_module, self._rounds[step])
            decided = {name: [one.bits, one.values] for name, one in pruning.pruned.items()}
            check_agreed(trainer, "WeightPruning", "what becomes zero", decided)
            masks, zeros = pruning.masks(model), pruning.sparsity
            what = f"{type(self.criterion).__name__}, {self.pattern}: sparsity {zeros:.4f} in {len(masks)} linears"
            event: Event = {"step": trainer.global_step, "what": what, "before": before, "after": {"sparsity": zeros}}
            self._hold.hold(masks, partial(pruning.apply, model))
        self._done, self._asked = step, check_amount(self._rounds[step], self.pattern)
        self.events.append(event)  # it has happened, whatever measuring comes to
        event["after"] |= summary(model).numbers() | ({} if limit == 0 else measure(trainer, pl_module, limit))
        rank_zero_info(f"billhook, step {event['step']}: {what}")
        log_event(trainer, event)

    @property
    def _needs_data(self) -> bool:
        return needs_data(self.criterion) or (self.allocation is not None and self.allocation.measures)

    def _plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule, sparsity: float | None) -> WeightPlan:
        model = find_transformer(pl_module)
        context = trainer.precision_plugin.forward_context() if self._needs_data else nullcontext()
        with aside(pl_module, self.seed), context, unsharded(pl_module), gathered(pl_module, but=[model]):
            return prune(
                model,
                self.criterion,
                self._runs(trainer, pl_module) if self._needs_data else None,
                sparsity,
                self.pattern,
                allocation=self.allocation,
                skip=self.skip,
                output_embeddings=self.output_embeddings,
                sequential=self.sequential,
                count_adapters=self.count_adapters,
                reduce=None if trainer.world_size == 1 else SumOverRanks(trainer),
                dry_run=True,
            )

    def _runs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Run]:
        if self.calibration is None:
            batches = training_examples(trainer, self.examples)
        else:
            batches = islice(self.calibration, trainer.global_rank, None, trainer.world_size)
        return runs_as_in_training(pl_module, find_transformer(pl_module), on_device(trainer, batches))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the shape into checkpoints that are saved after the fit or after an error, too."""
        put(trainer, pl_module, checkpoint, self._released)

    def state_dict(self) -> dict[str, Any]:
        """What has happened so far, and the masks."""
        return {"events": self.events, "done": self._done, "asked": self._asked, "masks": self._hold.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what had happened."""
        self.events, self._done, self._asked = state_dict["events"], state_dict["done"], state_dict.get("asked")
        self._hold.load_state_dict(state_dict["masks"])

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes zero what other callbacks may have put in the place of the weights, and lets go of the optimizers."""
        self._hold.detach()
        self._released = release(trainer, pl_module) or self._released

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets go of the optimizers (Lightning does not call `teardown` then)."""
        self._hold.detach()
        self._released = release(trainer, pl_module) or self._released


def _averaged(trainer: pl.Trainer) -> list[nn.Module]:
    """The copies of the model that callbacks for weight averaging keep."""
    found = [getattr(callback, "_average_model", None) for callback in callbacks_of(trainer, Callback)]
    modules = [copy.module if isinstance(copy, AveragedModel) else copy for copy in found if copy is not None]
    return [find_transformer(module) for module in modules]
