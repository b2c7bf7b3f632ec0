"""The DepthPruning callback: removes whole blocks during training."""

from contextlib import nullcontext
from functools import partial

from torch.optim import Optimizer

from billhook.arguments import check_types
from billhook.callbacks.polishing import PolishingCallback
from billhook.engine import blockwise
from billhook.fit.calibration import CalibrationLike, FitCalibration
from billhook.fit.event import Event
from billhook.fit.fit import Fit
from billhook.fit.ranks import check_identical, comm_of
from billhook.fit.shape_event import ShapeCallback
from billhook.fit.targets import At, check_at
from billhook.importance.blocks import BlockInfluence
from billhook.importance.score import Importance, make_run
from billhook.model import apply_plan
from billhook.pruning.amount import Amount
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.planning import count_blocks, plan_amount
from billhook.pruning.repair import RepairOption
from billhook.repairs.polish import PolishConfig
from billhook.schedules import Schedule
from billhook.tracing.trace import trace
from billhook.units import find_units, units_of


class DepthPruning(PolishingCallback, ShapeCallback):
    """Removes the least important transformer blocks at a given step.

    Implements ShortGPT during training. Blocks are scored on calibration data. Optimizer state is remapped, checkpoints store
    the remaining blocks, and a resumed run ends like an uninterrupted run.

    Reference: Men et al., ShortGPT (2024), https://arxiv.org/abs/2403.03853

    Args:
        blocks: Number (int) or fraction (float in [0, 1), rounded down) of blocks to remove. In an encoder-decoder, from each of
            the two stacks.
        at: When to apply it: a step (int), a fraction of training (float), or `"start"` (before the first step).
        importance: Scores the blocks. Defaults to `BlockInfluence()`, as in the paper.
        greedy: If True, removes one block at a time and rescores the rest. Costs one scoring pass per removed block.
        first: Number of blocks to protect at the start of each stack.
        last: Number of blocks to protect at the end of each stack.
        repair: Least-squares repair of the output layers of blocks behind removed ones (see `RepairConfig`). `"auto"` uses
            `RepairConfig()` if there are enough examples. Defaults to None, which keeps the old weights, as in the paper.
        polish: Training toward the model before the event, on the calibration data (see `PolishConfig`). Defaults to None (off).
        calibration: Calibration data: batches, a `Calibration`, or a number of training examples. Defaults to 128 examples.
        measure_batches: Validation batches to run before and after each event. Defaults to all; 0 disables it.

    Raises:
        ValueError: If an argument is not legal. Before training, if the model has too few blocks.

    >>> import billhook as bh
    >>> callback = bh.DepthPruning(blocks=1, at=0.1)  # for Trainer(callbacks=[callback])
    """

    blockwise = True
    cuts_tensors = False

    def __init__(
        self,
        blocks: int | float,
        at: At = "start",
        importance: Importance | None = None,
        greedy: bool = False,
        first: int = 0,
        last: int = 0,
        repair: RepairOption = None,
        polish: PolishConfig | None = None,
        calibration: CalibrationLike = None,
        measure_batches: int | None = None,
    ) -> None:
        check_types(DepthPruning, locals())
        if isinstance(at, Schedule):
            raise ValueError(
                f"at={at}: DepthPruning removes all blocks in one event and does not support schedules. Use a step, a fraction "
                "of training, or 'start'."
            )
        check_at(at)
        self.blocks = blocks
        self.first = first
        self.last = last
        self.amount = Amount(blocks=blocks, first=first, last=last)
        self.importance = importance or BlockInfluence()
        self.at = at
        self.greedy = greedy
        self.repair = repair
        self.polish = polish
        self.plan: BlockPlan | None = None
        super().__init__(FitCalibration.of(calibration), measure_batches)

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints."""
        return self._generate_state_key(importance=type(self.importance).__qualname__)

    @property
    def needs_data(self) -> bool:
        """True: blocks are ranked on batches."""
        return True

    def check(self, fit: Fit) -> None:
        """Raises `ValueError` if the model has no blocks."""
        find_units(fit.module, "block")

    def resolve(self, fit: Fit) -> None:
        """Resolves the step and checks that the model has enough blocks."""
        super().resolve(fit)
        if self.last_event_step < 0:
            count_blocks(fit.module, self.amount)

    def apply_event(self, fit: Fit, step: int) -> None:
        """Removes the blocks and logs the event."""
        self.apply_change(fit, step, partial(self._remove, fit))

    def label(self, event: Event) -> str:
        """Returns the number of removed blocks."""
        assert self.plan is not None
        return f"depth, {self.plan.words}"

    def _remove(self, fit: Fit, optimizers: list[Optimizer]) -> str:
        """Ranks the blocks and removes the least important; returns a description."""
        model = fit.model
        units = find_units(fit.model, "block")
        if self.repair is not None:  # whose consumer layers need their non-padding tokens
            units |= units_of(model, trace(model), ["head", "channel"])
        with self.calibration.undisturbed(fit), fit.forward_context():
            runs = [make_run(model, units, *pair) for pair in self.calibration.pairs(fit)]
            plan = plan_amount(model, self.amount, self.importance, runs, greedy=self.greedy, comm=comm_of(fit))
            assert isinstance(plan, BlockPlan)
            check_identical(fit, "DepthPruning", "the blocks to remove", plan.units)
            with blockwise(fit.module) if self.repair is not None else nullcontext():
                weights, _, how = self.repaired(fit, plan, runs, self.repair)
        del runs  # frees the batches
        self.plan = plan
        apply_plan(fit.module, plan, optimizers, weights)
        before, after = (sum(count for (count,) in counts.values()) for counts in (plan.before, plan.after))
        removed = "; ".join(f"{', '.join(map(str, numbers))} of {name}" for name, numbers in plan.units.items()) or "none"
        return f"{before} -> {after} blocks ({type(self.importance).__name__}{how}): without {removed}"
