"""A run of transformers' Trainer as callbacks see it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

from billhook.checkpoints.save import state_shape
from billhook.engine import Run, evaluating_without_grad, is_sharded, model_loss, runs_of, tree_map_only
from billhook.fit.fit import Fit, Loss, Metrics, Reduction
from billhook.fit.lightning import float16_replaced
from billhook.fit.run import isolated_rng
from billhook.model import Preprocessor, find_transformer, load_preprocessor
from billhook.report.generation import generates

T = TypeVar("T")

FIRST = "Prune or convert first (bh.prune, bh.apply, bh.convert_kv_heads) and train the result"


@dataclass(eq=False)
class TransformersFit(Fit):
    """A run of transformers' Trainer."""

    validate_first = "Pass eval_on_start=True to the Trainer, or validation= to Callbacks."

    _callbacks: Sequence[object]
    args: TrainingArguments
    state: TrainerState
    module: nn.Module
    _resumes: bool
    _validation: Iterable[Any] | None
    _metrics: Metrics
    _hooked: Mapping[str, Any]
    control: TrainerControl

    @property
    def all_callbacks(self) -> Sequence[object]:
        """The callbacks of the adapter, in order."""
        return self._callbacks

    @property
    def step(self) -> int:
        """Number of optimizer steps so far."""
        return int(self.state.global_step)

    @property
    def length(self) -> int | None:
        """Total number of optimizer steps; None before training, if `max_steps` is not set."""
        return self.state.max_steps if self.state.max_steps > 0 else self.max_steps

    @property
    def max_steps(self) -> int | None:
        """`max_steps` of the arguments, if set."""
        return self.args.max_steps if self.args.max_steps > 0 else None

    @property
    def resumes(self) -> bool:
        """True if training continues from a checkpoint."""
        return self._resumes

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizer inside of accelerate's wrapper; empty before it exists."""
        optimizer = self._hooked.get("optimizer")
        return [] if optimizer is None else [getattr(optimizer, "optimizer", optimizer)]

    @property
    def existing_optimizers(self) -> list[Optimizer]:
        """The optimizer that was passed to the Trainer, if any."""
        return self.optimizers

    def stop(self) -> None:
        """Ends training after the current step."""
        self.control.should_training_stop = True

    def check_takes_steps(self, name: str) -> None:
        """Raises `ValueError` if training takes no step."""
        if self.args.max_steps == 0 or (self.args.max_steps < 0 and self.args.num_train_epochs == 0):
            raise ValueError(f"the Trainer takes no training step, so {name} has no effect. Set max_steps or num_train_epochs.")

    def check_strategy(self, name: str) -> None:
        """Raises `ValueError` if the model is sharded or replicated in one process."""
        if sharding := self.sharding:
            raise ValueError(
                f"{name} does not support {sharding} in transformers' Trainer. Use Lightning's, or one device or DDP."
            )

    def check_masking(self, name: str) -> None:
        """Raises `ValueError` if weights are sharded."""
        self.check_strategy(name)

    def check_reshaping(self, name: str) -> None:
        """Does nothing: the model is not wrapped yet. See `check_reshaping_later`."""

    def check_reshaping_later(self, name: str, step: int) -> None:
        """Raises `ValueError` if shapes cannot change at a later step."""
        args = self.args
        reasons = {
            self.sharding: bool(self.sharding),
            "DDP": self.world_size > 1,
            "torch_compile": args.torch_compile,
            "colocated vLLM, whose copy keeps its shape": getattr(args, "use_vllm", False)
            and getattr(args, "vllm_mode", "colocate") == "colocate",
        }
        if reason := next((reason for reason, holds in reasons.items() if holds), None):
            raise ValueError(
                f"{name} changes shapes at step {step}, which is not possible with {reason} in transformers' Trainer, because a "
                f"callback cannot replace the wrapped model. Use at='start' with calibration batches. {FIRST}."
            )

    @property
    def sharding(self) -> str:
        """Name of the kind of sharding, besides DDP; empty without it."""
        state = AcceleratorState()  # `accelerate launch` sets what the arguments do not say
        kinds = {
            "FSDP": getattr(state, "fsdp_plugin", None) is not None,
            "DeepSpeed": state.deepspeed_plugin is not None,
            "DataParallel": self.args.n_gpu > 1,
            "a sharded model": is_sharded(self.module),
        }
        return next((kind for kind, used in kinds.items() if used), "")

    def once_model_exists(self, work: Callable[[], None]) -> None:
        """Calls `work` now."""
        work()

    def follow_shapes(self) -> None:
        """Does nothing: `Callbacks` saves its own state beside each checkpoint."""

    @contextmanager
    def reshaping(self, blockwise: bool) -> Iterator[None]:
        """Drops gradients before shapes change, and states the shape in the config afterward."""
        self.module.zero_grad()
        yield
        state_shape(self.model)

    @property
    def device(self) -> torch.device:
        """Device of this rank."""
        return self.args.device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return int(self.args.process_index)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self.args.world_size)

    def reduce(self, tensor: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Reduces a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[reduction])
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all ranks, stacked."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def broadcast(self, value: T) -> T:
        """Returns the first rank's value."""
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    @property
    def train_data(self) -> Any:  # noqa: ANN401
        """The training loader; None before training."""
        return self._hooked.get("train_dataloader")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The Trainer's `processing_class`, if it is a tokenizer."""
        tokenizer = self._hooked.get("processing_class")
        return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None

    def preprocessors(self) -> list[Preprocessor]:
        """Returns the Trainer's `processing_class`, or else the base model's."""
        processing = self._hooked.get("processing_class")
        origin = str(self.model.config.name_or_path)
        if isinstance(processing, Preprocessor):
            return [processing]
        try:
            return [load_preprocessor(origin)] if origin else []
        except Exception:  # noqa: BLE001 - transformers raises many types
            return []

    def to_device(self, batch: Any) -> Any:  # noqa: ANN401
        """Moves a batch to this rank's device."""
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.device), batch)

    def runs(self, model: nn.Module, batches: Iterable[Any]) -> list[Run]:
        """Returns a run for each batch."""
        return runs_of(model, [dict(batch) for batch in batches])

    def loss(self, number: int) -> Loss:
        """Returns the model's own loss."""
        return lambda model, batch: model_loss(model, dict(batch), hint="")

    def undisturbed(self) -> AbstractContextManager[object]:
        """Does nothing: models log nothing."""
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[object]:
        """Returns autocast to the training precision."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype, cache_enabled=False)

    def gradient_context(self) -> AbstractContextManager[object]:
        """Returns the training precision, replacing float16, which loses unscaled gradients."""
        return float16_replaced(self.device, self.device.type) if self.args.fp16 else self.forward_context()

    def validate(self, limit: int | None = None) -> Metrics:
        """Returns `val_loss`, the mean over examples, and `val_perplexity` of language models."""
        batches = self._hooked.get("eval_dataloader") if self._validation is None else self._validation
        if limit == 0 or batches is None:
            return {}
        sums = torch.zeros(2)
        with evaluating_without_grad(self.module), self.forward_context(), isolated_rng():
            for number, batch in enumerate(batches):
                if number == limit:
                    break
                moved = self.to_device(dict(batch))
                examples = len(next(value for value in moved.values() if isinstance(value, Tensor)))
                sums += torch.tensor([float(model_loss(self.module, moved, hint="")) * examples, examples])
        total, count = self.reduce(sums.to(self.device)).tolist()
        return val_metrics({"eval_loss": total / count}, self.module) if count else {}

    @property
    def validation_metrics(self) -> Metrics:
        """The metrics of the last evaluation, with the prefix `val_`."""
        return self._metrics

    def record(self) -> dict[str, Any]:
        """Returns the run's settings as `training` and last validation metrics as `metrics`."""
        precision = "bf16-mixed" if self.args.bf16 else "16-mixed" if self.args.fp16 else "32-true"
        training = {"seed": self.args.seed, "precision": precision, "devices": self.world_size}
        return {"training": training} | ({"metrics": self._metrics} if self._metrics else {})

    def log_metrics(self, metrics: Mapping[str, float | None]) -> None:
        """Adds metrics to `state.log_history`."""
        numbers = {name: float(value) for name, value in metrics.items() if value is not None}
        if numbers:
            self.state.log_history.append(numbers | {"step": self.step})


def val_metrics(metrics: Mapping[str, float], model: nn.Module) -> Metrics:
    """Renames the Trainer's metrics for billhook, and adds perplexity.

    >>> val_metrics({"eval_loss": 1.0, "eval_runtime": 2.0, "epoch": 1.0}, nn.Linear(1, 1))
    {'val_loss': 1.0}
    """
    timings = ("runtime", "per_second")
    named = {
        f"val_{name.removeprefix('eval_')}": float(value)
        for name, value in metrics.items()
        if name.startswith("eval_") and not name.endswith(timings)
    }
    if "val_loss" in named:
        with suppress(ValueError):  # it contains no transformers model
            if generates(find_transformer(model)):
                named["val_perplexity"] = math.exp(min(named["val_loss"], 700.0))
    return named
