"""A DataLoader that a checkpoint can hold: after a resume it goes on with the batch that would have come next."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler


class EpochSampler(DistributedSampler[int]):
    """An order that depends on seed and epoch alone, split over ranks; it can start in the middle once.

    It is a `DistributedSampler` also on one device, since that is the one kind that Lightning leaves in place and tells
    the epoch.
    """

    start = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        return islice(super().__iter__(), start, None)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader with `state_dict` and `load_state_dict`, which Lightning stores in its checkpoints.

    Whoever takes batches from it counts them in `consumed`: a count of batches given out would be ahead by those that
    Lightning prefetches.
    """

    consumed = 0
    _resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # a generator, so that nothing is drawn before Lightning has told the sampler its epoch
        resume, self._resume = self._resume, None
        skip = resume["consumed"] if resume is not None and resume["epoch"] == self._epoch() else 0
        self.consumed = skip
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start = skip * (self.batch_size or 1)
            skip = 0
        yield from islice(super().__iter__(), skip, None)

    def state_dict(self) -> dict[str, int]:
        """Where it is: the epoch, and the batches of that epoch that are done."""
        return {"epoch": self._epoch(), "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from `state` at the next iteration."""
        self._resume = state

    def _epoch(self) -> int:
        owner = self.sampler if isinstance(self.sampler, EpochSampler) else self.dataset
        return int(getattr(owner, "epoch", 0))
