"""Learns masks in a fit: they are chosen again after each step, and fixed at a given one."""

from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from billhook.arguments import check_number, check_types
from billhook.callbacks.weight_pruning import WeightPruning
from billhook.fit.calibration import CalibrationLike
from billhook.fit.event import Event
from billhook.fit.ranks import check_identical, comm_of, fail_together
from billhook.fit.run import At, check_learning_strategy, is_dev_run, resolve_at
from billhook.fit.shape_event import ShapeCallback
from billhook.model.find import find_transformer
from billhook.schedules import Step, check_step
from billhook.sparsity.criteria import Criterion, Wanda
from billhook.sparsity.learned_masks import LearnedMasks, MaskRule, find_mask_rules
from billhook.sparsity.masks import sparsity_of
from billhook.sparsity.options import PruneOptions


class SRSTE(WeightPruning):
    """Chooses masks again after each step of an optimizer, while all weights learn, and fixes them at `end` (SR-STE).

    Runs see what is kept, m * W. The gradient of that reaches all of W, as if the mask were not there (straight through), so
    that a weight which is left out can come back; what is left out is drawn to zero besides: g(m * W) + decay (1 - m) * W is
    what the optimizer takes for the gradient. At `end`, or at the end of training if that comes first, what is left out becomes
    zero, and is held there. Validation sees weights so from the beginning, and checkpoints hold all of them until then.

    From "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", Zhou et al., ICLR 2021,
    https://arxiv.org/abs/2102.04010, where scores are magnitudes. Here they are a criterion's: with `Wanda` by the norms that
    inputs had at the first step, and by the weights as they are now.

    Args:
        criterion: How important a weight is: one that compares weights of a linear and leaves those that are kept as they are;
            by default `Wanda`.
        sparsity: Fraction of each linear's weights that become zero, in [0, 1); None with N:M.
        pattern: `"unstructured"`, or `"N:M"`: N are kept of every M consecutive inputs.
        at: When it begins: a step (int), a fraction of training (float in 0..1), or `"start"`.
        end: When masks are fixed: a step (int), or a fraction of training (float in 0..1).
        decay: lambda_W, the paper's, at least 0.
        calibration: Batches that the criterion sees, text as a `Calibration`, or a number of training
            examples, by default 128.
        options: Which linears are pruned and by what inputs, as in `prune`, without `match`.
        measure_batches: Validation batches to measure before and after each event; by default all of validation, 0 for none.

    Raises:
        ValueError: If an argument is not legal, or two contradict each other.

    >>> import billhook as bh
    >>> callback = bh.SRSTE(bh.Wanda(), sparsity=0.5, end=0.6)
    """

    def __init__(
        self,
        criterion: Criterion | None = None,
        sparsity: float | None = None,
        pattern: str = "unstructured",
        at: At = "start",
        end: Step = 0.6,
        decay: float = 2e-4,
        calibration: CalibrationLike = None,
        options: PruneOptions | None = None,
        measure_batches: int | None = None,
    ) -> None:
        check_types(SRSTE, locals())
        check_step(end, "end")
        check_number("decay", decay, least=0)
        self.end, self.decay, self._learned = end, decay, LearnedMasks(criterion or Wanda(), pattern)
        super().__init__(criterion, sparsity, pattern, at, calibration, options, measure_batches=measure_batches)
        if self.options.match is not None:
            raise ValueError(f"match={self.options.match} tunes what is kept at once, and masks are learned: leave it out")
        if self.criterion.compares == "global" or self.criterion.updates:
            what = "changes kept weights" if self.criterion.updates else "compares all layers"
            raise ValueError(f"criterion={self.criterion} {what}; masks are learned by scores of one linear, such as Wanda's")

    def reset(self) -> None:
        """Forgets all events and masks."""
        super().reset()
        self._learned.clear()

    @property
    def masks(self) -> dict[str, Tensor]:
        """The keep-masks that are learned, or held once they are fixed: bool, by linear."""
        return dict(self._learned.masks) or super().masks

    def check_trainer(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses strategies under which weights cannot be masked, or masks not learned."""
        super().check_trainer(trainer, pl_module)
        check_learning_strategy(trainer, type(self).__name__)

    def steps(self, total: int | None, trainer: pl.Trainer) -> dict[int, float]:
        """Returns the step at which masks are learned from, when nothing is zero yet, and that at which they are fixed."""
        ((begin, sparsity),) = super().steps(total, trainer).items()
        end = resolve_at(self.end, total, is_dev_run(trainer), "end")
        if end <= begin and not is_dev_run(trainer):
            raise ValueError(f"end={self.end} is step {end}: masks are learned from step {begin} on, so it must be later")
        return {begin: 0.0, max(begin + 1, end): sparsity}

    def check_linears(self, linears: dict[str, nn.Module]) -> None:
        """Refuses linears of which no weight is trained."""
        if not any(linear.get_parameter("weight").requires_grad for linear in linears.values()):
            raise ValueError("SRSTE: none of the linears' weights are trained, as beneath adapters: take WeightPruning")

    def _cannot_follow(self, callback: ShapeCallback) -> str | None:
        return ", and masks are learned by the inputs that linears had"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on with the masks of a checkpoint, and carries out what is due before the first step."""
        self._learned.attach(find_transformer(pl_module), trainer.optimizers)
        super().on_train_start(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Has the optimizer draw to zero what is left out while masks are learned."""
        self._learned.decay(optimizer, self.decay)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Zeroes what is left out where training ends while masks are learned."""
        if self._learned.masks:
            self._fix(trainer, pl_module, {})
        super().on_train_end(trainer, pl_module)

    def event_at(self, trainer: pl.Trainer, pl_module: pl.LightningModule, metrics: dict[str, float], step: int) -> Event:
        """Begins to learn masks, or fixes them."""
        if step < max(self._steps):
            return self._begin(trainer, pl_module, metrics, step)
        return self._fix(trainer, pl_module, metrics)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, metrics: dict[str, float], step: int) -> Event:
        with fail_together(trainer, "SRSTE"):
            chosen = self._choose(trainer, pl_module, self._steps[max(self._steps)])
            check_identical(trainer, "SRSTE", "what masks follow from", {name: scorer.state() for name, scorer in chosen.items()})
            return self.record_event(trainer, find_transformer(pl_module), metrics, partial(self._learn, chosen, step))

    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule, sparsity: float) -> dict[str, MaskRule]:
        model = find_transformer(pl_module)
        with self._runs(trainer, pl_module) as runs:
            return find_mask_rules(model, self.criterion, runs, sparsity, self.pattern, self.options, comm_of(trainer))

    def _learn(self, chosen: dict[str, MaskRule], step: int) -> str:
        self._learned.begin(chosen)
        self.last_event_step, self.last_target = step, self._steps[step]
        sparsity, end = sparsity_of(self._learned.masks.values()), max(self._steps)
        return f"{self._how} masks of sparsity {sparsity:.4f} in {len(chosen)} linears are learned until step {end}"

    def _fix(self, trainer: pl.Trainer, pl_module: pl.LightningModule, metrics: dict[str, float]) -> Event:
        with fail_together(trainer, "SRSTE"):
            masks = self._learned.masks
            check_identical(trainer, "SRSTE", "the weights that become zero", masks)
            event = self.record_event(trainer, find_transformer(pl_module), metrics, partial(self._hold_learned, masks))
        event["after"]["sparsity"] = sparsity_of(masks.values())
        return event

    def _hold_learned(self, masks: dict[str, Tensor]) -> str:
        self._hold.hold(masks)
        self._learned.clear()
        self.last_event_step = max(self._steps)
        self.last_target = self._steps[self.last_event_step]
        return f"{self._how} sparsity {sparsity_of(masks.values()):.4f} in {len(masks)} linears, learned"

    def label(self, event: Event) -> str:
        """Returns the criterion, and the pattern or the sparsity that was asked for."""
        return f"{type(self.criterion).__name__}, masks are learned" if self._learned.masks else super().label(event)

    def state_dict(self) -> dict[str, Any]:
        """Returns what has happened so far, and the masks, or what those that are learned follow from."""
        return super().state_dict() | ({"learned": self._learned.state_dict()} if self._learned.masks else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what had happened."""
        super().load_state_dict(state_dict)
        self._learned.load_state_dict(state_dict.get("learned", {}))

    def release_masks(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Masks weights that other callbacks may have replaced, and removes all hooks."""
        self._learned.detach()
        super().release_masks(trainer, pl_module)
