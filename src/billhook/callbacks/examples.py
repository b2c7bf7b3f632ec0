"""Training examples for calibration, drawn without touching the loader that training uses."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from billhook.sparsity.batches import Run, runs_of


def calibration_batches(trainer: pl.Trainer, number: int, seed: int) -> list[Any]:
    """This rank's share of some training examples, in batches, on its device; the same ones whenever they are asked for.

    Args:
        trainer: The trainer, in the middle of a fit.
        number: Examples on all ranks together; all there are, if there are fewer. Of a stream, the first ones.
        seed: Which examples.

    Raises:
        ValueError: If the training data can be read only once.
    """
    loader = next(iter(tree_leaves(trainer.train_dataloader)))
    with isolate_rng():
        batches = list(_batches(loader, number, seed, trainer.global_rank, trainer.world_size))
        return [trainer.strategy.batch_to_device(batch) for batch in batches]


def _batches(loader: Any, number: int, seed: int, rank: int, ranks: int) -> Iterator[Any]:  # noqa: ANN401
    if not isinstance(loader, DataLoader):
        if iter(loader) is loader:
            raise ValueError(f"calibration: a {type(loader).__name__} can be read only once; give batches of their own")
        yield from islice(loader, rank, number, ranks)
        return
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        examples: Iterator[Any] = islice(iter(loader.dataset), rank, number, ranks)
    else:
        order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(seed))
        examples = (loader.dataset[index] for index in order[:number][rank::ranks].tolist())
    if loader.batch_size is None:
        yield from map(loader.collate_fn, examples)
        return
    while chunk := list(islice(examples, loader.batch_size)):
        yield loader.collate_fn(chunk)


def calibration_runs(pl_module: pl.LightningModule, model: nn.Module, batches: Iterable[Any]) -> list[Run]:
    """A forward for each batch: of the model, where the batch is a dictionary that it understands, or else a training step."""
    accepted = inspect.signature(model.forward).parameters
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in accepted.values())
    runs: list[Run] = []
    for number, batch in enumerate(batches):
        if isinstance(batch, Mapping) and any(key in accepted for key in batch):
            known = {key: value for key, value in batch.items() if key in accepted or open_ended}
            runs += runs_of(model, [known])
        else:
            runs.append(Run(partial(pl_module.training_step, batch, number)))
    return runs
