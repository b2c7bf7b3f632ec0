"""Sets the length of a fit as a fraction of the pretraining."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from billhook.arguments import check_fraction, check_types
from billhook.engine.trees import tree_leaves
from billhook.fit.event import LengthSetter
from billhook.fit.lightning_internals import set_length
from billhook.fit.ranks import fail_together, sum_over_ranks
from billhook.fit.run import callbacks_of, is_dev_run, isolated_rng

LIGHTNING_EPOCHS = 1000
"""Lightning's `max_epochs` where neither that nor `max_steps` is given."""


class Uptraining(LengthSetter):
    """Ends the fit after a fraction alpha of the steps that pretraining took.

    This is uptraining (GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints, Ainslie et al.,
    2023, https://arxiv.org/abs/2305.13245, section 2.2). The length is set before optimizer and learning-rate schedule are made,
    instead of the Trainer's `max_steps`; fractions of training in other callbacks (`at: 0.1`) are fractions of it. Give
    `Trainer(max_epochs=-1)` too: without it Lightning warns of 1000 epochs, which do not bound the fit either.

        steps = ceil(alpha * pretraining_steps), or ceil(alpha * pretraining_tokens / tokens of an optimizer step)

    The tokens of an optimizer step are those of the first training batch of every device (`input_ids`, without what
    `attention_mask` masks), times the batches that are accumulated. That is exact for text in blocks of equal length, and an
    estimate for examples that are padded.

    Args:
        alpha: The fraction, above 0 and at most 1; the paper's choice is 0.05.
        pretraining_steps: Optimizer steps of the pretraining, where a step of this fit has as many tokens.
        pretraining_tokens: Tokens of the pretraining, such as 2e12; one of the two is given.

    Raises:
        ValueError: If a number is out of range, or not one of the two is given; when the fit starts, if the Trainer has another
            `max_steps` or a `max_epochs`, tokens cannot be counted, or a resumed fit would be of another length than it was.

    >>> import billhook as bh
    >>> callback = bh.Uptraining(alpha=0.05, pretraining_tokens=2e12)  # for Trainer(max_epochs=-1, callbacks=[callback])
    """

    def __init__(
        self, alpha: float = 0.05, pretraining_steps: int | None = None, pretraining_tokens: int | float | None = None
    ) -> None:
        check_types(Uptraining, locals())
        check_fraction("alpha", alpha, "(0, 1]")
        budgets = {"pretraining_steps": pretraining_steps, "pretraining_tokens": pretraining_tokens}
        budget = {name: value for name, value in budgets.items() if value is not None}
        if len(budget) != 1:
            raise ValueError(f"one of pretraining_steps and pretraining_tokens must be given, got {budget or 'neither'}")
        for name, value in budget.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf or value % 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        self.alpha, self.pretraining_steps, self.pretraining_tokens = alpha, pretraining_steps, pretraining_tokens
        self.steps: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Sets the length of the fit."""
        if stage == "fit":
            self.set_length(trainer)

    def set_length(self, trainer: pl.Trainer) -> None:
        """Sets the length of the fit; a callback that needs it in its own `setup` may ask for it earlier."""
        if is_dev_run(trainer):
            return
        if trainer.max_epochs not in (None, -1, LIGHTNING_EPOCHS):
            raise ValueError(
                f"Uptraining sets the length of the fit, and the Trainer has max_epochs={trainer.max_epochs}: give -1"
            )
        self.steps = steps = self._length(trainer)
        if trainer.max_steps not in (-1, steps):
            raise ValueError(
                f"Uptraining sets the length of the fit to {steps} steps, and the Trainer has max_steps={trainer.max_steps}: "
                "leave max_steps out"
            )
        if trainer.max_steps == -1:
            rank_zero_info(f"billhook: uptraining takes {steps:,} steps, {self.alpha:g} of pretraining")
        set_length(trainer, steps)

    def _length(self, trainer: pl.Trainer) -> int:
        """Returns the optimizer steps of the fit."""
        alpha = Fraction(str(self.alpha))  # as a binary number 0.07 is a little more than that
        if self.pretraining_tokens is None:
            assert self.pretraining_steps is not None
            return math.ceil(alpha * int(self.pretraining_steps))
        with fail_together(trainer, "Uptraining"):
            return math.ceil(alpha * int(self.pretraining_tokens) / _tokens_per_step(trainer))

    def state_dict(self) -> dict[str, Any]:
        """Returns how many steps the fit takes."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses to continue with a fit of another length."""
        then = state_dict["steps"]
        if None not in (then, self.steps) and then != self.steps:
            raise ValueError(
                f"Uptraining: the fit of the checkpoint was to take {then} steps, and this one {self.steps}: alpha, the budget "
                "of pretraining and the tokens of a step must be as they were then"
            )


def _tokens_per_step(trainer: pl.Trainer) -> int:
    """Counts the tokens of the first batch on all devices, times the batches of an optimizer step."""
    hint = "give pretraining_steps"
    if not trainer.lightning_module.automatic_optimization or callbacks_of(trainer, GradientAccumulationScheduler):
        raise ValueError(f"pretraining_tokens: how many batches make an optimizer step is not known before training: {hint}")
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    count = 0
    for loader in tree_leaves(trainer.train_dataloader):
        if isinstance(loader.dataset if isinstance(loader, DataLoader) else loader, Iterator):
            raise ValueError(f"pretraining_tokens: the training data can be read only once, so no batch can be counted: {hint}")
        with _untouched(loader):
            batch = next(iter(loader), None)
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise ValueError(f"pretraining_tokens: the training batches have no 'input_ids' to count: {hint}")
        mask = batch.get("attention_mask")
        count += int((mask != 0).sum()) if isinstance(mask, Tensor) else batch["input_ids"].numel()
    return int(sum_over_ranks(trainer, torch.tensor(count))) * trainer.accumulate_grad_batches


@contextmanager
def _untouched(loader: object) -> Iterator[None]:
    """Restores random numbers afterwards, those of a loader too."""
    generators = [getattr(owner, "generator", None) for owner in (loader, getattr(loader, "sampler", None))]
    states = [(generator, generator.get_state()) for generator in generators if isinstance(generator, torch.Generator)]
    with isolated_rng():
        yield
    for generator, state in states:
        generator.set_state(state)
