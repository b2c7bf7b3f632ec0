"""The Uptraining callback: sets the training length to a fraction of pretraining."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from billhook.arguments import check_fraction, check_types
from billhook.engine.trees import tree_leaves
from billhook.fit.event import LengthSetter
from billhook.fit.fit import Fit
from billhook.fit.ranks import fail_together, sum_over_ranks
from billhook.fit.run import isolated_rng


class Uptraining(LengthSetter):
    """Ends training after a fraction alpha of the pretraining steps.

    The length is set before the optimizer and the learning-rate schedule are created, and replaces the Trainer's `max_steps`.
    Fractions of training in other callbacks (`at: 0.1`) refer to it. Also set `Trainer(max_epochs=-1)`; otherwise Lightning warns
    about its default of 1000 epochs.

        steps = ceil(alpha * pretraining_steps), or ceil(alpha * pretraining_tokens / tokens per optimizer step)

    The tokens per optimizer step are the non-padding `input_ids` of the first training batch on every device, times the
    accumulated batches. This is exact for packed text of equal length, and an estimate for padded examples.

    Reference: Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints (2023),
    section 2.2, https://arxiv.org/abs/2305.13245

    Args:
        alpha: Fraction of pretraining, in (0, 1]. Defaults to 0.05, as in the paper.
        pretraining_steps: Optimizer steps of pretraining, with as many tokens per step as here. Alternative to
            `pretraining_tokens`.
        pretraining_tokens: Tokens of pretraining, such as 2e12. Alternative to `pretraining_steps`.

    Raises:
        ValueError: If a number is out of range, or not exactly one budget is set. When training starts, if the Trainer sets
            another length, tokens cannot be counted, or a resumed run had another length.

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
            raise ValueError(f"Pass either pretraining_steps or pretraining_tokens, got {budget or 'neither'}.")
        for name, value in budget.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < math.inf or value % 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        self.alpha, self.pretraining_steps, self.pretraining_tokens = alpha, pretraining_steps, pretraining_tokens
        self.steps: int | None = None

    def prepare(self, fit: Fit) -> None:
        """Sets the training length."""
        self.set_length(fit)

    def set_length(self, fit: Fit) -> None:
        """Sets the training length; called earlier if callbacks need it to prepare."""
        if not fit.is_trial:
            self.steps = fit.set_length("Uptraining", partial(self._length, fit))

    def _length(self, fit: Fit) -> int:
        """Returns the number of optimizer steps."""
        alpha = Fraction(str(self.alpha))  # the float 0.07 is slightly larger than 0.07
        if self.pretraining_tokens is None:
            assert self.pretraining_steps is not None
            return math.ceil(alpha * int(self.pretraining_steps))
        with fail_together(fit, "Uptraining"):
            return math.ceil(alpha * int(self.pretraining_tokens) / _tokens_per_step(fit))

    def state_dict(self) -> dict[str, Any]:
        """Returns the training length."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises `ValueError` if the resumed run had another length."""
        then = state_dict["steps"]
        if None not in (then, self.steps) and then != self.steps:
            raise ValueError(
                f"Uptraining: the checkpoint's run has {then} steps, and this run {self.steps}. Use the same alpha, pretraining "
                "budget, and tokens per step."
            )


def _tokens_per_step(fit: Fit) -> int:
    """Counts the tokens of the first batch on all devices, times the accumulated batches."""
    hint = "Use pretraining_steps."
    if (batches := fit.batches_per_step) is None:
        raise ValueError(f"pretraining_tokens needs a fixed number of batches per optimizer step, known before training. {hint}")
    count = 0
    for loader in tree_leaves(fit.train_data):
        if isinstance(loader.dataset if isinstance(loader, DataLoader) else loader, Iterator):
            raise ValueError(f"pretraining_tokens cannot count a batch of training data that can be read only once. {hint}")
        with _untouched(loader):
            batch = next(iter(loader), None)
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            raise ValueError(f"pretraining_tokens: the training batches have no 'input_ids' to count. {hint}")
        mask = batch.get("attention_mask")
        count += int((mask != 0).sum()) if isinstance(mask, Tensor) else batch["input_ids"].numel()
    return int(sum_over_ranks(fit, torch.tensor(count))) * batches


@contextmanager
def _untouched(loader: object) -> Iterator[None]:
    """Restores random state afterward, including the loader's."""
    generators = [getattr(owner, "generator", None) for owner in (loader, getattr(loader, "sampler", None))]
    states = [(generator, generator.get_state()) for generator in generators if isinstance(generator, torch.Generator)]
    with isolated_rng():
        yield
    for generator, state in states:
        generator.set_state(state)
