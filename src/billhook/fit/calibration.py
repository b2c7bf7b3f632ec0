"""Batches for scores and statistics in a fit, read and run without leaving a trace in the training."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from billhook.arguments import whole
from billhook.fit.examples import check_readable, training_examples
from billhook.fit.lightning_internals import to_device
from billhook.fit.run import isolated
from billhook.fit.training_step import runs_as_in_training, training_loss
from billhook.running.batches import Run
from billhook.running.overridden import overridden

Pair = tuple[Any, Callable[[nn.Module, Any], Tensor]]
"""A batch, and the loss as a function of the model and the batch."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches from which a callback takes scores and statistics: given ones, or examples drawn from the training data.

    Args:
        batches: Batches as `training_step` takes them, which can be read again and again, such as a list or a DataLoader; by
            default examples are drawn from the training data.
        examples: How many training examples are drawn, on all devices together; the papers take 128.
        seed: The seed that decides which ones.

    Raises:
        ValueError: If there is less than one example, or batches can be read only once.

    >>> Calibration(examples=64)
    Calibration(batches=None, examples=64, seed=0)
    """

    batches: Iterable[Any] | None = None
    examples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        whole("examples", self.examples)
        if isinstance(self.batches, Iterator):
            raise ValueError(f"calibration={type(self.batches).__name__} can be read only once: give a list or a DataLoader")

    @classmethod
    def of(cls, given: "Calibration | Iterable[Any] | int | None", examples: int = 128) -> "Calibration":
        """Returns a calibration as it is, or one of the given batches, or of as many training examples."""
        if isinstance(given, Calibration):
            return given
        return cls(examples=given) if isinstance(given, int) else cls(given, examples)

    def check(self, trainer: pl.Trainer) -> None:
        """Refuses training data that can be read only once, which it would use up."""
        if self.batches is None:
            check_readable(trainer)

    def read(self, trainer: pl.Trainer) -> Iterator[Any]:
        """Yields this rank's batches, on its device."""
        if self.batches is None:
            batches: Iterable[Any] = training_examples(trainer, self.examples)
        else:
            batches = islice(self.batches, trainer.global_rank, None, trainer.world_size)
        return (to_device(trainer, batch) for batch in batches)

    def pairs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[Pair]:
        """Yields this rank's batches, each with its training loss."""
        return ((batch, training_loss(pl_module, number)) for number, batch in enumerate(self.read(trainer)))

    def runs(self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module) -> list[Run]:
        """Returns a run of the model for each of this rank's batches."""
        return runs_as_in_training(pl_module, model, self.read(trainer))

    @contextmanager
    def aside(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Leaves no trace of the work within: random numbers are the seed's, and restored; nothing is logged."""
        trained = {parameter: parameter.requires_grad for parameter in pl_module.parameters()}
        try:
            with overridden(pl_module, log=_log_nothing), isolated(), torch.no_grad():
                torch.manual_seed(self.seed)
                random.seed(self.seed)
                np.random.seed(self.seed % 2**32)
                yield
        finally:
            for parameter, requires_grad in trained.items():
                parameter.requires_grad = requires_grad


Given = Calibration | Iterable[Any] | int | None
"""Batches, or how many training examples, or both and a seed as a `Calibration`."""


def _log_nothing(*_: object, **__: object) -> None:
    pass


def gradient_precision(trainer: pl.Trainer) -> AbstractContextManager[object]:
    """Returns the precision of the fit for unscaled gradients: where float16 would lose them, bfloat16 or float32."""
    plugin = trainer.precision_plugin
    if not isinstance(plugin, MixedPrecision) or plugin.precision != "16-mixed":
        return plugin.forward_context()
    able = trainer.strategy.root_device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(plugin.device, torch.bfloat16) if able else nullcontext()
