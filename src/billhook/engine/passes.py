"""Runs a model on several inputs: one after the other, or side by side, so that all pass a block before one enters the next."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from billhook.engine.comm import SINGLE_PROCESS, Comm
from billhook.engine.sharding import is_sharded, unsharded
from billhook.engine.shards import ShardStore
from billhook.engine.state import evaluating_without_grad
from billhook.engine.store import BlockStore, store_of
from billhook.engine.trees import tree_map_only
from billhook.engine.walk import Site, Visitor, Walk, blocks_of

SMALL = 2**16
"""Bytes of a tensor that is not worth a file."""


@contextmanager
def blockwise(module: nn.Module) -> Iterator[None]:
    """Makes a sharded module what it was before, a block at a time (see `ShardStore`); what is done to its parameters is lost."""
    if not is_sharded(module):
        yield
        return
    with unsharded(module):
        store = ShardStore(module)
        try:
            store.begin()
            yield
        finally:
            store.end()
            store.put_back()


class CallOrder:
    """Holds what has been seen of a run: whether each block was called once at most, as a whole, and none within another.

    Args:
        model: The model; blocks that are not in it must not be called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.orderly = True
        self._inside, self._passed = set(model.modules()), set[nn.Module]()
        self._here: nn.Module | None = None

    def enter(self, block: nn.Module, part: nn.Module, *_: Any) -> None:  # noqa: ANN401 - whatever it takes
        """Marks a block, or a part of it, as called."""
        if part is not block:
            self.orderly &= self._here is block
            return
        self.orderly &= self._here is None and block in self._inside - self._passed
        self._passed.add(block)
        self._here = block

    def leave(self, *_: Any) -> None:  # noqa: ANN401
        """Marks the block as done."""
        self._here = None


@contextmanager
def watch_call_order(store: BlockStore, model: nn.Module) -> Iterator[CallOrder]:
    """Watches a run within, and yields what is seen of it; of a model that ranks do not share, whatever it does is orderly."""
    seen = CallOrder(model)
    with ExitStack() as stack:
        for part, block in store.owner.items() if store.on_ranks else ():
            stack.callback(part.register_forward_pre_hook(partial(seen.enter, block)).remove)
            if part is block:
                stack.callback(part.register_forward_hook(seen.leave).remove)
        yield seen


@torch.no_grad()
def runs_blockwise(model: nn.Module, forwards: Sequence[Callable[[], object]], comm: Comm = SINGLE_PROCESS) -> bool:
    """Tells whether work is done block by block: blocks come and go, and on all ranks runs need them one after the other.

    Blocks in files always do. Of blocks that ranks share the first run tells, which is made for it.
    """
    store = store_of(model)
    if not store.on_ranks or not store.alike:
        return store.in_files
    with evaluating_without_grad(model), store.apart(comm), watch_call_order(store, model) as passed:
        for forward in forwards[:1]:
            forward()
    seen = comm.gather((bool(forwards), passed.orderly))
    return any(runs for runs, _ in seen) and all(orderly for _, orderly in seen)


class _Passed(Visitor):
    """A visitor that finds nothing to do at blocks, and tells which all runs have passed."""

    def __init__(self, ends: int, leave: Callable[[nn.Module], None] | None) -> None:
        self.ends, self._leave = ends, leave

    def leave(self, site: Site) -> None:
        """Reports a block that all runs have passed."""
        if self._leave is not None:
            self._leave(site.module)


class ActivationFiles:
    """Keeps tensors in files of a folder, mapped into memory: the system writes them out when it needs the room."""

    def __init__(self, folder: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="billhook_", dir=folder, ignore_cleanup_errors=True)
        self._files = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Copies a tensor of the CPU into a file; one that is small, lies there already or needs gradients is returned itself."""
        plain = type(tensor) is Tensor and tensor.device.type == "cpu" and not tensor.requires_grad and tensor.is_contiguous()
        if not plain or tensor.nbytes < SMALL or self._has(tensor):
            return tensor
        return self.zeros(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Returns zeros in a file."""
        self._files += 1
        path = Path(self._folder.name, str(self._files))
        mapped = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
        # the map keeps the file until the tensor goes; without a name nothing is left of it if the process is killed
        with suppress(OSError):  # where a file that is mapped cannot be removed, closing does it
            path.unlink()
        return mapped.view(shape)

    def close(self) -> None:
        """Removes the folder; what is still mapped stays readable."""
        self._folder.cleanup()

    def _has(self, tensor: Tensor) -> bool:
        filename = tensor.untyped_storage().filename
        return filename is not None and Path(self._folder.name) in Path(filename).parents


@contextmanager
def activation_files(store: BlockStore) -> Iterator[ActivationFiles | None]:
    """Yields what keeps the values that blocks hand on in the files of a store's folder; None where they rest in memory."""
    if store.spill_folder is None:
        yield None
        return
    with closing(ActivationFiles(store.spill_folder)) as files:
        yield files


@contextmanager
def spilled_outputs(files: ActivationFiles | None, model: nn.Module, blocks: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Has the outputs of a model's modules lie in files, where runs that rest within the model hold them; None leaves them.

    A copy in a file goes on in the place of each output. What else a module's code computes stays in memory, and so does what is
    computed within `blocks`, in which no run rests.
    """
    if files is None:
        yield
        return
    with ExitStack() as stack:
        inside = {module for block in blocks for module in block.modules() if module is not block}
        for module in model.modules():
            if module in inside:
                continue
            hook = module.register_forward_hook(lambda _module, _inputs, outputs: tree_map_only(Tensor, files.copy, outputs))
            stack.callback(hook.remove)
        yield


def zeros(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", files: ActivationFiles | None = None
) -> Tensor:
    """Returns zeros on a device or, where that is the CPU, in a file."""
    if files is None or torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return files.zeros(*shape, dtype=dtype)


@contextmanager
def spilling(store: BlockStore) -> Iterator[None]:
    """Has what modules hand on lie in the files of a store's folder within; in memory where it names none."""
    with activation_files(store) as files, spilled_outputs(files, store.model, store.blocks.values()):
        yield


class SideBySide:
    """Runs a model on several inputs; where blocks come and go on all side by side, so that each comes once.

    Args:
        model: The model.
        leave: Called with each block when all runs have passed it, on any rank; with it, all models run side by side.
        orderly: Whether blocks that ranks share are called one after the other: then all ranks, too, go side by side.
        comm: The ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        leave: Callable[[nn.Module], None] | None = None,
        orderly: bool = False,
        comm: Comm = SINGLE_PROCESS,
    ) -> None:
        self._store, self._comm = store_of(model), comm
        if orderly or (self._store.blocks and not self._store.on_ranks):
            blocks = list(self._store.blocks.values())
        else:
            blocks = [] if leave is None else blocks_of(model)
        self._sites = [Site(block, {}) for block in blocks]
        self._leave = leave
        self._walk: Walk | None = None
        self._number = 0

    @property
    def now(self) -> int:
        """The number of the run that is going on."""
        return self._number if self._walk is None else self._walk.run

    def __call__(self, forwards: Sequence[Callable[[], object]]) -> None:
        """Calls functions that each run the model once, without gradients; they end one after the other."""
        if not self._sites:
            for self._number, forward in enumerate(forwards):
                forward()
            return
        with spilling(self._store):
            passed = _Passed(len(forwards), self._leave)
            self._walk = Walk(self._sites, passed, self._comm, self._store.load)  # on all ranks, also without runs that come
            self._walk(forwards)


def run_side_by_side(model: nn.Module, forwards: Sequence[Callable[[], object]]) -> None:
    """Calls functions that each run a model once, as `SideBySide` does."""
    SideBySide(model)(forwards)
