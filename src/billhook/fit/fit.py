"""A training run as callbacks see it, whichever trainer runs it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from billhook.engine import Run
from billhook.model import Preprocessor, find_transformer

CallbackT = TypeVar("CallbackT")
T = TypeVar("T")
Metrics = dict[str, float]
Averages = list[tuple[object, nn.Module | None]]
"""Callbacks that average weights, each with its copy of the model, if it exists."""
Reduction = Literal["sum", "min", "max"]
Loss = Callable[[nn.Module, Any], Tensor]  # the training loss, as a function of model and batch


class Fit(ABC):
    """A training run: its model, optimizers, data, ranks, and loggers.

    Events and other callbacks use only this class, so that they run in each trainer.

    Attributes:
        module: The module in training, which contains the transformer.
        validate_first: How to get validation metrics from before training, if the trainer has none by default.
    """

    module: nn.Module
    validate_first: ClassVar[str] = ""

    @property
    def model(self) -> PreTrainedModel:
        """The transformer in training."""
        return find_transformer(self.module)

    @property
    @abstractmethod
    def all_callbacks(self) -> Sequence[object]:
        """All callbacks, in order."""

    def callbacks(self, kind: type[CallbackT]) -> list[CallbackT]:
        """Returns the callbacks of a class, in order."""
        return [callback for callback in self.all_callbacks if isinstance(callback, kind)]

    @property
    @abstractmethod
    def step(self) -> int:
        """Number of optimizer steps so far."""

    @property
    @abstractmethod
    def length(self) -> int | None:
        """Total number of optimizer steps; None if it is unknown."""

    @property
    @abstractmethod
    def max_steps(self) -> int | None:
        """Total number of optimizer steps, if it is known before the data is read."""

    @property
    @abstractmethod
    def resumes(self) -> bool:
        """True if training continues from a checkpoint."""

    @property
    def is_trial(self) -> bool:
        """True for a few steps that test the code, such as `fast_dev_run`."""
        return False

    @property
    def is_tuning(self) -> bool:
        """True while a learning rate or a batch size is searched."""
        return False

    @property
    def starts_fresh(self) -> bool:
        """True before the first step of a run that is not resumed."""
        return self.step == 0 and not self.resumes and not self.is_tuning

    @property
    @abstractmethod
    def optimizers(self) -> list[Optimizer]:
        """The optimizers; empty before they exist."""

    @property
    @abstractmethod
    def existing_optimizers(self) -> list[Optimizer]:
        """Optimizers from before training, which must follow changes at the start."""

    @property
    def averages(self) -> Averages:
        """Callbacks that average weights, each with its copy of the model, if it exists."""
        return []

    @property
    def updates_in_step(self) -> bool:
        """True if the training step updates weights, as under manual optimization."""
        return False

    @abstractmethod
    def stop(self) -> None:
        """Ends training after the current step."""

    # What the trainer supports

    @abstractmethod
    def check_takes_steps(self, name: str) -> None:
        """Raises `ValueError` if training takes no step, so that callbacks have no effect."""

    @abstractmethod
    def check_strategy(self, name: str) -> None:
        """Raises `ValueError` if the model cannot be evaluated under the trainer's strategy."""

    @abstractmethod
    def check_masking(self, name: str) -> None:
        """Raises `ValueError` if the strategy does not support masks."""

    @abstractmethod
    def check_reshaping(self, name: str) -> None:
        """Raises `ValueError` if the strategy does not support shape changes."""

    @abstractmethod
    def once_model_exists(self, work: Callable[[], None]) -> None:
        """Calls `work` when the model exists, before it is wrapped and has optimizers."""

    @abstractmethod
    def follow_shapes(self) -> None:
        """Makes checkpoints hold shape and random state, before shapes change."""

    @abstractmethod
    def reshaping(self, blockwise: bool) -> AbstractContextManager[None]:
        """Unwraps the model and gathers shards while shapes change, block by block if `blockwise`."""

    # Ranks

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of this rank."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Number of this process."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """Number of processes."""

    @property
    def is_sharded(self) -> bool:
        """True if the strategy shards parameters over ranks (FSDP2)."""
        return False

    @abstractmethod
    def reduce(self, tensor: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Reduces a tensor over all ranks."""

    @abstractmethod
    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all ranks, stacked."""

    @abstractmethod
    def broadcast(self, value: T) -> T:
        """Returns the first rank's value."""

    # Data and precision

    @property
    @abstractmethod
    def train_data(self) -> Any:  # noqa: ANN401 - a loader, or a collection of loaders
        """The training loader, or a nested collection of loaders."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Tokenizer of the training data, if known."""

    @abstractmethod
    def preprocessors(self) -> list[Preprocessor]:
        """Returns the tokenizer or processor to save with the model."""

    @abstractmethod
    def to_device(self, batch: Any) -> Any:  # noqa: ANN401
        """Converts and moves a batch as for a training step."""

    @abstractmethod
    def runs(self, model: nn.Module, batches: Iterable[Any]) -> list[Run]:
        """Returns a run for each batch: the model on the arguments that training passes it."""

    @abstractmethod
    def loss(self, number: int) -> Loss:
        """Returns the training loss of the batch with this number."""

    @abstractmethod
    def undisturbed(self) -> AbstractContextManager[object]:
        """Keeps the module from logging."""

    @abstractmethod
    def forward_context(self) -> AbstractContextManager[object]:
        """Returns the training precision."""

    @abstractmethod
    def gradient_context(self) -> AbstractContextManager[object]:
        """Returns the training precision, without float16, which loses unscaled gradients."""

    @abstractmethod
    def validate(self, limit: int | None = None) -> Metrics:
        """Returns validation metrics of the current model; empty without validation.

        Args:
            limit: Maximum number of batches. Defaults to all; 0 disables it.
        """

    # Records

    @property
    @abstractmethod
    def validation_metrics(self) -> Metrics:
        """The last validation metrics."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Returns the run's settings as `training` and last validation metrics as `metrics`."""

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, float | None]) -> None:
        """Logs metrics to every logger."""
