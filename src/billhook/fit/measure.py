"""Metrics that the module's validation logs between training steps."""

import math
from collections.abc import Iterator
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
from billhook.fit.ranks import check_identical
from billhook.fit.run import isolated_rng
from billhook.linalg import widest_float


class LoggedMetrics:
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
        """Adds a value, weighted by the size of its batch."""
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
def validating(trainer: pl.Trainer, pl_module: pl.LightningModule, logged: LoggedMetrics) -> Iterator[None]:
    """Replaces `log` in the validation stage; restores stage, modes, and random state."""
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
