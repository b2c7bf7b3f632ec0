"""Sums over the ranks of a fit, and checks that all have decided alike and that none has failed.

Before each exchange the ranks meet, so that none waits for a message that never comes.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from billhook.running.ranks import Ranks

LENGTH = 1024
"""Bytes of a rank's message when ranks meet."""


class RanksDiffer(RuntimeError):
    """Raised on every rank when ranks disagree or one fails; the failing rank raises its own error."""


def summed(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    """Sums a tensor over all ranks, in place; raises RanksDiffer if a rank sums something else, or has failed."""
    _meet(trainer, f"a sum of {tensor.dtype} {list(tensor.shape)}")
    on_device = tensor.to(trainer.strategy.root_device, copy=True)
    return tensor.copy_(trainer.strategy.reduce(on_device, reduce_op="sum"))


def sum_over(trainer: pl.Trainer, shared: bool = False) -> Ranks | None:
    """Returns the ranks, which sum and divide work, and may share each batch; None where there is one."""
    count = trainer.world_size
    return None if count == 1 else Ranks(trainer.global_rank, count, partial(summed, trainer), shared)


def check_agreed(trainer: pl.Trainer, who: str, what: str, decided: Any) -> None:  # noqa: ANN401
    """Raises RanksDiffer on every rank unless all have decided the same, by a hash of it.

    Args:
        trainer: The trainer of the fit.
        who: The callback that decides, for the message.
        what: The subject of the decision, for the message.
        decided: Tensors, arrays, numbers and strings, and lists and dictionaries of these.
    """
    if trainer.world_size > 1:
        digest = hashlib.sha256()
        _add(digest, decided)
        _meet(trainer, f"{who}: {what}", digest.hexdigest())


@contextmanager
def together(trainer: pl.Trainer, who: str) -> Iterator[None]:
    """Stops all ranks where one fails within, the others by RanksDiffer; all end at the same time. Not to be nested."""
    try:
        yield
    except RanksDiffer:
        raise
    except Exception as error:
        with suppress(RuntimeError):  # the error is this rank's own
            _meet(trainer, who, failed=f"{type(error).__name__}: {error}")
        raise
    _meet(trainer, f"the end of {who}")


def _meet(trainer: pl.Trainer, where: str, digest: str = "", failed: str = "") -> None:
    """Exchanges where each rank is, what it has decided and how it has failed."""
    if trainer.world_size == 1:
        return
    message = "\0".join((where, digest, failed)).encode()[:LENGTH].ljust(LENGTH, b"\0")
    own = torch.frombuffer(bytearray(message), dtype=torch.uint8).to(trainer.strategy.root_device)
    gathered = trainer.strategy.all_gather(own).cpu().numpy()
    ranks = [row.tobytes().decode(errors="ignore").split("\0")[:3] for row in gathered]
    step = f"step {trainer.global_step}, rank {trainer.global_rank} of {trainer.world_size}"
    if errors := {rank: error for rank, (_, _, error) in enumerate(ranks) if error}:
        listed = "; ".join(f"rank {rank} ({error})" for rank, error in errors.items())
        raise RanksDiffer(f"{step}: this rank stops, as another has failed: {listed}")
    if len({place for place, _, _ in ranks}) > 1:
        listed = "; ".join(f"rank {rank} is at {place}" for rank, (place, _, _) in enumerate(ranks))
        raise RanksDiffer(f"{step}: the ranks have gone different ways: {listed}")
    if others := [str(rank) for rank, (_, other, _) in enumerate(ranks) if other != ranks[0][1]]:
        raise RanksDiffer(
            f"{step}: {where} must be the same on every rank, and on rank{'s' * (len(others) > 1)} {', '.join(others)} it is not "
            "that of rank 0. Nothing of it has been done. Give all ranks the same arguments, seeds, weights and software; what a "
            "criterion or a metric of your own makes of its rank's data must be summed over ranks"
        )


def _add(digest: Any, decided: Any) -> None:  # noqa: ANN401 - that of hashlib
    """Adds something to a hash; dictionaries in any order are the same."""
    if isinstance(decided, np.ndarray):
        decided = torch.from_numpy(decided)
    if isinstance(decided, Tensor):
        plain = decided.detach().cpu().contiguous()
        digest.update(f"tensor {plain.dtype} {list(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(decided, Mapping):
        _add(digest, [[key, decided[key]] for key in sorted(decided)])
    elif isinstance(decided, list | tuple):
        digest.update(f"list of {len(decided)}".encode())
        for one in decided:
            _add(digest, one)
    else:
        digest.update(f"{type(decided).__name__} {decided!r};".encode())
