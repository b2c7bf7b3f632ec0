"""Sums over ranks, and checks that all ranks make the same decision and none has failed.

Before each exchange, ranks exchange a message, so that no rank waits for a message that never comes. The process group's store,
which any rank can read and write at any time, carries the rest: failures while other ranks gather shards, and the end of work on
the first rank only, during which other ranks must not wait in a collective, because collectives have a timeout.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from billhook.engine import SINGLE_PROCESS, Comm, fingerprint, store_of, tree_map_only
from billhook.fit.fit import Fit
from billhook.linalg import widest_float

T = TypeVar("T")
LENGTH = 1024  # bytes of a rank's message
PICKED = 1024  # number of values per tensor that ranks compare
NEAR = 0.01  # tolerance relative to their root mean square
FAILED = "billhook/failed/{}"  # key of the store for a rank's failure


class RanksDiffer(RuntimeError):
    """Raised on every rank if ranks disagree or another rank fails."""


def sum_over_ranks(fit: Fit, tensor: Tensor) -> Tensor:
    """Sums a tensor over all ranks, in place; raises `RanksDiffer` if a rank failed."""
    _meet(fit, f"a sum of {tensor.dtype} {list(tensor.shape)}")
    device = fit.device
    dtype = widest_float(device) if tensor.dtype == torch.float64 else tensor.dtype
    return tensor.copy_(fit.reduce(tensor.to(device, dtype, copy=True)))


def comm_of(fit: Fit, shared: bool = False) -> Comm:
    """Returns a `Comm` for the ranks; `shared` if ranks share each batch."""
    if fit.world_size == 1:
        return SINGLE_PROCESS
    return Comm(partial(sum_over_ranks, fit), fit.rank, fit.world_size, shared)


def check_identical(fit: Fit, who: str, what: str, decided: Any) -> None:  # noqa: ANN401
    """Raises `RanksDiffer` on every rank unless a decision's hash is equal on all ranks.

    Args:
        fit: The training run.
        who: Name of the callback, for the message.
        what: Subject of the decision, for the message.
        decided: Tensors, arrays, numbers, strings, and lists and dictionaries of these, or a function that returns them and is
            called only if there are several ranks.
    """
    if fit.world_size > 1:
        _meet(fit, f"{who}: {what}", fingerprint(decided() if callable(decided) else decided))


def from_first_rank(fit: Fit, who: str, what: str, result: T) -> T:
    """Returns the first rank's result on every rank, because results may differ by rounding.

    Args:
        fit: The training run.
        who: Name of the callback, for messages.
        what: Name of the result, for messages.
        result: This rank's result. Returned tensors are on the CPU.
    """
    if fit.world_size == 1:
        return result
    _meet(fit, f"{who}: {what}")
    first: T = fit.broadcast(tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), result))
    return first


def check_close(fit: Fit, who: str, what: str, model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Raises `RanksDiffer` on every rank if a tensor differs by more than rounding.

    Sharded models are not compared: each rank has shards of the first rank's result.
    """
    if fit.world_size == 1 or store_of(model).on_ranks:
        return
    # evenly spaced values
    picked = {name: value.detach().flatten()[:: max(1, value.numel() // PICKED)].float().cpu() for name, value in values.items()}
    check_identical(fit, who, what, {name: len(numbers) for name, numbers in picked.items()})
    near = True
    for name, first in from_first_rank(fit, who, what, picked).items():
        if len(first):
            near &= bool((picked[name] - first).abs().max() <= NEAR * first.square().mean().sqrt())
    _meet(fit, f"{who}: {what}", "" if near else "another")


@contextmanager
def fail_together(fit: Fit, who: str) -> Iterator[None]:
    """Raises `RanksDiffer` on the other ranks if a rank fails; must not be nested."""
    if fit.world_size > 1 and (store := _store()) is not None:
        store.delete_key(FAILED.format(fit.rank))  # from an earlier run in this process
    try:
        yield
    except RanksDiffer:
        raise
    except Exception as error:
        _raise_failure_of_others(fit, error)
        with suppress(RuntimeError):  # the original error is raised
            if fit.world_size > 1 and (store := _store()) is not None:
                store.set(FAILED.format(fit.rank), _failed(fit, error))
            if not fit.is_sharded:  # others may be gathering shards
                _meet(fit, who, failed=_failed(fit, error))
        raise
    _meet(fit, f"the end of {who}")


Apart = Callable[[Comm], AbstractContextManager[None]]
"""Context in which the first rank alone can load sharded blocks, as `BlockStore.independently`."""


def on_first_rank(fit: Fit, who: str, work: Callable[[], object], apart: Apart = lambda _: nullcontext()) -> None:
    """Runs `work` on the first rank; the others wait, and raise `RanksDiffer` if it fails.

    The others do not wait in a collective, which would time out during long work, except while a block is gathered.

    Args:
        fit: The training run.
        who: Name of the callback, for messages.
        work: Function to run on the first rank.
        apart: Context in which the first rank can load sharded blocks, with the help of the others.
    """
    if fit.world_size == 1 or (store := _store()) is None:
        with fail_together(fit, who):
            if fit.rank == 0:
                work()
        return
    done = f"billhook/turn {store.add(f'billhook/turns of {fit.rank}', 1)}"  # the same number on every rank
    requests = _FirstRanksRequests(fit, store, done)
    comm = Comm(requests, fit.rank, fit.world_size)
    if fit.rank:
        with apart(comm):
            pass  # helps to gather until the first rank is done
        requests.wait(done)
        if failed := store.get(done).decode():
            raise RanksDiffer(_stops(fit, failed))
        return
    try:
        with apart(comm):
            work()
    except BaseException as error:
        store.set(done, _failed(fit, error))
        raise
    store.set(done, "")


@dataclass
class _FirstRanksRequests:
    """Passes the first rank's requests to the others through the process group's store."""

    fit: Fit
    store: Any  # see `_store`
    done: str
    times: int = 0

    def __call__(self, request: Tensor) -> Tensor:
        """Overwrites the tensor with the first rank's."""
        self.times += 1
        key = f"{self.done}, {self.times}"
        if self.fit.rank == 0:
            self.store.set(key, json.dumps(request.tolist()))
            return request
        self.wait(key)
        return request.copy_(torch.tensor(json.loads(self.store.get(key))))

    def wait(self, key: str) -> None:
        """Waits until the first rank sets a key; raises `RanksDiffer` if it fails first."""
        while not self.store.check([key]):  # the store's own `wait` warns on each timeout
            if self.store.check([self.done]) and (failed := self.store.get(self.done).decode()):
                raise RanksDiffer(_stops(self.fit, failed))
            time.sleep(0.01 if self.times else 0.1)


def _meet(fit: Fit, where: str, digest: str = "", failed: str = "") -> None:
    """Raises `RanksDiffer` if a rank failed, or ranks differ in position or decision."""
    if fit.world_size == 1:
        return
    # fixed length and one collective for all callers: ranks that differ still receive each other's message
    padded = "\0".join((where, digest, failed)).encode()[:LENGTH].ljust(LENGTH, b"\0")
    message = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(fit.device)
    try:
        gathered = fit.all_gather(message).cpu().numpy()
    except RuntimeError as error:
        _raise_failure_of_others(fit, error)
        raise
    ranks = [row.tobytes().decode(errors="ignore").split("\0")[:3] for row in gathered]
    positions, digests, failures = zip(*ranks, strict=True)
    if errors := list(filter(None, failures)):
        raise RanksDiffer(_stops(fit, "; ".join(errors)))
    if set(positions) != {where}:
        listed = "; ".join(f"rank {rank} is at {position}" for rank, position in enumerate(positions))
        raise RanksDiffer(f"{_here(fit)}: ranks are at different places: {listed}")
    if others := [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise RanksDiffer(
            f"{_here(fit)}: {where} must be identical on all ranks, but rank {', '.join(others)} differs from rank 0. "
            "Nothing was applied. Use the same arguments, seeds, weights, and versions on all ranks, and sum custom criteria and "
            "metrics over ranks."
        )


def _raise_failure_of_others(fit: Fit, error: Exception) -> None:
    """Raises `RanksDiffer` if a collective broke because another rank failed."""
    if fit.world_size == 1 or not isinstance(error, RuntimeError) or (store := _store()) is None:
        return
    others = (FAILED.format(rank) for rank in range(fit.world_size) if rank != fit.rank)
    try:
        failed = "; ".join(store.get(key).decode() for key in others if store.check([key]))
    except RuntimeError:
        failed = "the process with the store has ended (rank 0, or torchrun on its machine). See its log"
    if failed:
        raise RanksDiffer(_stops(fit, failed)) from error


def _store() -> Any:  # noqa: ANN401 - torch exports no name for it to type checkers
    """Returns the process group's store; None without torch.distributed."""
    group = torch.distributed.group.WORLD if torch.distributed.is_available() else None
    return None if group is None else group.get_group_store()


def _failed(fit: Fit, error: BaseException) -> str:
    return f"rank {fit.rank} ({type(error).__name__}: {error})"


def _stops(fit: Fit, failed: str) -> str:
    return f"{_here(fit)}: this rank stops, because another failed: {failed}"


def _here(fit: Fit) -> str:
    return f"step {fit.step}, rank {fit.rank} of {fit.world_size}"
