"""Whole blocks are ranked and removed at a given step of a fit (ShortGPT, 2403.03853)."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from billhook.fit.event import At, ShapeCallback
from billhook.fit.examples import aside, check_readable, check_source, scoring_batches
from billhook.fit.ranks import SumOverRanks, check_agreed
from billhook.importance.blocks import By, block_trial, check_by, score_blocks, sizes_of
from billhook.model.find import find_transformer
from billhook.pruning.block_choice import Quota, choose_greedily, choose_lowest
from billhook.pruning.block_plan import BlockPlan, plan_blocks
from billhook.pruning.block_removal import apply_blocks
from billhook.running.undisturbed import resting
from billhook.units.blocks import find_blocks


class DepthPruning(ShapeCallback):
    """Removes the least important blocks at a given step of a fit; training then goes on (ShortGPT, 2403.03853).

    Scores are taken from training examples. Optimizer state follows, checkpoints carry which blocks are there, and a resumed run
    ends as the straight run does.

    Args:
        count: How many blocks go; of a model with an encoder and a decoder, of each.
        ratio: Instead of `count`, the fraction that goes, in [0, 1), rounded down.
        at: When: a step (int), a fraction of training (float in 0..1), or `"start"` (before the first step).
        by: How much a block matters: `"influence"` (1 - cosine of the hidden states before and after it, the paper's) or `"loss"`
            (the training loss when it is skipped; one forward a block).
        greedy: Whether one goes at a time, and the others are ranked again without it; `count` times the work.
        first: So many first blocks stay.
        last: So many last blocks stay.
        calibration: Batches that scores are taken from: what `training_step` takes, and can be read again and again. By default
            drawn from the training data.
        examples: How many training examples are drawn, on all devices together.
        seed: Which ones.
        measure_batches: Validation batches on which the model is measured before and after; by default as many as validation
            takes, 0 for none.

    Raises:
        ValueError: If an argument is not legal, or so many blocks cannot go; before training.
    """

    def __init__(
        self,
        count: int | None = None,
        ratio: float | None = None,
        at: At = "start",
        by: By = "influence",
        greedy: bool = False,
        first: int = 0,
        last: int = 0,
        calibration: Iterable[Any] | None = None,
        examples: int = 128,
        seed: int = 0,
        measure_batches: int | None = None,
    ) -> None:
        super().__init__([0 if at == "start" else at], measure_batches)
        check_by(by)
        check_source(examples, calibration)
        self.quota, self.by, self.greedy = Quota(count, ratio, first, last), by, greedy
        self.calibration, self.examples, self.seed = calibration, examples, seed
        self.plan: BlockPlan | None = None
        self._done = False

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep this callback's state."""
        return self._generate_state_key(by=self.by)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes checkpoints carry the shape, checks the model, and starts anew."""
        if stage == "fit" and trainer.global_step == 0:
            self._done = False
        super().setup(trainer, pl_module, stage)

    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Refuses a model that has no blocks."""
        find_blocks(model)

    def is_done(self, model: nn.Module, stage: int) -> bool:
        """Whether the blocks are gone, in this run or in the one that it goes on with."""
        return self._done

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the step, and refuses a model of which so many blocks cannot go."""
        super().on_fit_start(trainer, pl_module)
        if not self._done:
            self.quota.of(sizes_of(find_blocks(pl_module)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Carries out what is due before the first step (after a resume: what the checkpoint had not yet)."""
        if self.calibration is None and not self._done:
            check_readable(trainer)
        super().on_train_start(trainer, pl_module)

    def change(self, model: nn.Module, stage: int, optimizers: list[Optimizer]) -> str:
        """Ranks the blocks, removes the least important, and says how many there were and are."""
        assert isinstance(model, pl.LightningModule)
        self.plan = plan_blocks(model, self._choose(model.trainer, model), first=self.quota.first, last=self.quota.last)
        check_agreed(model.trainer, "DepthPruning", "the blocks that go", self.plan.blocks)
        apply_blocks(self.plan, model, optimizers)
        self._done = True
        before = sum(self.plan.before.values())
        return f"{before} -> {before - sum(map(len, self.plan.blocks.values()))} blocks ({self.by}): without {self._told()}"

    def _told(self) -> str:
        gone = self.plan.blocks if self.plan is not None else {}
        return "; ".join(f"{', '.join(map(str, own))} of {name}" for name, own in gone.items()) or "none"

    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, list[int]]:
        """The blocks that go, the same on every rank."""
        model = find_transformer(pl_module)
        stacks = find_blocks(model)
        reduce = None if trainer.world_size == 1 else SumOverRanks(trainer)
        with aside(pl_module, self.seed), resting(model), trainer.precision_plugin.forward_context():
            pairs = scoring_batches(trainer, pl_module, self.calibration, self.examples)
            trials = [block_trial(model, stacks, *pair) for pair in pairs]
            rank = partial(score_blocks, stacks, trials, self.by, reduce=reduce)
            return choose_greedily(rank, sizes_of(stacks), self.quota) if self.greedy else choose_lowest(rank({}), self.quota)

    def state_dict(self) -> dict[str, Any]:
        """What has happened so far; which blocks are there is in the LightningModule's part of the checkpoint."""
        return {"events": self.events, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what had happened."""
        self.events, self._done = state_dict["events"], state_dict["done"]
