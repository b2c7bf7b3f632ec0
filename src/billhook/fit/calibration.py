"""Batches for scores and statistics in a fit, read and run without leaving a trace in the training."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from billhook.arguments import check_int
from billhook.calibration.calibration import Batches, Calibration
from billhook.calibration.generated import GENERATED
from billhook.engine.batches import Batch
from billhook.engine.passes import blockwise
from billhook.engine.state import overridden
from billhook.engine.trees import tree_flatten, tree_leaves, tree_unflatten
from billhook.fit.lightning_internals import to_device
from billhook.fit.run import isolated_rng
from billhook.fit.training_step import training_loss
from billhook.model.find import find_transformer
from billhook.repairs.residuals import strip_argument

BatchAndLoss = tuple[Any, Callable[[nn.Module, Any], Tensor]]
"""A batch, and the loss as a function of the model and the batch."""


@dataclass(frozen=True, eq=False)
class FitCalibration:
    """Batches from which a callback takes scores and statistics: given ones, text, or examples drawn from the training data.

    Where a LightningModule has a method `calibration_batches(self)`, the first batches of what it returns (a list, a DataLoader,
    or it yields them) stand in for the training data, dealt out to ranks. Under manual optimization (`automatic_optimization =
    False`) that method, or `batches`, is needed: no `training_step` is run that steps optimizers. Each batch is then a dictionary
    of what the model takes, and where scores need a loss it is the model's own.

    Args:
        batches: Batches as `training_step` takes them, which can be read again and again, such as a list or a DataLoader; or a
            `Calibration`, which is read when the callback needs it, with the tokenizer of the data module if it has one; by
            default examples are drawn from the training data, or from `calibration_batches`.
        examples: How many training examples are drawn, on all devices together; the papers take 128.
        seed: The seed that decides which ones.

    Raises:
        ValueError: If there is less than one example, or batches can be read only once.

    >>> FitCalibration(examples=64)
    FitCalibration(batches=None, examples=64, seed=0)
    """

    batches: Batches | None = None
    examples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("examples", self.examples)
        if isinstance(self.batches, Iterator):
            raise ValueError(f"calibration={type(self.batches).__name__} can be read only once: give a list or a DataLoader")

    @classmethod
    def of(cls, batches: "FitCalibration | Batches | int | None", examples: int = 128) -> "FitCalibration":
        """Returns a calibration as it is, or one of the given batches, or of as many training examples."""
        if isinstance(batches, FitCalibration):
            return batches
        if isinstance(batches, int):
            check_int("calibration", batches)
            return cls(examples=batches)
        return cls(batches, examples)

    def shared(self, trainer: pl.Trainer) -> bool:
        """Tells whether ranks share each batch, as in training, from which examples are drawn; others are dealt out to ranks."""
        return self.batches is None and _hook(trainer.lightning_module) is None

    def check(self, trainer: pl.Trainer) -> None:
        """Refuses to draw examples from training data that can be read only once, or that only a manual step understands."""
        module = trainer.lightning_module
        if not self.shared(trainer):
            return
        if not module.automatic_optimization:
            raise ValueError(
                f"calibration: {type(module).__name__} steps its optimizers itself (automatic_optimization=False), so its "
                "training_step is not run for scores: give it a method calibration_batches(self) that returns batches which "
                "the model takes, as dictionaries; or give such batches, or a Calibration, as calibration=; or use automatic "
                "optimization"
            )
        for loader in tree_leaves(trainer.train_dataloader):
            source = loader.dataset if isinstance(loader, DataLoader) else loader
            if isinstance(source, Iterator):
                raise ValueError(
                    f"calibration=None takes examples from the training data, but {type(source).__name__} can be read only once: "
                    "give batches of their own"
                )

    def read(self, trainer: pl.Trainer, same_on_ranks: bool = False) -> Iterator[Any]:
        """Yields this rank's batches, or all of them alike on each, on its device: examples come in batches as in training."""
        rank, ranks = (0, 1) if same_on_ranks else (trainer.global_rank, trainer.world_size)
        hook = _hook(trainer.lightning_module)
        if self.batches is None and hook is not None:
            source = hook()
            if not isinstance(source, Iterable):
                name = f"calibration_batches of {type(trainer.lightning_module).__name__}"
                raise ValueError(f"calibration: {name} returned {source!r}: return batches, such as a list of dictionaries")
            batches: Iterable[Any] = _first(source, self.examples, rank, ranks)
        elif self.batches is None:
            loaders, structure = tree_flatten(trainer.train_dataloader)
            columns = [_examples(loader, self.examples, rank, ranks) for loader in loaders]
            batches = (tree_unflatten(row, structure) for row in zip(*columns, strict=False))
        else:
            every_batch = _text(self.batches, trainer) if isinstance(self.batches, Calibration) else self.batches
            batches = islice(every_batch, rank, None, ranks)
        return (_moved(trainer, batch) for batch in batches)

    def pairs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[BatchAndLoss]:
        """Yields this rank's batches, each with its training loss."""
        return ((batch, training_loss(pl_module, number)) for number, batch in enumerate(self.read(trainer)))

    @contextmanager
    def undisturbed(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Leaves no trace of the work within: random numbers are the seed's, and restored; nothing is logged."""
        trained = {parameter: parameter.requires_grad for parameter in pl_module.parameters()}
        try:
            with overridden(pl_module, log=lambda *_, **__: None), isolated_rng(), torch.no_grad():
                torch.manual_seed(self.seed)
                random.seed(self.seed)
                np.random.seed(self.seed % 2**32)
                yield
        except ValueError as error:  # what is told of batches is about this argument of a callback
            if (what := strip_argument(error)) == str(error):
                raise
            raise type(error)(f"calibration: {what}") from error
        finally:
            for parameter, requires_grad in trained.items():
                parameter.requires_grad = requires_grad


CalibrationLike = FitCalibration | Batches | int | None
"""Batches, text as a `Calibration`, how many training examples, or these and a seed as a `FitCalibration`."""


def _hook(pl_module: pl.LightningModule) -> Callable[[], Any] | None:
    """Returns the method by which a module of a user's own says what it is calibrated on, if it has one."""
    hook = getattr(pl_module, "calibration_batches", None)
    return hook if callable(hook) else None


def _text(calibration: Calibration, trainer: pl.Trainer) -> list[Batch]:
    """Reads text for the model in training; every rank reads all of it."""
    model = find_transformer(trainer.lightning_module)
    with blockwise(trainer.lightning_module) if GENERATED in calibration.named else nullcontext():  # for each token a block comes
        batches = calibration.read(model, find_tokenizer(trainer))
    labelled = model.can_generate() and not model.config.is_encoder_decoder  # every token is one to predict
    return [Batch(batch | {"labels": batch["input_ids"].clone()}, batch.source) for batch in batches] if labelled else batches


def find_tokenizer(trainer: pl.Trainer) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of the data module, if it has one."""
    tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def _moved(trainer: pl.Trainer, batch: Any) -> Any:  # noqa: ANN401
    """Moves a batch to this rank's device."""
    moved = to_device(trainer, batch)
    return Batch(moved, batch.source) if isinstance(batch, Batch) else moved


def _examples(loader: Any, number: int, rank: int, ranks: int) -> Iterator[Any]:  # noqa: ANN401
    """Yields a rank's share of so many examples of a loader, or all there are, in its batches; of a stream, the first ones."""
    if not isinstance(loader, DataLoader):
        yield from _first(loader, number, rank, ranks)
        return
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        examples: Iterator[Any] = islice(iter(loader.dataset), rank, number, ranks)
    else:
        indices = getattr(loader.sampler, "indices", range(len(loader.dataset)))  # those of a subset
        order = torch.randperm(len(indices))[:number][rank::ranks]
        examples = (loader.dataset[indices[index]] for index in order.tolist())
    if loader.batch_sampler is None:
        yield from map(loader.collate_fn, examples)
        return
    while chunk := list(islice(examples, loader.batch_size or 1)):
        yield loader.collate_fn(chunk)


def _first(batches: Iterable[Any], number: int, rank: int, ranks: int) -> Iterator[Any]:
    """Yields a rank's share of the first batches, which have so many examples together, or of all there are."""
    for index, batch in enumerate(batches):
        if index % ranks == rank:
            yield batch
        number -= _size(batch)
        if number <= 0:
            return


def _size(batch: Any) -> int:  # noqa: ANN401
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)


def gradient_precision(trainer: pl.Trainer) -> AbstractContextManager[object]:
    """Returns the precision of the fit for unscaled gradients: where float16 would lose them, bfloat16 or float32."""
    plugin = trainer.precision_plugin
    if not isinstance(plugin, MixedPrecision) or plugin.precision != "16-mixed":
        return plugin.forward_context()
    # a fit in float16 scales the loss, which scores do not; that of bfloat16 may be emulated, and slow
    able = trainer.strategy.root_device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(plugin.device, torch.bfloat16, cache_enabled=False) if able else nullcontext()
