"""Draws examples from the training data, as training would batch and move them."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from billhook.running.trees import tree_flatten, tree_leaves, tree_unflatten


def check_readable(trainer: pl.Trainer) -> None:
    """Refuses training data that can be read only once, which a calibration would use up."""
    for loader in tree_leaves(trainer.train_dataloader):
        source = loader.dataset if isinstance(loader, DataLoader) else loader
        if isinstance(source, Iterator):
            raise ValueError(
                f"calibration=None takes examples from the training data, but {type(source).__name__} can be read only once: "
                "give batches of their own"
            )


def training_examples(trainer: pl.Trainer, number: int) -> Iterator[Any]:
    """Yields this rank's share of so many examples of each training loader, in its batches; of a stream, the first ones."""
    loaders, structure = tree_flatten(trainer.train_dataloader)
    columns = [_batches(loader, number, trainer.global_rank, trainer.world_size) for loader in loaders]
    return (tree_unflatten(row, structure) for row in zip(*columns, strict=False))


def _batches(loader: Any, number: int, rank: int, ranks: int) -> Iterator[Any]:  # noqa: ANN401
    if not isinstance(loader, DataLoader):
        for index, batch in enumerate(loader):
            if index % ranks == rank:
                yield batch
            number -= _size(batch)
            if number <= 0:
                return
        return
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        examples: Iterator[Any] = islice(iter(loader.dataset), rank, number, ranks)
    else:
        indices = getattr(loader.sampler, "indices", range(len(loader.dataset)))  # those of a subset
        order = torch.randperm(len(indices))[:number][rank::ranks]
        examples = (loader.dataset[indices[place]] for place in order.tolist())
    if loader.batch_sampler is None:
        yield from map(loader.collate_fn, examples)
        return
    while chunk := list(islice(examples, loader.batch_size or 1)):
        yield loader.collate_fn(chunk)


def _size(batch: Any) -> int:  # noqa: ANN401
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)
