"""The SRSTE callback: learns masks during training and fixes them at a given step."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from billhook.arguments import check_types
from billhook.callbacks.weight_pruning import WeightPruning
from billhook.fit.calibration import CalibrationLike
from billhook.fit.event import Event
from billhook.fit.fit import Fit
from billhook.fit.ranks import check_identical, comm_of, fail_together
from billhook.fit.shape_event import ShapeCallback
from billhook.fit.targets import At, resolve_at
from billhook.schedules import Step, check_step
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.learned_masks import LearnedMasks, MaskRule, find_mask_rules
from billhook.sparsity.masks import sparsity_of
from billhook.sparsity.options import PruneOptions


class SRSTE(WeightPruning):
    """Learns masks while all weights train, and fixes them at a given step (SR-STE).

    Masks are chosen again after each optimizer step. The forward pass uses m * W, and the gradient passes straight through to
    all of W, so a masked weight can return. Masked weights also decay: the optimizer receives g(m * W) + decay (1 - m) * W, where
    the attribute `decay` is the paper's lambda_W (2e-4). At `end`, or at the end of training, masked weights become zero and stay
    zero. Until then, validation uses masked weights and checkpoints hold all weights.

    Reference: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch (ICLR 2021),
    https://arxiv.org/abs/2102.04010. The paper scores by magnitude; here any criterion does, such as `Wanda` with the input norms
    at the first step.

    Args:
        criterion: Scores the weights within one linear layer, without updating kept weights. Defaults to `Wanda()`.
        sparsity: Fraction of each linear layer's weights to zero, in [0, 1). None with an N:M pattern.
        pattern: `"unstructured"`, or `"N:M"` to keep N of every M consecutive inputs.
        at: When to start learning masks: a step (int), a fraction of training (float), or `"start"`.
        end: When to fix masks: a step (int) or a fraction of training (float). Defaults to 0.6.
        calibration: Calibration data: batches, a `Calibration`, or a number of training examples. Defaults to 128 examples.
        options: Layers to prune and inputs to score them on, as in `prune`, without `match`. Defaults to `PruneOptions()`.
        measure_batches: Validation batches to run before and after each event. Defaults to all; 0 disables it.

    Raises:
        ValueError: If an argument is not legal, or two arguments contradict each other.

    >>> import billhook as bh
    >>> callback = bh.SRSTE(bh.Wanda(), sparsity=0.5, end=0.6)
    """

    decay = 2e-4  # the paper's lambda_W

    def __init__(
        self,
        criterion: Criterion | None = None,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        at: At = "start",
        end: Step = 0.6,
        calibration: CalibrationLike = None,
        options: PruneOptions | None = None,
        measure_batches: int | None = None,
    ) -> None:
        check_types(SRSTE, locals())
        check_step(end, "end")
        self.end, self._learned = end, LearnedMasks(criterion or Wanda(), pattern)
        super().__init__(criterion, sparsity, pattern, at, calibration, options, measure_batches=measure_batches)
        if self.options.match is not None:
            raise ValueError(
                f"match={self.options.match} cannot be combined with learned masks, because it tunes fixed masks. "
                "Use match=None, or WeightPruning."
            )
        if self.criterion.compares == "global" or self.criterion.updates:
            reason = "updates kept weights" if self.criterion.updates else "compares weights of all layers"
            raise ValueError(
                f"criterion={self.criterion} {reason}. Learned masks need scores within one linear layer: use Wanda or Magnitude."
            )

    def reset(self) -> None:
        """Forgets all events and masks."""
        super().reset()
        self._learned.clear()

    @property
    def masks(self) -> dict[str, Tensor]:
        """The keep-masks (bool) by linear layer: learned until `end`, then fixed."""
        return dict(self._learned.masks) or super().masks

    def check_fit(self, fit: Fit) -> None:
        """Raises `ValueError` if the strategy does not support learned masks."""
        super().check_fit(fit)
        fit.check_learned_masks(type(self).__name__)

    def steps(self, total: int | None, fit: Fit) -> dict[int, float]:
        """Returns the first step of learning (sparsity 0) and the step at which masks are fixed."""
        ((begin, sparsity),) = super().steps(total, fit).items()
        end = resolve_at(self.end, total, fit.is_trial, "end")
        if end <= begin and not fit.is_trial:
            raise ValueError(f"end={self.end} is step {end}, but masks are learned from step {begin} on. Use a later end.")
        return {begin: 0.0, max(begin + 1, end): sparsity}

    def check_layers(self, layers: dict[str, nn.Module]) -> None:
        """Raises `ValueError` if none of the layers' weights are trained."""
        if not any(layer.get_parameter("weight").requires_grad for layer in layers.values()):
            raise ValueError(
                "SRSTE learns masks of trained weights, and all base weights are frozen, as under LoRA. Use WeightPruning."
            )

    def _cannot_follow(self, callback: ShapeCallback) -> str | None:
        return ", and learned masks use the layers' inputs at that step"

    def begin_training(self, fit: Fit) -> None:
        """Restores a checkpoint's masks and applies events due before the first step."""
        self._learned.attach(fit.model, fit.optimizers)
        super().begin_training(fit)

    def before_optimizer_step(self, fit: Fit, optimizer: Optimizer) -> None:
        """Adds the decay of masked weights to the gradients while masks are learned."""
        self._learned.decay(optimizer, self.decay)

    def end_training(self, fit: Fit) -> None:
        """Fixes masks that are still being learned."""
        if self._learned.masks:
            self._fix(fit, {})
        super().end_training(fit)

    def event_at(self, fit: Fit, metrics: dict[str, float], step: int) -> Event:
        """Starts to learn masks, or fixes them."""
        if step < max(self._steps):
            return self._begin(fit, metrics, step)
        return self._fix(fit, metrics)

    def _begin(self, fit: Fit, metrics: dict[str, float], step: int) -> Event:
        with fail_together(fit, "SRSTE"):
            chosen = self._choose(fit, self._steps[max(self._steps)])
            check_identical(fit, "SRSTE", "the scores of masks", {name: scorer.state() for name, scorer in chosen.items()})
            return self.record_event(fit, metrics, partial(self._learn, chosen, step))

    def _choose(self, fit: Fit, sparsity: float) -> dict[str, MaskRule]:
        model = fit.model
        with self._runs(fit) as runs:
            return find_mask_rules(model, self.criterion, runs, sparsity, self.pattern, self.options, comm_of(fit))

    def _learn(self, chosen: dict[str, MaskRule], step: int) -> str:
        self._learned.begin(chosen)
        self.last_event_step, self.last_target = step, self._steps[step]
        sparsity, end = sparsity_of(self._learned.masks.values()), max(self._steps)
        return f"{self._how} masks of sparsity {sparsity:.4f} in {len(chosen)} linear layers are learned until step {end}"

    def _fix(self, fit: Fit, metrics: dict[str, float]) -> Event:
        with fail_together(fit, "SRSTE"):
            masks = self._learned.masks
            check_identical(fit, "SRSTE", "the masks", masks)
            event = self.record_event(fit, metrics, partial(self._hold_learned, masks))
        event["after"]["sparsity"] = sparsity_of(masks.values())
        return event

    def _hold_learned(self, masks: dict[str, Tensor]) -> str:
        self._hold.hold(masks)
        self._learned.clear()
        self.last_event_step = max(self._steps)
        self.last_target = self._steps[self.last_event_step]
        return f"{self._how} sparsity {sparsity_of(masks.values()):.4f} in {len(masks)} linear layers, learned"

    def label(self, event: Event) -> str:
        """Returns the criterion, and the pattern or the target sparsity."""
        return f"{type(self.criterion).__name__}, learning masks" if self._learned.masks else super().label(event)

    def state_dict(self) -> dict[str, Any]:
        """Returns events, masks, and the state of learned masks."""
        return super().state_dict() | ({"learned": self._learned.state_dict()} if self._learned.masks else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores events and masks."""
        super().load_state_dict(state_dict)
        self._learned.load_state_dict(state_dict.get("learned", {}))

    def release(self, fit: Fit, completed: bool) -> None:
        """Applies masks once more and removes all hooks."""
        self._learned.detach()
        super().release(fit, completed)
