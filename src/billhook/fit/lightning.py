"""A run of Lightning's trainer as callbacks see it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from billhook.engine.batches import Run
from billhook.engine.state import overridden
from billhook.fit.checkpoint_hooks import wrap_hooks
from billhook.fit.fit import Fit, Loss, Reduction
from billhook.fit.lightning_internals import averaging_callbacks, is_tuning, to_device
from billhook.fit.measure import log_metrics, measure
from billhook.fit.preprocessors import find_preprocessors
from billhook.fit.run import once_model_exists, training_record, training_steps
from billhook.fit.strategies import (
    check_masking_strategy,
    check_reshaping_strategy,
    check_strategy,
    check_takes_steps,
    unwrapped,
)
from billhook.fit.training_step import training_loss, training_runs
from billhook.model.preprocessors import Preprocessor

T = TypeVar("T")


class LightningFit(Fit):
    """A run of Lightning's trainer."""

    module: pl.LightningModule

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.trainer, self.module = trainer, module

    @property
    def all_callbacks(self) -> Sequence[object]:
        """All callbacks, in order."""
        return cast(Sequence[object], self.trainer.callbacks)  # type: ignore[attr-defined]

    @property
    def step(self) -> int:
        """Number of optimizer steps so far."""
        return self.trainer.global_step

    @property
    def length(self) -> int | None:
        """Total number of optimizer steps; None if it is unknown."""
        return training_steps(self.trainer)

    @property
    def max_steps(self) -> int | None:
        """`max_steps` of the trainer, if it alone ends training."""
        alone = self.trainer.max_steps > 0 and self.trainer.max_epochs in (-1, None)
        return self.trainer.max_steps if alone or self.is_trial else None

    @property
    def resumes(self) -> bool:
        """True if training continues from a checkpoint."""
        return self.trainer.ckpt_path is not None

    @property
    def is_trial(self) -> bool:
        """True in a `fast_dev_run`."""
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    @property
    def is_tuning(self) -> bool:
        """True while a `Tuner` searches a learning rate or a batch size."""
        return is_tuning(self.trainer)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers; empty before they exist."""
        return self.trainer.optimizers

    @property
    def existing_optimizers(self) -> list[Optimizer]:
        """Optimizers that the module created in its constructor."""
        return [value for value in vars(self.module).values() if isinstance(value, Optimizer)]

    @property
    def averages(self) -> list[tuple[object, nn.Module | None]]:
        """Callbacks that average weights, each with its copy of the model, if it exists."""
        return list[tuple[object, nn.Module | None]](averaging_callbacks(self.trainer))

    @property
    def updates_in_step(self) -> bool:
        """True under manual optimization."""
        return not self.module.automatic_optimization

    def check_takes_steps(self, name: str) -> None:
        """Raises `ValueError` if training takes no step, so that callbacks have no effect."""
        check_takes_steps(self.trainer, name)

    def check_strategy(self, name: str) -> None:
        """Raises `ValueError` if the model cannot be evaluated under the strategy."""
        check_strategy(self.trainer, name)

    def check_masking(self, name: str) -> None:
        """Raises `ValueError` if the strategy does not support masks."""
        check_masking_strategy(self.trainer, name)

    def check_reshaping(self, name: str) -> None:
        """Raises `ValueError` if the strategy does not support shape changes."""
        check_reshaping_strategy(self.trainer, name)

    def once_model_exists(self, work: Callable[[], None]) -> None:
        """Calls `work` now, or right after `configure_model`."""
        once_model_exists(self.module, work)

    def follow_shapes(self) -> None:
        """Wraps the module's checkpoint hooks."""
        wrap_hooks(self.trainer, self.module)

    def reshaping(self, blockwise: bool) -> AbstractContextManager[None]:
        """Unwraps DDP and gathers shards while shapes change."""
        return unwrapped(self.trainer, blockwise)

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.trainer.strategy.root_device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.trainer.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.trainer.world_size

    @property
    def is_sharded(self) -> bool:
        """True under FSDP2."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def reduce(self, tensor: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Reduces a tensor over all ranks."""
        return cast(Tensor, self.trainer.strategy.reduce(tensor, reduce_op=reduction))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all ranks, stacked."""
        return self.trainer.strategy.all_gather(tensor)

    def broadcast(self, value: T) -> T:
        """Returns the first rank's value."""
        return self.trainer.strategy.broadcast(value)

    @property
    def train_data(self) -> Any:  # noqa: ANN401
        """The training loader, or a nested collection of loaders."""
        if self.trainer.train_dataloader is None:  # before training
            self.trainer.fit_loop.setup_data()
        return self.trainer.train_dataloader

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Tokenizer of the data module, if any."""
        tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None

    def preprocessors(self) -> list[Preprocessor]:
        """Returns the tokenizer or processor that created the batches, or else the base model's."""
        return find_preprocessors(self.trainer, self.module)

    def to_device(self, batch: Any) -> Any:  # noqa: ANN401
        """Converts and moves a batch as Lightning does before a step."""
        return to_device(self.trainer, batch)

    def runs(self, model: nn.Module, batches: Iterable[Any]) -> list[Run]:
        """Returns a run for each batch: the model on `training_step`'s arguments for it."""
        return training_runs(self.module, model, batches)

    def loss(self, number: int) -> Loss:
        """Returns the loss of `training_step`, or the model's under manual optimization."""
        return training_loss(self.module, number)

    def undisturbed(self) -> AbstractContextManager[object]:
        """Keeps the module from logging."""
        return overridden(self.module, log=lambda *_, **__: None)

    def forward_context(self) -> AbstractContextManager[object]:
        """Returns the training precision."""
        return self.trainer.precision_plugin.forward_context()

    def gradient_context(self) -> AbstractContextManager[object]:
        """Returns the training precision, replacing float16, which loses unscaled gradients."""
        plugin = self.trainer.precision_plugin
        if not isinstance(plugin, MixedPrecision) or plugin.precision != "16-mixed":
            return plugin.forward_context()
        return float16_replaced(self.device, plugin.device)

    def validate(self, limit: int | None = None) -> dict[str, float]:
        """Returns the metrics that `validation_step` logs; empty without validation."""
        return measure(self, self.trainer, self.module, limit)

    @property
    def validation_metrics(self) -> dict[str, float]:
        """The last logged metrics."""
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def record(self) -> dict[str, Any]:
        """Returns the run's settings as `training` and last validation metrics as `metrics`."""
        return training_record(self.trainer)

    def log_metrics(self, metrics: Mapping[str, float | None]) -> None:
        """Logs metrics to every logger."""
        log_metrics(self.trainer, metrics)


def float16_replaced(device: torch.device, device_type: str) -> AbstractContextManager[object]:
    """Returns autocast to bfloat16, because scores do not scale the loss like training."""
    # emulated bfloat16 is slow
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device_type, torch.bfloat16, cache_enabled=False) if has_bfloat16 else nullcontext()
