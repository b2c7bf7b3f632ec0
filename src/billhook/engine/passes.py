"""Runs a model on several inputs, in sequence or side by side, block by block."""

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
from billhook.engine.store import BlockStore, store_of
from billhook.engine.trees import tree_map_only
from billhook.engine.walk import Site, Visitor, Walk, blocks_of

SMALL = 2**16  # size below which tensors are not spilled to disk


@contextmanager
def blockwise(module: nn.Module) -> Iterator[None]:
    """Unshards a module within the context, a block at a time. Changes are lost."""
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
            store.restore_shards()


class CallOrder:
    """Records whether a run calls each block at most once, in full, and not within another.

    Args:
        model: The model. Blocks outside of it must not be called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.orderly = True
        self._inside, self._passed = set(model.modules()), set[nn.Module]()
        self._here: nn.Module | None = None

    def enter(self, block: nn.Module, part: nn.Module, *_: Any) -> None:  # noqa: ANN401 - whatever it takes
        """Records the call of a block or of a module in it."""
        if part is not block:
            self.orderly &= self._here is block
            return
        self.orderly &= self._here is None and block in self._inside - self._passed
        self._passed.add(block)
        self._here = block

    def leave(self, *_: Any) -> None:  # noqa: ANN401
        """Records the end of a block."""
        self._here = None


@contextmanager
def watch_call_order(store: BlockStore, model: nn.Module) -> Iterator[CallOrder]:
    """Records the order of block calls within the context, if ranks share the model."""
    seen = CallOrder(model)
    with ExitStack() as stack:
        for part, block in store.owner.items() if store.on_ranks else ():
            stack.callback(part.register_forward_pre_hook(partial(seen.enter, block)).remove)
            if part is block:
                stack.callback(part.register_forward_hook(seen.leave).remove)
        yield seen


@contextmanager
def in_block_order(model: nn.Module, forwards: Sequence[Callable[[], object]], comm: Comm) -> Iterator[bool]:
    """Keeps all blocks in memory if ranks share them and call them out of order.

    The first run is executed once for that. Yields whether blocks are loaded on demand.
    """
    store = store_of(model)
    with ExitStack() as stack:
        if store.on_ranks and store.is_open:
            with store.independently(comm), watch_call_order(store, model) as passed:
                for forward in forwards[:1]:
                    forward()
            if not all(comm.gather(passed.orderly)):
                stack.enter_context(store.all_loaded())
        yield store.is_open


class ActivationFiles:
    """Tensors in memory-mapped files of a folder, which the system can write out."""

    def __init__(self, folder: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="billhook_", dir=folder, ignore_cleanup_errors=True)
        self._files = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Copies a CPU tensor to a file, unless it is small, mapped, or needs gradients."""
        plain = type(tensor) is Tensor and tensor.device.type == "cpu" and not tensor.requires_grad and tensor.is_contiguous()
        if not plain or tensor.nbytes < SMALL:
            return tensor
        mapped = tensor.untyped_storage().filename
        if mapped is not None and Path(self._folder.name) in Path(mapped).parents:
            return tensor
        return self.zeros(*tensor.shape, dtype=tensor.dtype).copy_(tensor)

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Returns zeros in a file."""
        self._files += 1
        path = Path(self._folder.name, str(self._files))
        mapped = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
        # the map keeps an unlinked file until the tensor is freed, and a killed process leaves nothing
        with suppress(OSError):  # if a mapped file cannot be removed, `close` removes it
            path.unlink()
        return mapped.view(shape)

    def close(self) -> None:
        """Removes the folder. Mapped tensors stay readable."""
        self._folder.cleanup()


@contextmanager
def activation_files(store: BlockStore) -> Iterator[ActivationFiles | None]:
    """Yields files for block outputs in the store's spill folder. None without a folder."""
    if store.spill_folder is None:
        yield None
        return
    with closing(ActivationFiles(store.spill_folder)) as files:
        yield files


@contextmanager
def spilled_outputs(files: ActivationFiles | None, model: nn.Module, blocks: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Spills the outputs of a model's modules to files within the context. None disables it.

    A copy in a file replaces each output. Other intermediate tensors stay in memory, and so do outputs inside `blocks`, in which
    no run pauses.
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
    """Returns zeros on a device, or in a file if it is the CPU.

    Args:
        shape: The shape.
        dtype: The dtype.
        device: The device.
        files: Stores them on disk. None keeps them in memory.
    """
    if files is None or torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return files.zeros(*shape, dtype=dtype)


class SideBySide(Visitor):
    """Runs a model on several inputs, side by side if blocks are loaded on demand.

    Args:
        model: The model.
        leave: Called with each block after all runs on all ranks have passed it. With it, all models run side by side.
        comm: Ranks that call blocks together, in order. With them, all models run side by side. None lets each rank run alone.
        enter: Called with each block after it is loaded, on all ranks.

    Attributes:
        blocks: The blocks at which runs wait for each other.
    """

    def __init__(
        self,
        model: nn.Module,
        leave: Callable[[nn.Module], None] | None = None,
        comm: Comm | None = None,
        enter: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self._store, self._comm, self._leave, self._enter = store_of(model), comm or SINGLE_PROCESS, leave, enter
        self.blocks = list[nn.Module]()
        if self._store.blocks and (comm is not None or not self._store.on_ranks):
            self.blocks = list(self._store.blocks.values())
        elif leave is not None or comm is not None:
            self.blocks = blocks_of(model)
        self._walk: Walk | None = None
        self._number = 0

    @property
    def run(self) -> int:
        """The number of the current run."""
        return self._number if self._walk is None else self._walk.run

    def __call__(self, forwards: Sequence[Callable[[], object]]) -> None:
        """Calls functions that each run the model once, without gradients."""
        if not self.blocks:
            for self._number, forward in enumerate(forwards):
                forward()
            return
        store = self._store
        with activation_files(store) as files, spilled_outputs(files, store.model, store.blocks.values()):
            self.ends = len(forwards)
            self._walk = Walk([Site(block, {}) for block in self.blocks], self, self._comm, self._load)
            self._walk(forwards)

    def leave(self, site: Site) -> None:
        """Reports a block that all runs have passed."""
        if self._leave is not None:
            self._leave(site.module)

    def _load(self, block: nn.Module) -> None:
        """Loads a block on all ranks, also without runs."""
        self._store.load(block)
        if self._enter is not None:
            self._enter(block)


def run_side_by_side(model: nn.Module, forwards: Sequence[Callable[[], object]]) -> None:
    """Calls functions that each run a model once, as `SideBySide` does."""
    SideBySide(model)(forwards)
