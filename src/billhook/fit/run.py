"""Length, random state, model creation, and validation of a Lightning run."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel

from billhook.engine import TorchState, overridden, restored_modes
from billhook.fit.fit import Fit
from billhook.fit.ranks import check_identical
from billhook.linalg import widest_float


def training_steps(trainer: Trainer) -> int | None:
    """Returns the total number of optimizer steps; None if it is unknown."""
    if not trainer.lightning_module.automatic_optimization and trainer.max_epochs != -1:
        return None  # the module may take any number of steps per batch
    steps = trainer.estimated_stepping_batches
    return None if steps == float("inf") or steps < 0 else int(steps)


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restores random state afterward, also after an error, unlike Lightning's `isolate_rng`."""
    rng = isolate_rng()
    rng.__enter__()
    try:
        yield
    finally:
        rng.__exit__(None, None, None)  # without the exception, so that it restores


_WAITING = "_billhook_waiting"
_HOOK = "configure_model"


def once_model_exists(pl_module: LightningModule, step: Callable[[], None]) -> None:
    """Calls `step` now if the model exists, or else right after `configure_model`.

    That is after the module's `setup`, and before checkpoints are loaded, strategies wrap the model, and optimizers are created.
    """
    if any(isinstance(module, PreTrainedModel) for module in pl_module.modules()):
        step()
        return
    attributes = vars(pl_module)
    if _WAITING not in attributes:
        attributes[_WAITING] = []
        attributes[_HOOK] = partial(_configure, pl_module, pl_module.configure_model)
    attributes[_WAITING].append(step)


def drop_pending(pl_module: LightningModule) -> None:
    """Drops pending calls and restores the module's hook."""
    if vars(pl_module).pop(_WAITING, None) is not None:
        del vars(pl_module)[_HOOK]


def _configure(pl_module: LightningModule, configure: Callable[[], None]) -> None:
    configure()
    steps = vars(pl_module)[_WAITING]
    drop_pending(pl_module)
    before = TorchState.now()
    try:
        with torch.device("cpu"):  # undoes the default device and dtype that Lightning sets for new models
            TorchState(gradients=before.gradients, precision=before.precision, autocast=before.autocast).restore()
            for step in steps:
                step()
    finally:
        before.restore()


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
            least = packed[:, 2].clone()
            most = packed[:, 3].clone()
            reduced = fit.reduce(packed[:, [0, 1, 4]].clone())
            least = fit.reduce(least, "min")
            most = fit.reduce(most, "max")
            for i, (name, how) in enumerate(self.how.items()):
                mean = reduced[i, 0] / reduced[i, 1]
                kinds = {"min": least[i], "max": most[i], "sum": reduced[i, 2]}
                values[name] = float(kinds.get(how, mean))
        for name, metric in self.metrics.items():
            values[name] = float(metric.compute())
        return values


@contextmanager
def validating(trainer: Trainer, pl_module: LightningModule, logged: LoggedMetrics) -> Iterator[None]:
    """Replaces `log` in the validation stage; restores stage, modes, and random state."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING  # modules and loaders read it
    try:
        with restored_modes(pl_module), overridden(pl_module, log=logged), torch.no_grad(), isolated_rng():
            pl_module.eval()
            yield
    finally:
        for metric in logged.metrics.values():
            metric.reset()
        trainer.state.stage = stage
