"""Calibration data during training, read and run without affecting training."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
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
"""A batch, and the loss as a function of model and batch."""


@dataclass(frozen=True, eq=False)
class FitCalibration:
    """Calibration data of a callback: batches, text, or examples drawn from the training data.

    If the LightningModule defines `calibration_batches(self)`, the first batches that it returns (a list, a DataLoader, or a
    generator) replace the training data and are divided among ranks. Under manual optimization (`automatic_optimization =
    False`), that method or `batches` is required, because `training_step` would update weights. Each batch must then be a
    dictionary of the model's inputs, and scores use the model's own loss.

    Args:
        batches: Batches as `training_step` takes them, in a re-iterable such as a list or a DataLoader, or a `Calibration`, which
            is read with the data module's tokenizer, if any. Defaults to examples of the training data or
            `calibration_batches`.
        examples: Number of training examples over all devices. Defaults to 128, as in the papers.
        seed: Seed for drawing examples.

    Raises:
        ValueError: If `examples` is below 1, or batches can be read only once.

    >>> FitCalibration(examples=64)
    FitCalibration(batches=None, examples=64, seed=0)
    """

    batches: Batches | None = None
    examples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("examples", self.examples)
        if isinstance(self.batches, Iterator):
            raise ValueError(f"calibration={type(self.batches).__name__} can be read only once. Use a list or a DataLoader.")

    @classmethod
    def of(cls, batches: "FitCalibration | Batches | int | None", examples: int = 128) -> "FitCalibration":
        """Converts batches, a `Calibration`, or a number of training examples."""
        if isinstance(batches, FitCalibration):
            return batches
        if isinstance(batches, int):
            check_int("calibration", batches)
            return cls(examples=batches)
        return cls(batches, examples)

    def shared(self, trainer: pl.Trainer) -> bool:
        """Returns whether ranks share each batch, as in training, instead of dividing batches."""
        return self.batches is None and _hook(trainer.lightning_module) is None

    def check(self, trainer: pl.Trainer) -> None:
        """Raises `ValueError` if the training data cannot be used for calibration."""
        module = trainer.lightning_module
        if not self.shared(trainer):
            return
        if not module.automatic_optimization:
            raise ValueError(
                f"calibration: examples of training data are not supported by {type(module).__name__}, which uses manual "
                "optimization: its training_step would update weights. Pass batches (dictionaries of the model's inputs) or a "
                "Calibration as calibration=, or define calibration_batches(self) in the module."
            )
        for loader in tree_leaves(trainer.train_dataloader):
            source = loader.dataset if isinstance(loader, DataLoader) else loader
            if isinstance(source, Iterator):
                raise ValueError(
                    f"calibration: examples come from the training data, but {type(source).__name__} can be read only "
                    "once. Pass batches or a Calibration."
                )

    def read(self, trainer: pl.Trainer, same_on_ranks: bool = False) -> Iterator[Any]:
        """Yields this rank's batches on its device, or all batches with `same_on_ranks`."""
        rank, ranks = (0, 1) if same_on_ranks else (trainer.global_rank, trainer.world_size)
        hook = _hook(trainer.lightning_module)
        if self.batches is None and hook is not None:
            source = hook()
            if not isinstance(source, Iterable):
                name = f"calibration_batches of {type(trainer.lightning_module).__name__}"
                raise ValueError(f"calibration: {name} returned {source!r}. Return batches, such as a list of dictionaries.")
            batches: Iterable[Any] = _first(source, self.examples, rank, ranks)
        elif self.batches is None:
            loaders, structure = tree_flatten(trainer.train_dataloader)
            columns = [_examples(loader, self.examples, rank, ranks) for loader in loaders]
            batches = (tree_unflatten(row, structure) for row in zip(*columns, strict=False))
        else:
            every_batch = _text(self.batches, trainer) if isinstance(self.batches, Calibration) else self.batches
            batches = islice(every_batch, rank, None, ranks)
        return map(partial(_moved, trainer), batches)

    def pairs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[BatchAndLoss]:
        """Yields this rank's batches, each with its training loss."""
        return ((batch, training_loss(pl_module, number)) for number, batch in enumerate(self.read(trainer)))

    @contextmanager
    def undisturbed(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Seeds random state and disables logging within; restores both afterward."""
        trained = {parameter: parameter.requires_grad for parameter in pl_module.parameters()}
        try:
            with overridden(pl_module, log=lambda *_, **__: None), isolated_rng(), torch.no_grad():
                torch.manual_seed(self.seed)
                random.seed(self.seed)
                np.random.seed(self.seed % 2**32)
                yield
        except ValueError as error:  # the callback's argument is called `calibration`
            if (what := strip_argument(error)) == str(error):
                raise
            raise type(error)(f"calibration: {what}") from error
        finally:
            for parameter, requires_grad in trained.items():
                parameter.requires_grad = requires_grad


CalibrationLike = FitCalibration | Batches | int | None
"""Batches, a `Calibration`, a number of training examples, or a `FitCalibration` with a seed."""


def _hook(pl_module: pl.LightningModule) -> Callable[[], Any] | None:
    """Returns the `calibration_batches` method of a custom module, if any."""
    hook = getattr(pl_module, "calibration_batches", None)
    return hook if callable(hook) else None


def _text(calibration: Calibration, trainer: pl.Trainer) -> list[Batch]:
    """Returns calibration batches for the model; every rank reads all of them."""
    model = find_transformer(trainer.lightning_module)
    with blockwise(trainer.lightning_module) if GENERATED in calibration.named else nullcontext():  # for each token a block comes
        batches = calibration.read(model, find_tokenizer(trainer))
    labelled = model.can_generate() and not model.config.is_encoder_decoder  # every token is a label
    return [Batch(batch | {"labels": batch["input_ids"].clone()}, batch.source) for batch in batches] if labelled else batches


def find_tokenizer(trainer: pl.Trainer) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer of the data module, if any."""
    tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def _moved(trainer: pl.Trainer, batch: Any) -> Any:  # noqa: ANN401
    """Moves a batch to this rank's device."""
    moved = to_device(trainer, batch)
    return Batch(moved, batch.source) if isinstance(batch, Batch) else moved


def _examples(loader: Any, number: int, rank: int, ranks: int) -> Iterator[Any]:  # noqa: ANN401
    """Yields a rank's share of `number` examples, batched as the loader does."""
    if not isinstance(loader, DataLoader):
        yield from _first(loader, number, rank, ranks)
        return
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        examples: Iterator[Any] = islice(iter(loader.dataset), rank, number, ranks)
    else:
        indices = getattr(loader.sampler, "indices", range(len(loader.dataset)))  # a sampler of a subset
        order = torch.randperm(len(indices))[:number][rank::ranks]
        examples = (loader.dataset[indices[index]] for index in order.tolist())
    if loader.batch_sampler is None:
        yield from map(loader.collate_fn, examples)
        return
    while chunk := list(islice(examples, loader.batch_size or 1)):
        yield loader.collate_fn(chunk)


def _first(batches: Iterable[Any], number: int, rank: int, ranks: int) -> Iterator[Any]:
    """Yields a rank's share of the first batches that contain `number` examples in total."""
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
    """Returns the training precision, replacing float16, which loses unscaled gradients."""
    plugin = trainer.precision_plugin
    if not isinstance(plugin, MixedPrecision) or plugin.precision != "16-mixed":
        return plugin.forward_context()
    # float16 training scales the loss, but scores do not; emulated bfloat16 is slow
    has_bfloat16 = trainer.strategy.root_device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(plugin.device, torch.bfloat16, cache_enabled=False) if has_bfloat16 else nullcontext()
