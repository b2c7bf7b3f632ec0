"""Zeroes weights at given steps of a fit, and keeps them at zero."""

import logging
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from billhook.adapters.masked import find_adapters, mask_nonzero, require_plain_adapters
from billhook.adapters.merge import adapters_removed
from billhook.arguments import check_types
from billhook.calibration.calibration import Batches
from billhook.engine.passes import blockwise
from billhook.engine.sharding import full_tensor, reshard
from billhook.engine.zeros import zeros_by_name
from billhook.fit.calibration import CalibrationLike, FitCalibration
from billhook.fit.event import Event, EventCallback, ShapeFollower, log_event
from billhook.fit.lightning_internals import averaging_callbacks
from billhook.fit.ranks import check_identical, comm_of, fail_together
from billhook.fit.run import At, check_at, check_masking_strategy, round_targets
from billhook.fit.shape_event import ShapeCallback, check_no_shape_changes
from billhook.fit.training_step import training_runs
from billhook.model.find import find_transformer
from billhook.schedules import Schedule
from billhook.sparsity.checks import check_matching, check_pruning, find_countable_adapters, needs_data
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.enforcement import EnforcedMasks
from billhook.sparsity.masks import check_amount
from billhook.sparsity.options import PruneOptions
from billhook.sparsity.prune import prune
from billhook.sparsity.weight_plan import WeightPlan


@rank_zero_only
def _tell_left_out(adapted: Collection[str]) -> None:
    """Tells, by the logger `billhook`, that what adapters learn where weights are zero is left out when they are merged."""
    if adapted:
        logging.getLogger("billhook").warning(
            f"WeightPruning: adapters are on {len(adapted)} of the linears that are pruned, and what they learn where weights "
            "are zero is left out when they are merged, as Export does: mask_adapters=True has LoRA learn where weights are kept"
        )


class WeightPruning(EventCallback, ShapeFollower):
    """Zeroes the least important weights at given steps of a fit, and holds them at zero while training continues.

    The sparsity is always of all weights, so that rounds do not compound. Masks are held through momentum, weight decay,
    accumulation, mixed precision and weight averaging, saved in checkpoints, and follow later shapes.

    Args:
        criterion: How important a weight is: any `Criterion`; by default `Wanda`.
        sparsity: Fraction of each linear's weights that become zero, in [0, 1); a schedule for rounds; None with N:M.
        pattern: `"unstructured"`, or `"N:M"`: N are kept of every M consecutive inputs.
        at: When: a step (int), a fraction of training (float in 0..1), `"start"`, or a schedule of progress that rises to 1.
        calibration: Batches that the criterion sees, text as a `Calibration`, or a number of training
            examples, by default 128.
        options: Which linears are pruned and by what inputs, as in `prune`: `PruneOptions(sequential="layer")`.
        count_adapters: True to count LoRA in the scores, as in `prune`.
        mask_adapters: True to have LoRA act only where weights are kept, during and after the fit; see `mask_adapters`.
        measure_batches: Validation batches to measure before and after each round; by default all of validation, 0 for none.

    Raises:
        ValueError: If an argument is not legal, two contradict each other, or a schedule falls or leaves [0, 1).

    >>> import billhook as bh
    >>> callback = bh.WeightPruning(bh.Wanda(), sparsity=bh.schedules.Cubic(final=0.5, every=100))
    """

    def __init__(
        self,
        criterion: Criterion | None = None,
        sparsity: float | Schedule | None = None,
        pattern: str = "unstructured",
        at: At | Schedule = "start",
        calibration: CalibrationLike = None,
        options: PruneOptions | None = None,
        count_adapters: bool = False,
        mask_adapters: bool = False,
        measure_batches: int | None = None,
    ) -> None:
        check_at(at, sparsity)
        check_types(WeightPruning, locals())
        self.amount = sparsity if isinstance(sparsity, Schedule) else check_amount(sparsity, pattern)
        if pattern != "unstructured" and (isinstance(sparsity, Schedule) or isinstance(at, Schedule)):
            raise ValueError(f"pattern={pattern!r} is a sparsity of its own, which a schedule contradicts: give a step as at")
        self.criterion, self.sparsity, self.pattern, self.at = criterion or Wanda(), sparsity, pattern, at
        self.options = options or PruneOptions()
        if self.options.match is not None:
            check_matching(self.criterion, self.options.sequential, count_adapters)
        self.count_adapters, self.mask_adapters = count_adapters, mask_adapters
        self._hold, self._adapted, self._linears = EnforcedMasks(), list[str](), list[str]()
        super().__init__(FitCalibration.of(calibration), measure_batches)

    def reset(self) -> None:
        """Forgets all events and masks."""
        super().reset()
        self._hold.clear()

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints."""
        return self._generate_state_key(criterion=type(self.criterion).__qualname__, skip=[*self.options.patterns])

    @property
    def needs_data(self) -> bool:
        """True if criterion, allocation or matching take batches."""
        return needs_data(self.criterion) or self.options.needs_data

    @property
    def masks(self) -> dict[str, Tensor]:
        """The keep-masks that are held, bool, by linear; of a sharded model all ranks ask for them together."""
        return {name: full_tensor(mask) for name, mask in self._hold.masks.items()}

    def check_trainer(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses strategies under which weights cannot be masked."""
        check_masking_strategy(trainer, type(self).__name__)

    def steps(self, total: int | None, trainer: pl.Trainer) -> dict[int, float]:
        """Returns from which step on which sparsity holds."""
        return round_targets(self.amount, self.at, total, trainer, "sparsity")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the rounds, and checks all that can be checked before training."""
        super().on_fit_start(trainer, pl_module)
        model = find_transformer(pl_module)
        linears = check_pruning(model, self.criterion, self.pattern, self.options)
        self._linears = list(linears)
        self.check_linears(linears)
        if self.count_adapters:
            find_countable_adapters(model, self.criterion, linears)
        self._adapted = list(require_plain_adapters(model, linears, "mask_adapters=True")) if self.mask_adapters else []
        if self._steps and not self.mask_adapters:
            _tell_left_out(set(find_adapters(model)) & set(linears))
        if self._steps:
            check_no_shape_changes(trainer, self, min(self._steps), sys.maxsize, "made masks", self._cannot_follow)

    def check_linears(self, linears: dict[str, nn.Module]) -> None:
        """Refuses linears whose weights cannot be masked as is asked."""

    def _cannot_follow(self, callback: ShapeCallback) -> str | None:
        """Returns why masks cannot follow the changes of a callback; None if they can."""
        if self.pattern != "unstructured":
            return f", and pattern={self.pattern!r} is of inputs that are next to each other"
        if self.mask_adapters:
            return ", and mask_adapters=True masks LoRA in the shapes before"
        return ", and moves weights that masks hold" if callback.moves_weights else None

    def follow(self) -> None:
        """Takes the shape that the model has been given in the middle of the fit."""
        self._hold.follow()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Holds the masks of a checkpoint, and carries out what is due before the first step."""
        averaged = [find_transformer(copy) for _, copy in averaging_callbacks(trainer) if copy is not None]
        self._hold.attach(find_transformer(pl_module), trainer.optimizers, averaged, self._adapted)
        super().on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Zeroes weights that other callbacks have replaced."""
        self._hold.apply()
        super().on_train_end(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Masks LoRA where the loaded weights are zero, outside of a fit."""
        if self.mask_adapters and trainer.state.fn != TrainerFn.FITTING:
            mask_nonzero(find_transformer(pl_module))

    on_test_start = on_predict_start = on_validation_start

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Prunes to the sparsity of a round, and measures before and after."""
        event = self.event_at(trainer, pl_module, self.validate(trainer, pl_module), step)
        event["after"] |= self.validate(trainer, pl_module)
        log_event(trainer, event)

    def event_at(self, trainer: pl.Trainer, pl_module: pl.LightningModule, metrics: dict[str, float], step: int) -> Event:
        """Prunes to the sparsity of a round."""
        model = find_transformer(pl_module)
        with fail_together(trainer, "WeightPruning"):
            pruning = self._plan(trainer, pl_module, self._steps[step])
            check_identical(trainer, "WeightPruning", "the weights that become zero", pruning.decided)
            event = self.record_event(trainer, model, metrics, partial(self._apply, model, pruning, step))
        event["after"]["sparsity"] = pruning.sparsity
        return event

    def _apply(self, model: nn.Module, pruning: WeightPlan, step: int) -> str:
        self._hold.hold(pruning.masks(model), partial(pruning.apply, model))
        self.last_event_step, self.last_target = step, self._steps[step]
        return f"{self._how} sparsity {pruning.sparsity:.4f} in {len(pruning.pruned)} linears"

    def metrics(self, model: nn.Module) -> dict[str, float | None]:
        """Returns the share of zeros in the linears that are pruned."""
        subject = find_transformer(model)
        reshard(subject)
        with adapters_removed(subject):
            zeros = zeros_by_name(subject) or {}
            sizes = {name: parameter.numel() for name, parameter in subject.named_parameters()}
        names = [name for name in (f"{linear}.weight" for linear in self._linears) if name in zeros]
        every = sum(sizes[name] for name in names)
        return {"sparsity": sum(zeros[name] for name in names) / every} if every else {}

    def label(self, event: Event) -> str:
        """Returns the criterion, and the pattern or the target sparsity."""
        amount = f"{100 * self.last_target:.3g} %" if self.pattern == "unstructured" else self.pattern
        return f"{type(self.criterion).__name__} {amount}"

    @property
    def _how(self) -> str:
        return f"{type(self.criterion).__name__}, {self.pattern}:"

    def _plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule, sparsity: float) -> WeightPlan:
        model = find_transformer(pl_module)
        with self._runs(trainer, pl_module) as runs:
            return prune(
                model,
                self.criterion,
                runs,
                sparsity,
                self.pattern,
                options=self.options,
                count_adapters=self.count_adapters,
                reduce=comm_of(trainer),
                dry_run=True,
            )

    @contextmanager
    def _runs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Batches | None]:
        """Gives the calibration batches as the fit runs them, with a block whole at a time; None if nothing needs data."""
        model = find_transformer(pl_module)
        precision = trainer.precision_plugin.forward_context() if self.needs_data else nullcontext()
        with self.calibration.undisturbed(pl_module), precision, blockwise(pl_module):
            yield training_runs(pl_module, model, self.calibration.read(trainer)) if self.needs_data else None

    def state_dict(self) -> dict[str, Any]:
        """Returns what has happened so far, and the masks."""
        return super().state_dict() | {"masks": self._hold.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what had happened."""
        super().load_state_dict(state_dict)
        self._hold.load_state_dict(state_dict["masks"])

    def release_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Masks weights that other callbacks may have replaced, and removes all hooks."""
        self._hold.detach()
        super().release_masks(trainer, pl_module)
