"""The WeightPruning callback: prunes weights during training and keeps them at zero."""

import logging
import sys
from contextlib import nullcontext
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer

from billhook.adapters.masked import find_adapters, mask_nonzero, masked_by_zeros, require_plain_adapters
from billhook.adapters.merge import adapters_removed
from billhook.arguments import check_types
from billhook.callbacks.polishing import PolishingCallback
from billhook.engine import blockwise, full_tensor, reshard, zeros_by_name
from billhook.fit.calibration import CalibrationLike, FitCalibration
from billhook.fit.event import Event, ShapeFollower, log_event
from billhook.fit.fit import Fit
from billhook.fit.ranks import check_identical, comm_of, fail_together
from billhook.fit.shape_event import check_no_shape_changes
from billhook.fit.targets import At, check_at, round_targets
from billhook.model import ExpertLinear, expert_layers, find_transformer
from billhook.repairs.polish import PolishConfig
from billhook.schedules import Schedule
from billhook.sparsity.checks import check_matching, check_pruning, needs_data, unsupported_weights
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.enforcement import EnforcedMasks
from billhook.sparsity.masks import check_amount
from billhook.sparsity.options import PruneOptions
from billhook.sparsity.prune import prune
from billhook.sparsity.weight_plan import WeightPlan


class WeightPruning(PolishingCallback, ShapeFollower):
    """Prunes individual weights at given steps and keeps them at zero during training.

    Sparsity always refers to all weights, so rounds do not compound. Masks are enforced under momentum, weight decay, gradient
    accumulation, mixed precision, and weight averaging. They are saved in checkpoints and follow later shape changes.

    Args:
        criterion: Scores the weights. Defaults to `Wanda()`.
        sparsity: Fraction of each linear layer's weights to zero, in [0, 1), or a schedule for pruning in rounds. None with an
            N:M pattern.
        pattern: `"unstructured"`, or `"N:M"` to keep N of every M consecutive inputs.
        at: When to prune: a step (int), a fraction of training (float), `"start"`, or a schedule of progress from 0 to 1.
        calibration: Calibration data: batches, a `Calibration`, or a number of training examples. Defaults to 128 examples.
        options: Layers to prune and inputs to score them on, as in `prune`. Defaults to `PruneOptions()`.
        polish: Training toward the model before each round, on the calibration data (see `PolishConfig`). Defaults to None (off).
        mask_adapters: If True, restricts LoRA on pruned layers to unpruned weights, during and after training, so that merging
            loses no part of it.
        measure_batches: Validation batches to run before and after each event. Defaults to all; 0 disables it.

    Raises:
        ValueError: If an argument is not legal, two arguments contradict each other, or a schedule decreases or leaves [0, 1).

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
        polish: PolishConfig | None = None,
        mask_adapters: bool = False,
        measure_batches: int | None = None,
    ) -> None:
        check_at(at, sparsity)
        check_types(WeightPruning, locals())
        self.amount = sparsity if isinstance(sparsity, Schedule) else check_amount(sparsity, pattern)
        if pattern != "unstructured" and (isinstance(sparsity, Schedule) or isinstance(at, Schedule)):
            raise ValueError(
                f"pattern={pattern!r} fixes the sparsity and cannot follow a schedule. Pass a single step as at, and a number or "
                "None as sparsity."
            )
        self.criterion, self.sparsity, self.pattern, self.at = criterion or Wanda(), sparsity, pattern, at
        self.options, self.polish, self.mask_adapters = options or PruneOptions(), polish, mask_adapters
        if self.options.match is not None:
            check_matching(self.criterion, self.options.sequential)
        self._hold, self._adapted, self._weights = EnforcedMasks(), list[str](), list[str]()
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
        """True if the criterion, the allocation, or block-wise reconstruction uses batches."""
        return needs_data(self.criterion) or self.options.needs_data

    @property
    def masks(self) -> dict[str, Tensor]:
        """The enforced keep-masks (bool) by linear layer; sharded ranks must call it together."""
        return {name: full_tensor(mask) for name, mask in self._hold.masks.items()}

    def steps(self, fit: Fit) -> dict[int, float]:
        """Returns the target sparsity of each round by step."""
        return round_targets(self.amount, self.at, fit, "sparsity")

    def resolve(self, fit: Fit) -> None:
        """Resolves the rounds and checks the model."""
        super().resolve(fit)
        model = fit.model
        with expert_layers(model):
            layers = check_pruning(model, self.criterion, self.pattern, self.options)
        with adapters_removed(model):
            stacks = {layer.stacked(name) for name, layer in layers.items() if isinstance(layer, ExpertLinear)}
            weights = [f"{name}.weight" for name, layer in layers.items() if not isinstance(layer, ExpertLinear)]
            self._weights = [*weights, *sorted(stacks), *unsupported_weights(model, layers)]
        self._adapted = list(require_plain_adapters(model, layers, "mask_adapters=True")) if self.mask_adapters else []
        if self._steps and not self.mask_adapters and (adapted := set(find_adapters(model)) & set(layers)):
            rank_zero_only(logging.getLogger("billhook").warning)(
                f"WeightPruning: {len(adapted)} of the pruned linear layers have adapters. Merging, as in Export, drops the "
                "effect of adapters at pruned weights. Use mask_adapters=True to restrict LoRA to unpruned weights."
            )
        if self._steps:
            why = ", and mask_adapters=True masks LoRA in its shape at that step" if self.mask_adapters else None
            if self.pattern != "unstructured":
                why = f", and pattern={self.pattern!r} needs consecutive inputs"
            check_no_shape_changes(fit, self, min(self._steps), sys.maxsize, "made masks", lambda _: why)

    def follow(self) -> None:
        """Adapts masks to the model's new shape."""
        self._hold.follow()

    def begin_training(self, fit: Fit) -> None:
        """Enforces a checkpoint's masks and applies events due before the first step."""
        averaged = [find_transformer(copy) for _, copy in fit.averages if copy is not None]
        self._hold.attach(fit.model, fit.optimizers, averaged, self._adapted)
        super().begin_training(fit)

    def end_training(self, fit: Fit) -> None:
        """Applies masks to weights that other callbacks have replaced."""
        self._hold.apply()
        super().end_training(fit)

    def before_evaluation(self, fit: Fit) -> None:
        """Masks LoRA at zero weights in validation, testing, and prediction without training."""
        if self.mask_adapters:
            mask_nonzero(fit.model)

    def apply_event(self, fit: Fit, step: int) -> None:
        """Prunes to the target sparsity of a round and logs the event."""
        model, metrics = fit.model, self.validate(fit)
        with fail_together(fit, "WeightPruning"):
            pruning = self._plan(fit, self._steps[step])
            check_identical(fit, "WeightPruning", "the masks", pruning.decided)
        event = self.run_change(fit, metrics, partial(self._apply, model, pruning, step))
        event["after"] |= {"sparsity": pruning.sparsity} | self.validate(fit)
        log_event(fit, event)

    def _apply(self, model: nn.Module, pruning: WeightPlan, step: int, _: list[Optimizer]) -> str:
        self._hold.hold(pruning.masks(model), partial(pruning.apply, model))
        self.last_event_step, self.last_target = step, self._steps[step]
        amount = f"sparsity {pruning.sparsity:.4f} in {len(pruning.pruned)} linear layers"
        return f"{type(self.criterion).__name__}, {self.pattern}: {amount}"

    def metrics(self, model: nn.Module) -> dict[str, float | None]:
        """Returns the fraction of zeros, as in `WeightPlan.sparsity`."""
        subject = find_transformer(model)
        reshard(subject)
        with adapters_removed(subject):
            zeros, sizes = zeros_by_name(subject) or {}, dict(subject.named_parameters())
            num_zeros = total = 0
            for name in self._weights:
                if name in zeros:
                    num_zeros, total = num_zeros + zeros[name], total + sizes[name].numel()
        return {"sparsity": num_zeros / total} if total else {}

    def label(self, event: Event) -> str:
        """Returns the criterion, and the pattern or the target sparsity."""
        amount = f"{100 * self.last_target:.3g}%" if self.pattern == "unstructured" else self.pattern
        return f"{type(self.criterion).__name__} {amount}"

    def _plan(self, fit: Fit, sparsity: float) -> WeightPlan:
        """Returns the masks for a sparsity; gathers blocks of a sharded model in turn."""
        model = fit.model
        precision = fit.forward_context() if self.needs_data else nullcontext()
        # pruned blocks compute as they will once LoRA is masked
        masked = masked_by_zeros(model, self._adapted) if self._adapted else nullcontext()
        with self.calibration.undisturbed(fit), precision, blockwise(fit.module), masked:
            return prune(
                model,
                self.criterion,
                fit.runs(model, self.calibration.read(fit)) if self.needs_data else None,
                sparsity,
                self.pattern,
                options=self.options,
                reduce=comm_of(fit),
                dry_run=True,
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns events and masks."""
        return super().state_dict() | {"masks": self._hold.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores events and masks."""
        super().load_state_dict(state_dict)
        self._hold.load_state_dict(state_dict["masks"])

    def release(self, fit: Fit, completed: bool) -> None:
        """Applies masks once more and removes all hooks."""
        self._hold.detach()
