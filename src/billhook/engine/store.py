"""Block stores: load and change the blocks of a model, and the in-memory store.

A method loads the block that it computes with (`load`), marks it as changed (`change`), and stages new parameter values beside
the model (`stage`). Only the store knows whether blocks are in memory, in files, or sharded. `store_of(model)` returns it.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from billhook.engine.comm import Comm
from billhook.engine.device import DeviceCopies
from billhook.engine.forwards import InferenceForward
from billhook.engine.lazy import LazyTensors
from billhook.engine.loader_internals import save_state
from billhook.engine.state import overridden, replaced
from billhook.engine.trees import Sizes
from billhook.linalg import Indices, TensorsByName

STORE = "_billhook_store"  # attribute of a module for the store of its blocks
Alter = Callable[[nn.Module], Iterable[nn.Parameter]]  # changes parameter values of a block, and returns these parameters


class BlockStore(ABC):
    """Loads the blocks of a model for computing, and stores them after they have changed.

    Args:
        model: The module that computes.

    Attributes:
        blocks: The blocks that are loaded on demand, by name, in module order. Empty for a model in memory.
        owner: The block that contains each module.
        device: Device on which blocks run as copies. None runs them where they are.
        spill_folder: Folder for block outputs that are spilled to disk. None keeps them in memory.
        reused: Number of blocks, over all steps, that an earlier process had finished.
        holds_all: Whether all values of the model are in memory.
        trains: Whether parameters can have gradients and optimizers.
        in_files: Whether blocks come from files.
        on_ranks: Whether blocks are shards that all ranks gather together.
    """

    holds_all = True
    trains = True
    in_files = False
    on_ranks = False
    snapshot_attributes: ClassVar[tuple[str, ...]] = ()  # attributes that `snapshot` restores
    keeps_shapes = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks: dict[str, nn.Module] = {}
        self.owner: dict[nn.Module, nn.Module] = {}
        self.names: dict[nn.Module, str] = {}
        self.device: torch.device | None = None
        self.spill_folder: str | None = None
        self.reused = 0
        self._alterations: dict[nn.Module, list[Alter]] = {}  # applied to each block on every load
        self.loaded: list[nn.Module] = []  # the loaded block; all blocks within `all_loaded`
        self._changed = False  # whether the loaded block is stored on release
        self._note: object = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockStore":
        """Returns a store without blocks: a copy of the model has neither files nor shards."""
        idle = object.__new__(type(self))
        memo[id(self)] = idle
        idle.blocks, idle.owner, idle.names, idle.device = {}, {}, {}, None
        return idle

    def _index(self, root: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Registers the blocks that are loaded on demand, under their current names."""
        self.names = {module: name for name, module in root.named_modules()}
        self.blocks = {self.names[block]: block for block in blocks}
        self.owner = {}
        for block in self.blocks.values():
            self.owner |= dict.fromkeys(block.modules(), block)

    @property
    def is_open(self) -> bool:
        """True if blocks are loaded on demand now."""
        return bool(self.blocks)

    def block_of(self, parameter: str) -> nn.Module | None:
        """Returns the block of a parameter. None outside of blocks, or for a model in memory."""
        return self.owner.get(self.model.get_submodule(parameter.rpartition(".")[0])) if self.owner else None

    @abstractmethod
    def on(self, device: torch.device, blocks: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Runs blocks on a device within the context, and prefetches the next block.

        Args:
            device: The device. Block outputs return to the device of their inputs.
            blocks: Blocks of a model in memory, in the order of their calls. None may contain another.
        """

    def load(self, module: nn.Module) -> nn.Module | None:
        """Loads the block of a module, releases any other, and returns it."""
        block = self.owner.get(module)
        if block is not None and block not in self.loaded:
            self.release()
            self._load_block(block)
            self.loaded = [block]  # before it is altered: an alteration may load it again
            self._alter(block)
        return block

    @abstractmethod
    def _load_block(self, block: nn.Module) -> None:
        """Loads a block into memory, where there is none."""

    def _alter(self, block: nn.Module) -> None:
        for alter in self._alterations.get(block, ()):
            alter(block)

    @abstractmethod
    def release(self) -> None:
        """Releases the loaded block, and stores its values if they have changed."""

    def change(self, block: nn.Module, note: object = None) -> None:
        """Marks the loaded block as changed, so that it is stored on release.

        Args:
            block: The block.
            note: Plain data that a later process reads with the block, if blocks are kept in files.
        """
        assert block in self.loaded, f"{self.names[block]} is not loaded: its changes would be lost"
        self._changed, self._note = True, note

    @contextmanager
    def changing(self, module: nn.Module) -> Iterator[None]:
        """Loads the block of a module, and stores it as changed at the end of the context."""
        block = self.load(module)
        yield
        if block is not None:
            self.change(block)

    def is_altered(self, block: nn.Module) -> bool:
        """Returns whether values of a block are altered on every load."""
        return bool(self._alterations.get(block))

    @contextmanager
    def altered(self, alter: Alter) -> Iterator[None]:
        """Alters block values on every load within the context. A changed block keeps them."""
        self.release()
        before = self._alterations
        self._alterations = {block: [*before.get(block, ()), alter] for block in self.blocks.values()}
        try:
            yield
        finally:
            self._alterations = before
            self._changed = False  # the loaded block was altered for this context only
            self.release()

    def reindex(self) -> None:
        """Updates names and blocks after blocks were removed from the model."""
        self.release()

    def snapshot(self) -> Callable[[], None]:
        """Returns a function that restores where blocks come from now."""
        self.release()
        state = {name: copy.copy(vars(self)[name]) for name in self.snapshot_attributes}

        def restore() -> None:
            self._changed = False
            self.release()
            vars(self).update({name: copy.copy(value) for name, value in state.items()})

        return restore

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Restores where blocks came from if an error is raised within the context."""
        restore = self.snapshot()
        try:
            yield
        except BaseException:
            restore()
            raise

    def independently(self, comm: Comm) -> AbstractContextManager[None]:
        """Lets ranks that share blocks load different ones, within the context."""
        return nullcontext()

    def all_loaded(self) -> AbstractContextManager[None]:
        """Keeps all blocks in memory within the context, where ranks share them."""
        return nullcontext()

    def check_can_hold_all(self, why: str, instead: str = "") -> None:
        """Raises if all blocks are needed in memory and they come from files.

        Args:
            why: The start of the message: what needs all blocks.
            instead: The end of the message: another fix, such as `", or remove blocks"`.
        """
        del why, instead

    def check_writes_values(self) -> None:
        """Raises if new values cannot be stored, because the files are quantized."""
        return

    def select(self, kept: Mapping[str, Mapping[int, Indices]], sizes: Sizes) -> set[str] | None:
        """Leaves out positions in quantized files; returns parameters in blocks, or None.

        Args:
            kept: The positions that are left, by parameter or buffer and by dimension.
            sizes: Sizes of all parameters afterwards.
        """
        return None

    @contextmanager
    def step(self, key: str, more: Callable[[], str] = str) -> Iterator[None]:
        """Starts work that changes blocks or stages values. An error within restores the blocks.

        Args:
            key: Identifies the work. Files of an earlier process with the same key are reused.
            more: Returns the rest of the key, such as a hash of data. Called only if an earlier process can be resumed.
        """
        del key, more
        yield

    def resume_block(self, block: nn.Module, sizes: Sizes) -> bool:
        """Adopts a block that an earlier process finished in this step. False if there is none.

        Args:
            block: The block.
            sizes: Sizes of all parameters of the model after the step, by name.
        """
        return False

    def reporting(self, report: Callable[[int, int], None]) -> AbstractContextManager[None]:
        """Reports the number of processed blocks since the last step began, and their total."""
        return nullcontext()

    def read_staged(self, block: nn.Module) -> tuple[LazyTensors, Any] | None:
        """Returns the values and note that an earlier process staged for a block. None if nothing."""
        return None

    def stage(
        self, block: nn.Module | None, values: TensorsByName, note: object = None, device: torch.device | None = None
    ) -> LazyTensors:
        """Stages new parameter values beside the model, and returns a lazy reader of them.

        The model is not changed. Outside of a step the values stay in memory, unless ranks share them.

        Args:
            block: The block of the parameters. None for parameters outside of blocks.
            values: Values by parameter name. A prefix that ends in a space allows several values for one parameter.
            note: Plain data that a later process reads with the values.
            device: Device of the shards. Defaults to that of the parameter's shards.
        """
        if self.device is not None:  # values stay on the device of the model
            model_device = next(self.model.parameters()).device
            values = {name: value.to(model_device) for name, value in values.items()}
        return LazyTensors.of(values)

    def holder(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns the tensor with the values of a parameter: itself, or its shards."""
        return parameter

    @contextmanager
    def computing_with(self, values: TensorsByName) -> Iterator[None]:
        """Replaces parameter values within the context, also of blocks loaded later."""
        new = LazyTensors.of(values)
        with replaced({self.model.get_submodule(module): new.of_module(module) for module in new.modules}):
            yield

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Writes config and weights of a Hugging Face model, as `save_pretrained` does.

        Weights that the class recreates on loading are written too, because their values or sizes may have changed.
        """

    def reopen(self, folder: Path) -> None:
        """Reads blocks from the saved checkpoint from now on, if they come from files."""
        del folder


class MemoryStore(BlockStore):
    """The store of a model in memory, where all blocks and staged values stay.

    With a device, blocks run as copies on it, and the model's own parameters stay where they are.
    """

    @contextmanager
    def on(self, device: torch.device, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Runs blocks on a device within the context. See `BlockStore.on`."""
        with closing(DeviceCopies(device, blocks)) as self._copies, ExitStack() as stack:
            self.device = device
            self._index(self.model, blocks)
            stack.callback(self._off)
            stack.enter_context(overridden(self.model, **{STORE: self}))
            for block in blocks:
                stack.enter_context(overridden(block, forward=InferenceForward(self, block, block.forward)))
            yield

    def _off(self) -> None:
        self.release()
        self.device, self.blocks, self.owner, self.names = None, {}, {}, {}

    def _load_block(self, block: nn.Module) -> None:
        self._copies.enter(block)

    def release(self) -> None:
        """Releases the block on the device, and copies changed values back."""
        if self.loaded:
            if self._changed:
                self._copies.copy_back()
            self._copies.leave()
            self.loaded, self._changed = [], False

    def change(self, block: nn.Module, note: object = None) -> None:
        """Marks the block on the device as changed. Elsewhere there is nothing to do."""
        self._changed |= block in self.loaded

    @contextmanager
    def computing_with(self, values: TensorsByName) -> Iterator[None]:
        """Replaces parameter values within the context, also in the copies on a device."""
        self._drop_copies()
        try:
            with super().computing_with(values):
                yield
        finally:
            self._drop_copies()

    def _drop_copies(self) -> None:
        if self.device is not None:
            self.release()
            self._copies.ahead.forget()

    @contextmanager
    def altered(self, alter: Alter) -> Iterator[None]:
        """Does nothing, because no block is loaded."""
        del alter
        yield

    def write(self, folder: Path) -> None:
        """Writes config and weights of a Hugging Face model. See `BlockStore.write`."""
        save_state(cast(PreTrainedModel, self.model), folder)


def store_of(model: nn.Module) -> BlockStore:
    """Returns the block store of a model, or of the model inside a module."""
    return _opened(model) or MemoryStore(model)


def _opened(module: nn.Module) -> BlockStore | None:
    store = vars(module).get(STORE)
    if isinstance(store, BlockStore) and store.is_open:
        return store
    if isinstance(module, PreTrainedModel):  # only the model itself can have the store
        return None
    return next(filter(None, map(_opened, module.children())), None)
