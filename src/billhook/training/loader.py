"""DataLoader that can resume in the middle of an epoch."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler

from billhook.fit.lightning_internals import batch_progress


class EpochSampler(DistributedSampler[int]):
    """Sampler with a start position, whose order depends only on seed and epoch.

    It is a `DistributedSampler` on one device too, because Lightning replaces all other samplers.
    """

    start = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        return islice(super().__iter__(), start, None)


class ResumableLoader(DataLoader[Any]):
    """DataLoader that counts its epochs and can start in the middle of an epoch.

    It counts by itself, because Lightning sets the epoch of samplers but not of streams, and counts an epoch that `max_steps`
    ended early as complete.

    Args:
        dataset: Indexed examples or, without a sampler, a stream.
        epoch: Epoch to start with.
        batch: Batch of that epoch to start with.
        seen: Number of batches used before the start, over all epochs.
        count: Returns the number of batches used so far, over all epochs. An iterator of which no batch was used is not an
            epoch. Defaults to None, which makes every iteration an epoch.
        **options: Arguments of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401 - the type of DataLoader does not include streams of `datasets`
        *,
        epoch: int = 0,
        batch: int = 0,
        seen: int = 0,
        count: Callable[[], int] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(dataset, generator=torch.Generator(), **options)  # keeps the global random state of torch unchanged
        self.epoch, self.batch, self.seen, self.count = epoch, batch, seen, count
        self.begun = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Lightning sometimes creates an extra iterator, and the first one before it has restored its progress
        seen = self.seen if self.count is None else max(self.count(), self.seen)
        if self.begun and (self.count is None or seen > self.seen):
            self.epoch, self.batch = self.epoch + 1, 0
        self.begun, self.seen = True, seen
        self.generator.manual_seed(self.epoch)
        if isinstance(self.sampler, EpochSampler):
            self.sampler.set_epoch(self.epoch)
            self.sampler.start = self.batch * (self.batch_size or 1)
            yield from super().__iter__()
            return
        rows: Any = self.dataset
        streaming = isinstance(rows, datasets.IterableDataset)
        if streaming:
            rows.set_epoch(self.epoch)
        number = -1
        for number, batch in enumerate(super().__iter__()):
            if number >= self.batch:
                yield batch
        if streaming and number < 0:
            raise ValueError(f"batch_size={self.batch_size}: the stream ended before the first batch. Use a smaller batch_size.")

    def state_dict(self) -> dict[str, int]:
        """Returns an empty state, because the data module saves the position.

        Lightning computes the length of a loader before it restores its state.
        """
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Ignores the state, because a loader is created with its position."""


def batches_seen(trainer: pl.Trainer) -> int:
    """Returns the number of training batches that a trainer has used, over all epochs."""
    return int(batch_progress(trainer).total.processed)
