"""A run of Lightning's trainer as callbacks see it."""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from billhook.engine import Run, model_loss, overridden, runs_of
from billhook.engine.shards import gathered
from billhook.fit.checkpoint_hooks import wrap_hooks
from billhook.fit.fit import Averages, Fit, Loss, Metrics, Reduction
from billhook.fit.lightning_internals import (
    averaging_callbacks,
    communication_state,
    forks_or_spawns,
    is_sequential,
    is_tuning,
    logged_step,
    to_device,
    validation_loaders,
)
from billhook.fit.preprocessors import find_preprocessors
from billhook.fit.ranks import fail_together
from billhook.fit.run import LoggedMetrics, once_model_exists, training_steps, validating
from billhook.model import Preprocessor
from billhook.private_paths import without_folders

FIRST = "prune or convert first on one device and train the result"
T = TypeVar("T")


@dataclass(eq=False)
class LightningFit(Fit):
    """A run of Lightning's trainer."""

    trainer: Trainer
    module: LightningModule

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
    def averages(self) -> Averages:
        """Callbacks that average weights, each with its copy of the model, if it exists."""
        return averaging_callbacks(self.trainer)

    @property
    def updates_in_step(self) -> bool:
        """True under manual optimization."""
        return not self.module.automatic_optimization

    def stop(self) -> None:
        """Ends training after the current step."""
        self.trainer.should_stop = True

    def check_takes_steps(self, name: str) -> None:
        """Raises `ValueError` if training takes no step, so that callbacks have no effect."""
        for limit in ("max_steps", "max_epochs", "limit_train_batches"):
            if getattr(self.trainer, limit) == 0:
                raise ValueError(
                    f"{limit}=0 takes no training step, so {name} has no effect. Train for at least one step, or use `billhook "
                    "prune`, bh.prune, bh.convert_kv_heads, or bh.save without training."
                )

    def check_strategy(self, name: str) -> None:
        """Raises `ValueError` if the model cannot be evaluated under the strategy."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            supported = strategy.device_mesh["tensor_parallel"].size() == 1
        else:  # DeepSpeed manages weights and optimizer state itself
            supported = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
        if not supported:
            raise ValueError(
                f"{name} does not support {type(strategy).__name__} with these settings. Use one device, DDP, or FSDP2 "
                f"(ModelParallelStrategy with tensor_parallel_size=1), or {FIRST}."
            )

    def check_masking(self, name: str) -> None:
        """Raises `ValueError` if the strategy does not support masks."""
        self.check_strategy(name)
        if self.is_sharded and self.averages:
            averaging = type(self.averages[0][0]).__name__
            raise ValueError(f"{name} under ModelParallelStrategy cannot mask the copy of {averaging}. Remove {averaging}.")

    def check_reshaping(self, name: str) -> None:
        """Raises `ValueError` if the strategy does not support shape changes."""
        self.check_strategy(name)
        if forks_or_spawns(self.trainer):
            raise ValueError(
                f"{name} does not support ddp_notebook, ddp_fork, and ddp_spawn, whose processes return weights without shapes. "
                f"Use strategy='ddp' in a script, or {FIRST}."
            )

    def once_model_exists(self, work: Callable[[], None]) -> None:
        """Calls `work` now, or right after `configure_model`."""
        once_model_exists(self.module, work)

    def follow_shapes(self) -> None:
        """Wraps the module's checkpoint hooks."""
        wrap_hooks(self.trainer, self.module)

    @contextmanager
    def reshaping(self, blockwise: bool) -> Iterator[None]:
        """Unwraps DDP and gathers shards while shapes change: hooks are on old parameters."""
        strategy = self.trainer.strategy
        automatic = self.module.automatic_optimization
        wrapped = isinstance(strategy.model, DistributedDataParallel)
        if wrapped:
            strategy.model = self.module
        if automatic:  # new gradients are computed before the next step
            self.module.zero_grad()
        with gathered(self.module, self.optimizers, gradients=not automatic, blockwise=blockwise):
            yield
        if wrapped:
            assert isinstance(strategy, DDPStrategy)
            strategy.configure_ddp()  # same settings, new buckets and hooks
            if isinstance(state := communication_state(self.trainer), PowerSGDState):
                state.iter = max(0, min(state.iter, state.start_powerSGD_iter - 2))  # DDP's buckets change in the first two steps
                for value in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
                    value.clear()

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
        """Returns a run for each batch: the model on `training_step`'s arguments for it.

        A dictionary that contains only forward arguments goes to the model directly. For other batches, the step runs until it
        calls the model. If it never calls the model as a whole, the step itself is the run. Under manual optimization, the step
        would update weights, so all batches must be dictionaries for the model.
        """
        names = list(inspect.signature(model.forward).parameters)
        runs = []
        for number, batch in enumerate(batches):
            step = bind_arguments(self.module.training_step, batch, number)
            if self.updates_in_step:
                runs += runs_of(model, [forward_arguments(self.module, batch)])
            elif isinstance(batch, Mapping) and set(batch) <= set(names):
                runs += runs_of(model, [batch])
            elif call := call_of_model(model, step, f"{type(self.module).__name__} on batch {number}, a {type(batch).__name__}"):
                runs += runs_of(model, [dict(zip(names, call[0], strict=False)) | call[1]])
            else:
                runs.append(Run(step))
        return runs

    def loss(self, number: int) -> Loss:
        """Returns the loss of `training_step`, or the model's under manual optimization."""

        def loss(model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
            if self.updates_in_step:
                return model_loss(model, forward_arguments(self.module, batch), hint="")
            result = bind_arguments(self.module.training_step, batch, number)()
            value = result["loss"] if isinstance(result, Mapping) else result
            if not isinstance(value, Tensor):
                name = type(self.module).__name__
                raise ValueError(f"training_step of {name} returned no loss for batch {number}: {value!r}")
            return value

        return loss

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

    def validate(self, limit: int | None = None) -> Metrics:
        """Returns the averaged metrics that `validation_step` logs; empty without validation.

        Loops, loggers, checkpoints, random state, and modes are restored.
        """
        if limit == 0:
            return {}
        trainer = self.trainer
        module = self.module
        logged = LoggedMetrics()
        with fail_together(self, "validation"), validating(trainer, module, logged):
            if (batches := validation_loaders(trainer)) is None:
                return {}
            most = [count if limit is None else min(count, limit) for count in trainer.num_val_batches]
            several = len(most) > 1 and is_sequential(batches)
            limits, batches.limits = batches.limits, most  # Lightning validates with the same loader
            try:
                module.on_validation_start()
                module.on_validation_epoch_start()
                for batch, index, loader in batches:
                    logged.batch = batch
                    logged.suffix = f"/dataloader_idx_{loader}" if several else ""
                    moved = to_device(trainer, batch, loader if several else 0)
                    with trainer.precision_plugin.val_step_context():
                        bind_arguments(module.validation_step, moved, index, *[loader] * several)()
                logged.batch = None
                logged.suffix = ""
                module.on_validation_epoch_end()
                module.on_validation_end()
            finally:
                batches.limits = limits
            return logged.values(self)

    @property
    def validation_metrics(self) -> Metrics:
        """The last logged metrics."""
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def record(self) -> dict[str, Any]:
        """Returns the run's settings as `training` and last validation metrics as `metrics`."""
        data = getattr(getattr(self.trainer, "datamodule", None), "data", None)
        seed = os.environ.get("PL_GLOBAL_SEED", "")  # set by `seed_everything`, also in a parent process
        training = {
            "data": without_folders(data) if _names(data) else None,
            "seed": int(seed) if seed.isdigit() else None,
            "precision": str(self.trainer.precision),
            "devices": self.world_size,
        }
        metrics = {
            name: value for name, value in self.validation_metrics.items() if name.startswith("val") and math.isfinite(value)
        }
        known = {name: value for name, value in training.items() if value is not None}
        return {"training": known} | ({"metrics": metrics} if metrics else {})

    def log_metrics(self, metrics: Mapping[str, float | None]) -> None:
        """Logs metrics and the epoch to every logger, as Lightning does.

        The step is Lightning's own, so that steps increase in each logger: after six optimizer steps it is 5, as for the sixth
        training step and a validation after it.
        """
        numbers = {name: float(value) for name, value in metrics.items() if value is not None}
        for logger in self.trainer.loggers if numbers else ():
            logger.log_metrics(numbers | {"epoch": self.trainer.current_epoch}, step=logged_step(self.trainer))


def float16_replaced(device: torch.device, device_type: str) -> AbstractContextManager[object]:
    """Returns autocast to bfloat16, because scores do not scale the loss like training."""
    has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)  # emulation is slow
    return torch.autocast(device_type, torch.bfloat16, cache_enabled=False) if has_bfloat16 else nullcontext()


def _names(data: object) -> bool:
    """Returns whether data is given by name, not as an object of `datasets`."""
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return isinstance(data, str) or (bool(parts) and all(_names(part) for part in parts))


def bind_arguments(method: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """Binds the first arguments to a step, up to its number of parameters."""
    parameters = inspect.signature(method).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return partial(method, *(arguments if takes_any else arguments[: len(parameters)]))


def forward_arguments(pl_module: LightningModule, batch: Any) -> dict[str, Any]:  # noqa: ANN401
    """Returns a batch as a dictionary; raises `ValueError` if it is not a mapping."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"calibration: {type(pl_module).__name__} uses manual optimization, so batches must be dictionaries of the model's "
            f"inputs, got {type(batch).__name__}."
        )
    return batch if isinstance(batch, dict) else dict(batch)


class _Called(BaseException):  # not an `Exception`, which a step might catch
    """Stops a training step at the call of the model, with the arguments."""


def call_of_model(model: nn.Module, step: Callable[[], object], what: str) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Returns the arguments of a training step's first call of the model, or None."""

    def forward(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        raise _Called(args, kwargs)

    try:
        with overridden(model, forward=forward), torch.compiler.set_stance("force_eager"):  # compiled code skips `forward`
            step()
    except _Called as call:
        args, kwargs = call.args
        return args, kwargs
    except Exception as error:
        raise ValueError(
            f"calibration: training_step of {what} failed before it called {type(model).__name__} ({error}). Pass batches as "
            "dictionaries of the model's inputs."
        ) from error
    return None
