"""Ranks and removes whole blocks at a given step of a fit."""

from functools import partial

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from billhook.arguments import check_types
from billhook.fit.calibration import CalibrationLike, FitCalibration
from billhook.fit.event import Event
from billhook.fit.ranks import check_identical, comm_of
from billhook.fit.run import At, check_at, round_targets
from billhook.fit.shape_event import ShapeCallback
from billhook.importance.blocks import BlockInfluence
from billhook.importance.score import Importance, make_run
from billhook.model.find import find_transformer
from billhook.model.plan import apply_plan
from billhook.pruning.amount import Amount
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.planning import count_blocks, plan_amount
from billhook.schedules import Schedule
from billhook.units.find import find_units


class DepthPruning(ShapeCallback):
    """Removes the least important blocks at a given step of a fit; training then continues.

    This is ShortGPT (Men et al., 2024, https://arxiv.org/abs/2403.03853) in the middle of a fit. Scores are taken from
    training examples. Optimizer state follows, checkpoints carry which blocks there are, and a resumed run ends as the
    straight run does.

    Args:
        blocks: The number of blocks to remove (int), or the fraction of them (float in [0, 1), rounded down); of a model with an
            encoder and a decoder, from each.
        at: When: a step (int), a fraction of training (float in 0..1), or `"start"` (before the first step).
        importance: How much a block matters: any `Importance`; by default `BlockInfluence`, the paper's.
        greedy: True to remove one at a time and score the others again without it; as many times the work.
        first: So many first blocks are kept.
        last: So many last blocks are kept.
        calibration: Batches that scores are taken from, text as a `Calibration`, or a number of training
            examples, by default 128.
        measure_batches: Validation batches to measure before and after each event; by default all of validation, 0 for none.

    Raises:
        ValueError: If an argument is not legal, or so many blocks cannot be removed; before training.

    >>> import billhook as bh
    >>> callback = bh.DepthPruning(blocks=1, at=0.1)  # for Trainer(callbacks=[callback])
    """

    blockwise, cuts_tensors = True, False

    def __init__(
        self,
        blocks: int | float,
        at: At = "start",
        importance: Importance | None = None,
        greedy: bool = False,
        first: int = 0,
        last: int = 0,
        calibration: CalibrationLike = None,
        measure_batches: int | None = None,
    ) -> None:
        check_types(DepthPruning, locals())
        if isinstance(at, Schedule):
            raise ValueError(f"at={at}: blocks are removed in one event: give a step, a fraction of training or 'start'")
        check_at(at)
        self.blocks, self.first, self.last = blocks, first, last
        self.amount = Amount(blocks=blocks, first=first, last=last)
        self.importance, self.at, self.greedy = importance or BlockInfluence(), at, greedy
        self.plan: BlockPlan | None = None
        super().__init__(FitCalibration.of(calibration), measure_batches)

    @property
    def state_key(self) -> str:
        """The key of this callback's state in checkpoints."""
        return self._generate_state_key(importance=type(self.importance).__qualname__)

    @property
    def needs_data(self) -> bool:
        """True until blocks are removed."""
        return self.last_event_step < 0

    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Refuses a model that has no blocks."""
        find_units(model, "block")

    def steps(self, total: int | None, trainer: pl.Trainer) -> dict[int, float]:
        """Returns the step at which all of it happens."""
        return round_targets(1.0, self.at, total, trainer, "blocks")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the step, and refuses a model from which so many blocks cannot be removed."""
        super().on_fit_start(trainer, pl_module)
        if self.last_event_step < 0:
            count_blocks(pl_module, self.amount)

    def apply_event(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Removes the blocks, and measures before and after."""
        self.apply_change(trainer, pl_module, partial(self._remove, trainer, pl_module, step))

    def label(self, event: Event) -> str:
        """Returns how many blocks went."""
        assert self.plan is not None
        return f"depth, {self.plan.words}"

    def _remove(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int, optimizers: list[Optimizer]) -> str:
        """Ranks the blocks, removes the least important, and says how many there were and are."""
        self.plan = made = self._plan(trainer, pl_module)
        check_identical(trainer, "DepthPruning", "the blocks that are removed", made.units)
        apply_plan(pl_module, made, optimizers)
        self.last_event_step, self.last_target = step, 1.0
        before, after = (sum(count for (count,) in counts.values()) for counts in (made.before, made.after))
        removed = "; ".join(f"{', '.join(map(str, numbers))} of {name}" for name, numbers in made.units.items()) or "none"
        return f"{before} -> {after} blocks ({type(self.importance).__name__}): without {removed}"

    def _plan(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> BlockPlan:
        """Plans the removal of blocks, the same on every rank."""
        model = find_transformer(pl_module)
        stacks = find_units(model, "block")
        with self.calibration.undisturbed(pl_module), trainer.precision_plugin.forward_context():
            runs = [make_run(model, stacks, *pair) for pair in self.calibration.pairs(trainer, pl_module)]
            made = plan_amount(model, self.amount, self.importance, runs, greedy=self.greedy, comm=comm_of(trainer))
        assert isinstance(made, BlockPlan)
        return made
