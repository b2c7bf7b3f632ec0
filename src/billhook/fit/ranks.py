"""Sums over the ranks of a fit, and checks that all have decided alike and that none has failed.

Before each exchange the ranks meet, so that none waits for a message that never comes. What must not depend on that goes by
the process group's store, which any rank reads and writes at any time: that a rank has failed while others gather shards, and
that the first one has done what it does alone, for which no other may stand in a collective, as that has a timeout.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.engine.parts import fingerprint
from billhook.engine.store import store_of
from billhook.engine.trees import tree_map_only
from billhook.linalg import widest_float

T = TypeVar("T")

LENGTH = 1024
"""Bytes of a rank's message when ranks meet."""
PICKED, NEAR = 1024, 0.01
"""How many numbers of a tensor ranks compare, and by how much of their root mean square these may differ."""
FAILED = "billhook/failed/{}"
"""Under which key of the store a rank says that it has failed, and how."""


class RanksDiffer(RuntimeError):
    """Raised on every rank when ranks disagree or one fails; the failing rank raises its own error."""


def sum_over_ranks(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    """Sums a tensor over all ranks, in place; raises RanksDiffer if a rank sums something else, or has failed."""
    _meet(trainer, f"a sum of {tensor.dtype} {list(tensor.shape)}")
    device = trainer.strategy.root_device
    dtype = widest_float(device) if tensor.dtype == torch.float64 else tensor.dtype
    on_device = tensor.to(device, dtype, copy=True)
    return tensor.copy_(trainer.strategy.reduce(on_device, reduce_op="sum"))


def comm_of(trainer: pl.Trainer, shared: bool = False) -> Comm:
    """Returns the ranks of a fit, which may share each batch."""
    if trainer.world_size == 1:
        return SINGLE_PROCESS
    return Comm(partial(sum_over_ranks, trainer), trainer.global_rank, trainer.world_size, shared)


def check_identical(trainer: pl.Trainer, who: str, what: str, decided: Any) -> None:  # noqa: ANN401
    """Raises RanksDiffer on every rank unless all have decided the same, by a hash of it.

    Args:
        trainer: The trainer of the fit.
        who: The callback that decides, for the message.
        what: The subject of the decision, for the message.
        decided: Tensors, arrays, numbers and strings, and lists and dictionaries of these; or what returns them, which is called
            where there are several ranks.
    """
    if trainer.world_size > 1:
        _meet(trainer, f"{who}: {what}", fingerprint(decided() if callable(decided) else decided))


def from_first_rank(trainer: pl.Trainer, who: str, what: str, result: T) -> T:
    """Returns, on every rank, what the first one has found; each has found it by itself, so that it may be rounded otherwise.

    Args:
        trainer: The trainer of the fit.
        who: The callback that has found it, for messages.
        what: What it is, for messages.
        result: What this rank has found; tensors in it come back on the CPU.
    """
    if trainer.world_size == 1:
        return result
    _meet(trainer, f"{who}: {what}")
    first: T = trainer.strategy.broadcast(tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), result))
    return first


def check_close(trainer: pl.Trainer, who: str, what: str, model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Raises RanksDiffer on every rank where a tensor is not that of the first but for rounding, by numbers picked from it.

    Of a model that ranks share nothing is compared: each has its shards of what the first one has made.
    """
    if trainer.world_size == 1 or store_of(model).on_ranks:
        return
    picked = {name: _picked(value) for name, value in values.items()}
    check_identical(trainer, who, what, {name: len(numbers) for name, numbers in picked.items()})
    near = True
    for name, first in from_first_rank(trainer, who, what, picked).items():
        if len(first):
            near &= bool((picked[name] - first).abs().max() <= NEAR * first.square().mean().sqrt())
    _meet(trainer, f"{who}: {what}", "" if near else "another")


@contextmanager
def fail_together(trainer: pl.Trainer, who: str) -> Iterator[None]:
    """Stops all ranks where one fails within, the others by RanksDiffer; all end at the same time. Not to be nested."""
    if trainer.world_size > 1 and (store := _store()) is not None:
        store.delete_key(FAILED.format(trainer.global_rank))  # of an earlier fit in these processes
    try:
        yield
    except RanksDiffer:
        raise
    except Exception as error:
        _raise_that_of_another(trainer, error)
        _tell_failure(trainer, who, error)
        raise
    _meet(trainer, f"the end of {who}")


Apart = Callable[[Comm], AbstractContextManager[None]]
"""Lets each rank load blocks that ranks share, as `BlockStore.apart` does."""


def on_first_rank(trainer: pl.Trainer, who: str, work: Callable[[], object], apart: Apart = lambda _: nullcontext()) -> None:
    """Has the first rank work, however long it takes; the others wait, and stop by RanksDiffer if it fails.

    They stand in no collective meanwhile, which would end by the timeout of the process group, but while a block is gathered.

    Args:
        trainer: The trainer of the fit.
        who: The callback that works, for messages.
        work: What the first rank does.
        apart: Lets it load blocks that ranks share, which the others help to gather.
    """
    if trainer.world_size == 1 or (store := _store()) is None:
        with fail_together(trainer, who):
            if trainer.is_global_zero:
                work()
        return
    turn = store.add(f"billhook/turns of {trainer.global_rank}", 1)  # every rank has had as many
    done = f"billhook/turn {turn}"
    requests = _FirstRanksRequests(trainer, store, done)
    comm = Comm(requests, trainer.global_rank, trainer.world_size)
    if not trainer.is_global_zero:
        with apart(comm):
            pass  # but help, until the first has ended
        requests.wait(done)
        if failed := store.get(done).decode():
            raise RanksDiffer(_stops(trainer, failed))
        return
    try:
        with apart(comm):
            work()
    except BaseException as error:
        store.set(done, _failed(trainer, error))
        raise
    store.set(done, "")


class _FirstRanksRequests:
    """Called with what a rank asks for, returns what the first one does, on every rank; it goes by the process group's store."""

    def __init__(self, trainer: pl.Trainer, store: Any, done: str) -> None:  # noqa: ANN401 - see `_store`
        self.trainer, self.store, self.done, self.times = trainer, store, done, 0

    def __call__(self, request: Tensor) -> Tensor:
        """Returns the first rank's tensor, in the place of this one's."""
        self.times += 1
        key = f"{self.done}, {self.times}"
        if self.trainer.is_global_zero:
            self.store.set(key, json.dumps(request.tolist()))
            return request
        self.wait(key)
        return request.copy_(torch.tensor(json.loads(self.store.get(key))))

    def wait(self, key: str) -> None:
        """Waits until the first rank has set a key; raises RanksDiffer if it fails before."""
        while not self.store.check([key]):  # its own `wait` warns each time that it ends
            if self.store.check([self.done]) and (failed := self.store.get(self.done).decode()):
                raise RanksDiffer(_stops(self.trainer, failed))
            time.sleep(0.01 if self.times else 0.1)


def _meet(trainer: pl.Trainer, where: str, digest: str = "", failed: str = "") -> None:
    """Exchanges where each rank is, what it has decided and how it has failed."""
    if trainer.world_size == 1:
        return
    # one length whatever it says, and one collective whoever calls it: ranks that differ still get each other's message
    padded = "\0".join((where, digest, failed)).encode()[:LENGTH].ljust(LENGTH, b"\0")
    message = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(trainer.strategy.root_device)
    try:
        gathered = trainer.strategy.all_gather(message).cpu().numpy()
    except RuntimeError as error:
        _raise_that_of_another(trainer, error)
        raise
    ranks = [row.tobytes().decode(errors="ignore").split("\0")[:3] for row in gathered]
    if errors := [error for _, _, error in ranks if error]:
        raise RanksDiffer(_stops(trainer, "; ".join(errors)))
    if any(message[0] != where for message in ranks):
        listed = "; ".join(f"rank {rank} is at {message[0]}" for rank, message in enumerate(ranks))
        raise RanksDiffer(f"{_here(trainer)}: the ranks have gone different ways: {listed}")
    if others := [str(rank) for rank, (_, other, _) in enumerate(ranks) if other != ranks[0][1]]:
        on = f"on rank{'s' * (len(others) > 1)} {', '.join(others)}"
        raise RanksDiffer(
            f"{_here(trainer)}: {where} must be the same on every rank, and {on} it is not that of rank 0. Nothing of it has "
            "been done. Give all ranks the same arguments, seeds, weights and software; what a criterion or a metric of your own "
            "makes of its rank's data must be summed over ranks"
        )


def _tell_failure(trainer: pl.Trainer, who: str, error: Exception) -> None:
    """Tells the other ranks that this one has failed."""
    if trainer.world_size == 1:
        return
    with suppress(RuntimeError):  # the error is this rank's own
        if (store := _store()) is not None:
            store.set(FAILED.format(trainer.global_rank), _failed(trainer, error))
        if not isinstance(trainer.strategy, ModelParallelStrategy):  # others may gather shards, and take a message for these
            _meet(trainer, who, failed=_failed(trainer, error))


def _raise_that_of_another(trainer: pl.Trainer, error: Exception) -> None:
    """Raises RanksDiffer where an error may be that of a collective which has broken since another rank has failed."""
    if trainer.world_size == 1 or not isinstance(error, RuntimeError) or (store := _store()) is None:
        return
    others = (FAILED.format(rank) for rank in range(trainer.world_size) if rank != trainer.global_rank)
    try:
        failed = "; ".join(store.get(key).decode() for key in others if store.check([key]))
    except RuntimeError:
        failed = "what holds the process group's store has ended (rank 0, or torchrun on its machine); its log says why"
    if failed:
        raise RanksDiffer(_stops(trainer, failed)) from error


def _store() -> Any:  # noqa: ANN401 - torch exports no name for it to type checkers
    """Returns what any rank reads and writes at any time; None where ranks are not torch's."""
    group = torch.distributed.group.WORLD if torch.distributed.is_available() else None
    return None if group is None else group.get_group_store()


def _failed(trainer: pl.Trainer, error: BaseException) -> str:
    return f"rank {trainer.global_rank} ({type(error).__name__}: {error})"


def _stops(trainer: pl.Trainer, failed: str) -> str:
    return f"{_here(trainer)}: this rank stops, as another has failed: {failed}"


def _here(trainer: pl.Trainer) -> str:
    return f"step {trainer.global_step}, rank {trainer.global_rank} of {trainer.world_size}"


def _picked(value: Tensor) -> Tensor:
    """Returns some numbers of a tensor, evenly spaced, on the CPU."""
    flat = value.detach().flatten()
    return flat[:: max(1, len(flat) // PICKED)].float().cpu()
