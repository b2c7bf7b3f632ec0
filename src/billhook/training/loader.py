"""A DataLoader that can start in the middle of a pass over the data, where a checkpoint was saved."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import datasets
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler

from billhook.fit.lightning_internals import batch_progress, saved_progress


class EpochSampler(DistributedSampler[int]):
    """An order that depends on seed and epoch alone, split over ranks; it can start in the middle once.

    It is a `DistributedSampler` also on one device, since that is the one kind that Lightning leaves in place.
    """

    start = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        return islice(super().__iter__(), start, None)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that counts its passes over the data (epochs) and can start in the middle of one.

    It counts for itself, because Lightning tells the epoch to samplers only, not to streams, and takes a pass that
    `max_steps` cut short for a whole one.

    Args:
        dataset: Examples by index or, without a sampler, a stream of them.
        epoch: The pass to start with.
        batch: The batch of that pass to start with.
        seen: The batches of all passes before that one and in it.
        count: How many batches of all passes have been used till now: an iterator of which none was used was no pass.
            Without it each iteration is one.
        **options: The arguments of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Any,  # noqa: ANN401 - DataLoader's own type does not know streams from `datasets`
        *,
        epoch: int = 0,
        batch: int = 0,
        seen: int = 0,
        count: Callable[[], int] | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(dataset, generator=torch.Generator(), **options)  # so that it draws none of torch's own random numbers
        self.epoch, self.batch, self.seen, self.count = epoch, batch, seen, count
        self.begun = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Lightning makes an iterator too many, now and then, and a first one before it has restored its own counts
        seen = self.seen if self.count is None else max(self.count(), self.seen)
        if self.begun and (self.count is None or seen > self.seen):
            self.epoch, self.batch = self.epoch + 1, 0
        self.begun, self.seen = True, seen
        self.generator.manual_seed(self.epoch)
        if isinstance(self.sampler, EpochSampler):
            self.sampler.set_epoch(self.epoch)
            self.sampler.start = self.batch * (self.batch_size or 1)
            yield from super().__iter__()
        else:
            yield from self._stream()

    def _stream(self) -> Iterator[Any]:
        rows: Any = self.dataset
        streaming = isinstance(rows, datasets.IterableDataset)
        if streaming:
            rows.set_epoch(self.epoch)
        number = -1
        for number, batch in enumerate(super().__iter__()):
            if number >= self.batch:
                yield batch
        if streaming and number < 0:
            raise ValueError(f"batch_size={self.batch_size}: the stream ended before a single batch was full")

    def state_dict(self) -> dict[str, int]:
        """Returns nothing: the data module saves the place, as Lightning asks for a loader's length before it restores it."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Ignores the state: a loader is made with its place."""


def batches_seen(trainer: pl.Trainer) -> int:
    """Returns how many training batches a trainer has used in all."""
    return int(batch_progress(trainer).total.processed)


def place_of(trainer: pl.Trainer) -> dict[str, int] | None:
    """Returns where a `ResumableLoader` must start to continue a trainer's fit; None if the trainer has no such loader."""
    loader = trainer.train_dataloader
    if not isinstance(loader, ResumableLoader):
        return None
    progress = batch_progress(trainer)
    if not loader.begun or loader.seen == batches_seen(trainer):
        position = {"epoch": loader.epoch, "batch": loader.batch, "seen": loader.seen}
    else:
        over = progress.is_last_batch
        batch = 0 if over else int(progress.current.processed)
        position = {"epoch": loader.epoch + int(over), "batch": batch, "seen": batches_seen(trainer)}
    return position | {"examples": position["batch"] * (loader.batch_size or 1) * trainer.world_size}


def fit_place(position: dict[str, int], checkpoint: dict[str, Any], at_once: int) -> None:
    """Makes a place, and how many batches of the epoch Lightning takes for used, fit another batch size or number of devices.

    Examples that then do not fill a batch are seen again. Both are changed in place; `at_once` are examples on all devices.
    """
    batch = position["examples"] // at_once
    if batch == position["batch"]:
        return
    position["batch"] = batch
    current = saved_progress(checkpoint)
    current.update(ready=batch, started=batch, processed=batch, completed=batch - current["processed"] + current["completed"])
