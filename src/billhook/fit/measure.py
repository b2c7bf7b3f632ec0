"""Runs the module's validation between training steps, and logs results."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torchmetrics import Metric

from billhook.engine.state import overridden
from billhook.fit.fit import Fit
from billhook.fit.lightning_internals import is_sequential, logged_step, to_device, validation_loaders
from billhook.fit.ranks import check_identical, fail_together
from billhook.fit.run import isolated_rng
from billhook.fit.training_step import bind_arguments
from billhook.linalg import widest_float


def measure(fit: Fit, trainer: pl.Trainer, pl_module: pl.LightningModule, limit: int | None = None) -> dict[str, float]:
    """Runs `validation_step` over the validation batches and returns averaged metrics.

    Loops, loggers, checkpoints, random state, and modes are restored.

    Args:
        fit: The training run.
        trainer: Its trainer, during training. Without validation, the result is empty.
        pl_module: The module in training.
        limit: Maximum number of batches per loader. Defaults to the Trainer's limit; 0 disables validation.
    """
    if limit == 0:
        return {}
    logged = _Logged()
    with fail_together(fit, "validation"), _validating(trainer, pl_module, logged):
        if (batches := validation_loaders(trainer)) is None:
            return {}
        most = [count if limit is None else min(count, limit) for count in trainer.num_val_batches]
        several = len(most) > 1 and is_sequential(batches)
        limits, batches.limits = batches.limits, most  # Lightning validates with the same loader
        try:
            pl_module.on_validation_start()
            pl_module.on_validation_epoch_start()
            for batch, index, loader in batches:
                logged.batch, logged.suffix = batch, f"/dataloader_idx_{loader}" if several else ""
                moved = to_device(trainer, batch, loader if several else 0)
                with trainer.precision_plugin.val_step_context():
                    bind_arguments(pl_module.validation_step, moved, index, *[loader] * several)()
            logged.batch, logged.suffix = None, ""
            pl_module.on_validation_epoch_end()
            pl_module.on_validation_end()
        finally:
            batches.limits = limits
        return logged.values(fit)


class _Logged:
    """Replacement for `LightningModule.log`: averages values by batch size, as Lightning does."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # weighted sum, sum of weights, smallest, largest, plain sum
        self.how: dict[str, str] = {}
        self.metrics: dict[str, Metric] = {}
        self.batch: Any = None
        self.suffix = ""

    def __call__(
        self,
        name: str,
        value: Any,  # noqa: ANN401
        *_: object,
        batch_size: int | None = None,
        reduce_fx: Any = "mean",  # noqa: ANN401
        add_dataloader_idx: bool = True,
        **__: object,
    ) -> None:
        name += self.suffix if add_dataloader_idx else ""
        if isinstance(value, Metric):
            self.metrics[name] = value
            return
        self.how[name] = getattr(reduce_fx, "__name__", str(reduce_fx))
        number = float(value)
        weight = float(batch_size or (1 if self.batch is None else extract_batch_size(self.batch)))
        # on the CPU, because some devices have no float64
        new = torch.tensor([number * weight, weight, number, number, number], dtype=torch.float64)
        old = self.sums.get(name, torch.tensor([0, 0, math.inf, -math.inf, 0], dtype=torch.float64))
        self.sums[name] = torch.stack([old[0] + new[0], old[1] + new[1], old[2].min(new[2]), old[3].max(new[3]), old[4] + number])

    def values(self, fit: Fit) -> dict[str, float]:
        """Returns values reduced over all batches and devices, and computed metrics."""
        values = {}
        names = [*self.how.items(), *self.metrics]
        check_identical(fit, "validation", "the logged metrics (none if a rank has no batches)", names)
        if self.sums:
            device = fit.device
            packed = torch.stack(list(self.sums.values())).to(device, widest_float(device))
            # collectives reduce in place and need contiguous memory
            least, most, summed = packed[:, 2].clone(), packed[:, 3].clone(), packed[:, [0, 1, 4]].clone()
            reduced = fit.reduce(summed)
            least, most = fit.reduce(least, "min"), fit.reduce(most, "max")
            for i, (name, how) in enumerate(self.how.items()):
                mean = reduced[i, 0] / reduced[i, 1]
                kinds = {"min": least[i], "max": most[i], "sum": reduced[i, 2]}
                values[name] = float(kinds.get(how, mean))
        for name, metric in self.metrics.items():
            values[name] = float(metric.compute())
        return values


@contextmanager
def _validating(trainer: pl.Trainer, pl_module: pl.LightningModule, logged: _Logged) -> Iterator[None]:
    stage, modes = trainer.state.stage, {name: m.training for name, m in pl_module.named_modules()}
    trainer.state.stage = RunningStage.VALIDATING  # modules and loaders read it
    pl_module.eval()
    try:
        with overridden(pl_module, log=logged), torch.no_grad(), isolated_rng():
            yield
    finally:
        for metric in logged.metrics.values():
            metric.reset()
        for name, module in pl_module.named_modules():
            module.training = modes[name]
        trainer.state.stage = stage


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float | None]) -> None:
    """Logs metrics and the epoch to every logger, as Lightning does.

    The step is Lightning's own, so that steps increase in each logger: after six optimizer steps it is 5, as for the sixth
    training step and a validation after it.
    """
    numbers = {name: float(value) for name, value in metrics.items() if value is not None}
    for logger in trainer.loggers if numbers else ():
        logger.log_metrics(numbers | {"epoch": trainer.current_epoch}, step=logged_step(trainer))
