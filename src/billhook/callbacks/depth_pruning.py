"""Whole blocks are ranked and removed at a given step of a fit (ShortGPT, 2403.03853)."""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer

from billhook.fit.event import At, ShapeCallback
from billhook.fit.examples import aside, check_readable, check_source, scoring_batches
from billhook.fit.ranks import SumOverRanks, check_agreed
from billhook.importance.base import Importance
from billhook.importance.blocks import BlockInfluence
from billhook.importance.score import run_of
from billhook.model.find import find_transformer
from billhook.model.plan import apply
from billhook.pruning.amount import Amount
from billhook.pruning.block_plan import BlockPlan
from billhook.pruning.choice import choose_units
from billhook.pruning.planning import plan
from billhook.units.find import find_units


class DepthPruning(ShapeCallback):
    """Removes the least important blocks at a given step of a fit; training then goes on (ShortGPT, 2403.03853).

    Scores are taken from training examples. Optimizer state follows, checkpoints carry which blocks are there, and a resumed run
    ends as the straight run does.

    Args:
        count: How many blocks are removed; of a model with an encoder and a decoder, of each.
        ratio: Instead of `count`, the fraction that is removed, in [0, 1), rounded down.
        at: When: a step (int), a fraction of training (float in 0..1), or `"start"` (before the first step).
        importance: How much a block matters: `BlockInfluence` (the paper's; the default), or `Ablation` (the training loss when
            it is skipped; one forward a block).
        greedy: Whether one is removed at a time, and the others are scored again without it; as many times the work.
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
        importance: Importance | None = None,
        greedy: bool = False,
        first: int = 0,
        last: int = 0,
        calibration: Iterable[Any] | None = None,
        examples: int = 128,
        seed: int = 0,
        measure_batches: int | None = None,
    ) -> None:
        super().__init__([0 if at == "start" else at], measure_batches)
        check_source(examples, calibration)
        if (count is None) == (ratio is None):
            raise ValueError(f"count={count}, ratio={ratio}: give one of them")
        self.amount, self.greedy = Amount(blocks=ratio if count is None else count, first=first, last=last), greedy
        self.importance = importance or BlockInfluence()
        self.calibration, self.examples, self.seed = calibration, examples, seed
        self.plan: BlockPlan | None = None
        self._done = False

    @property
    def state_key(self) -> str:
        """Under which checkpoints keep this callback's state."""
        return self._generate_state_key(importance=type(self.importance).__qualname__)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes checkpoints carry the shape, checks the model, and starts anew."""
        if stage == "fit" and trainer.global_step == 0:
            self._done = False
        super().setup(trainer, pl_module, stage)

    def check(self, model: nn.Module, trainer: pl.Trainer) -> None:
        """Refuses a model that has no blocks."""
        find_units(model, "block")

    def is_done(self, model: nn.Module, stage: int) -> bool:
        """Whether the blocks are gone, in this run or in the one that it goes on with."""
        return self._done

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finds the step, and refuses a model of which so many blocks cannot go."""
        super().on_fit_start(trainer, pl_module)
        if not self._done:
            stacks = find_units(pl_module, "block")
            flat = {name: torch.zeros(one.count()) for name, one in stacks.items()}
            choose_units(stacks, flat, self.amount, self.amount.ratios)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Carries out what is due before the first step (after a resume: what the checkpoint had not yet)."""
        if self.calibration is None and not self._done:
            check_readable(trainer)
        super().on_train_start(trainer, pl_module)

    def change(self, model: nn.Module, stage: int, optimizers: list[Optimizer]) -> str:
        """Ranks the blocks, removes the least important, and says how many there were and are."""
        assert isinstance(model, pl.LightningModule)
        self.plan = self._planned(model.trainer, model)
        check_agreed(model.trainer, "DepthPruning", "the blocks that go", self.plan.units)
        apply(model, self.plan, optimizers)
        self._done = True
        before, after = (sum(count for (count,) in own.values()) for own in (self.plan.before, self.plan.after))
        return f"{before} -> {after} blocks ({type(self.importance).__name__}): without {self._told()}"

    def _told(self) -> str:
        gone = self.plan.units if self.plan is not None else {}
        return "; ".join(f"{', '.join(map(str, own))} of {name}" for name, own in gone.items()) or "none"

    def _planned(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> BlockPlan:
        """Plans which blocks are removed, the same ones on every rank."""
        model = find_transformer(pl_module)
        stacks = find_units(model, "block")
        reduce = None if trainer.world_size == 1 else SumOverRanks(trainer)
        with aside(pl_module, self.seed), trainer.precision_plugin.forward_context():
            pairs = scoring_batches(trainer, pl_module, self.calibration, self.examples)
            trials = [run_of(model, stacks, *pair) for pair in pairs]
            made = plan(model, self.importance, trials, amount=self.amount, greedy=self.greedy, reduce=reduce)
        assert isinstance(made, BlockPlan)
        return made

    def state_dict(self) -> dict[str, Any]:
        """What has happened so far; which blocks are there is in the LightningModule's part of the checkpoint."""
        return {"events": self.events, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what had happened."""
        self.events, self._done = state_dict["events"], state_dict["done"]
