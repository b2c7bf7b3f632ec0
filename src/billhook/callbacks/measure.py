"""What the user's own validation says of the model as it is now, between two training steps."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric


def measure(trainer: pl.Trainer, pl_module: pl.LightningModule, limit: int | None = None) -> dict[str, float]:
    """Runs the module's `validation_step` over the validation batches and returns what it logs, averaged.

    Loops, loggers, checkpoints, random numbers and train or eval mode are as before afterwards.

    Args:
        trainer: The trainer, in the middle of a fit.
        pl_module: The module in training.
        limit: At most so many batches of each loader; by default as many as validation takes.

    Returns:
        Values by name; empty where the run has no validation.
    """
    loaders = trainer.val_dataloaders
    if loaders is None:
        return {}
    loaders = list(loaders.values()) if isinstance(loaders, dict) else loaders
    loaders = list(loaders) if isinstance(loaders, list | tuple) else [loaders]
    logged = _Logged()
    with _validating(trainer, pl_module, logged):
        pl_module.on_validation_epoch_start()
        for index, loader in enumerate(loaders):
            most = min(trainer.num_val_batches[index], float("inf") if limit is None else limit)
            for batch_index, batch in enumerate(islice(loader, None if most == float("inf") else int(most))):
                _validation_step(trainer, pl_module, batch, batch_index, index)
        pl_module.on_validation_epoch_end()
        return logged.means(trainer)


class _Logged:
    """Stands in for `LightningModule.log`: sums what is logged, weighted by batch size."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        self.metrics: dict[str, Metric] = {}

    def __call__(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:  # noqa: ANN401
        if isinstance(value, Metric):
            self.metrics[name] = value
            return
        weight = float(batch_size or 1)
        total, weights = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + weight * float(value), weights + weight)

    def means(self, trainer: pl.Trainer) -> dict[str, float]:
        """The mean of each value over all batches and devices; what metrics compute, and then are reset."""
        if not self.sums and not self.metrics:
            return {}
        packed = torch.tensor(list(self.sums.values()), dtype=torch.float64, device=trainer.strategy.root_device)
        summed = trainer.strategy.reduce(packed, reduce_op="sum")
        assert isinstance(summed, Tensor)
        values = {name: float(total / weight) for name, (total, weight) in zip(self.sums, summed.tolist(), strict=True)}
        for name, metric in self.metrics.items():
            values[name] = float(metric.compute())
            metric.reset()
        return values


@contextmanager
def _validating(trainer: pl.Trainer, pl_module: pl.LightningModule, logged: _Logged) -> Iterator[None]:
    stage, modes = trainer.state.stage, {name: m.training for name, m in pl_module.named_modules()}
    trainer.state.stage = RunningStage.VALIDATING
    pl_module.eval()
    pl_module.__dict__["log"] = logged
    try:
        with torch.no_grad(), isolate_rng():
            yield
    finally:
        del pl_module.__dict__["log"]
        for name, module in pl_module.named_modules():
            module.training = modes[name]
        trainer.state.stage = stage


def _validation_step(trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int, loader: int) -> None:  # noqa: ANN401
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=loader)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=loader)
    arguments = (batch, index, loader)[: len(inspect.signature(pl_module.validation_step).parameters)]
    with trainer.precision_plugin.val_step_context():
        pl_module.validation_step(*arguments)
