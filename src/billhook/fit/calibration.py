"""Calibration data during training, read and run without affecting training."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from billhook.arguments import check_int
from billhook.calibration.calibration import Batches, Calibration
from billhook.calibration.generated import GENERATED
from billhook.engine import Batch, blockwise, forked, seed_random_state, tree_flatten, tree_leaves, tree_unflatten
from billhook.fit.fit import Fit, Loss
from billhook.fit.run import isolated_rng
from billhook.repairs.residuals import strip_argument

BatchAndLoss = tuple[Any, Loss]  # a batch, and the loss as a function of model and batch


@dataclass(frozen=True, eq=False)
class FitCalibration:
    """Calibration data of a callback: batches, text, or examples drawn from the training data.

    If the LightningModule defines `calibration_batches(self)`, the first batches that it returns (a list, a DataLoader, or a
    generator) replace the training data and are divided among ranks. Under manual optimization (`automatic_optimization =
    False`), that method or `batches` is required, because `training_step` would update weights. Each batch must then be a
    dictionary of the model's inputs, and scores use the model's own loss.

    Args:
        batches: Batches as `training_step` takes them, in a re-iterable such as a list or a DataLoader, or a `Calibration`, which
            is read with the data module's tokenizer, if any. Defaults to examples of training data or `calibration_batches`.
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

    def shared(self, fit: Fit) -> bool:
        """Returns whether ranks share each batch, as in training, instead of dividing batches."""
        return self.batches is None and _hook(fit) is None

    def check(self, fit: Fit) -> None:
        """Raises `ValueError` if the training data cannot be used for calibration."""
        if not self.shared(fit):
            return
        if fit.updates_in_step:
            raise ValueError(
                f"calibration: examples of training data are not supported by {type(fit.module).__name__}, which uses manual "
                "optimization: its training_step would update weights. Pass batches (dictionaries of the model's inputs) or a "
                "Calibration as calibration=, or define calibration_batches(self) in the module."
            )
        for loader in tree_leaves(fit.train_data):
            source: Any = loader.dataset if isinstance(loader, DataLoader) else loader
            streams = isinstance(source, IterableDataset) or not hasattr(source, "__len__")
            if isinstance(source, Iterator) or (streams and not _starts_again(source)):
                raise ValueError(
                    f"calibration: examples come from the training data, but {type(source).__name__} can be read only "
                    "once. Pass batches or a Calibration."
                )

    def read(self, fit: Fit, same_on_ranks: bool = False) -> Iterator[Any]:
        """Yields this rank's batches on its device, or all batches with `same_on_ranks`."""
        rank, ranks = (0, 1) if same_on_ranks else (fit.rank, fit.world_size)
        hook = _hook(fit)
        if self.batches is None and hook is not None:
            source = hook()
            if not isinstance(source, Iterable):
                name = f"calibration_batches of {type(fit.module).__name__}"
                raise ValueError(f"calibration: {name} returned {source!r}. Return batches, such as a list of dictionaries.")
            batches = _first(source, self.examples, rank, ranks)
        elif self.batches is None:
            loaders, structure = tree_flatten(fit.train_data)
            columns = [_examples(loader, self.examples, rank, ranks) for loader in loaders]
            batches = (tree_unflatten(row, structure) for row in zip(*columns, strict=False))
        else:
            every_batch = _text(self.batches, fit) if isinstance(self.batches, Calibration) else self.batches
            batches = islice(every_batch, rank, None, ranks)
        return map(partial(_moved, fit), batches)

    def pairs(self, fit: Fit) -> Iterator[BatchAndLoss]:
        """Yields this rank's batches, each with its training loss."""
        return ((batch, fit.loss(number)) for number, batch in enumerate(self.read(fit)))

    @contextmanager
    def undisturbed(self, fit: Fit) -> Iterator[None]:
        """Seeds random state and disables logging within; restores both afterward."""
        trained = {parameter: parameter.requires_grad for parameter in fit.module.parameters()}
        try:
            # `isolated_rng` restores Python, NumPy, the CPU, and CUDA, `forked` any other device of this rank
            with fit.undisturbed(), isolated_rng(), forked(fit.device), torch.no_grad():
                seed_random_state(self.seed, fit.device)
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


def _hook(fit: Fit) -> Callable[[], Any] | None:
    hook = getattr(fit.module, "calibration_batches", None)
    return hook if callable(hook) else None


def _text(calibration: Calibration, fit: Fit) -> list[Batch]:
    """Returns calibration batches for the model; every rank reads all of them."""
    model = fit.model
    with blockwise(fit.module) if GENERATED in calibration.named else nullcontext():  # for each token a block comes
        batches = calibration.read(model, fit.tokenizer)
    labelled = model.can_generate() and not model.config.is_encoder_decoder  # every token is a label
    return [Batch(batch | {"labels": batch["input_ids"].clone()}, batch.source) for batch in batches] if labelled else batches


def _moved(fit: Fit, batch: Any) -> Any:  # noqa: ANN401
    moved = fit.to_device(batch)
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
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)  # accelerate's loaders have the latter
    while chunk := list(islice(examples, batch_size)):
        yield loader.collate_fn(chunk)


def _first(batches: Iterable[Any], number: int, rank: int, ranks: int) -> Iterator[Any]:
    """Yields a rank's share of the first batches that contain `number` examples in total."""
    for index, batch in enumerate(batches):
        if index % ranks == rank:
            yield batch
        leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
        number -= next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)
        if number <= 0:
            return


def _starts_again(dataset: Iterable[Any]) -> bool:
    """Returns whether a dataset can be read twice, instead of continuing one stream."""
    first = []
    for _ in range(2):
        with isolated_rng():
            first.append(next(iter(dataset), None))
    leaves, others = map(tree_leaves, first)
    pairs = zip(leaves, others, strict=False)
    return len(leaves) == len(others) and all(bool(np.all(np.asarray(leaf == other))) for leaf, other in pairs)
