"""Where the blocks of a model live: one contract, and the store of a model that is in memory.

A method asks for the block of what it computes with (`load`), says that it has changed one (`change`), and puts what it makes of
parameters beside the model (`stage`). Whether blocks are in memory, come from files, or are shards of several ranks, only the
store knows: `store_of(model)` finds it.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.engine.comm import Comm
from billhook.engine.device import DeviceCopies
from billhook.engine.forwards import InferenceForward
from billhook.engine.lazy import LazyTensors
from billhook.engine.loader_internals import save_state
from billhook.engine.state import overridden, replaced

STORE = "_billhook_store"
"""The attribute of a module that holds the store of its blocks."""
Alter = Callable[[nn.Module], Iterable[nn.Parameter]]
"""Gives parameters of a block other values, and returns these."""


class BlockStore(ABC):
    """The blocks of a model: where they come from to compute, and where what becomes of them goes.

    Args:
        model: The module that computes.

    Attributes:
        blocks: The blocks that come and go, by name, in the order of the model's modules; none of a model in memory.
        owner: The block that each module within them is in.
        device: Where blocks compute, with copies of what rests in memory or in files; None: where they are.
        rests: The folder in which what blocks hand on rests while runs go side by side; None for memory.
        reused: How many blocks, in all steps so far, were there from an earlier process.
        holds_all: Whether all values of the model are in memory.
        trains: Whether parameters can have gradients, and optimizers that follow them.
        in_files: Whether they come from files.
        on_ranks: Whether they are shards, which all ranks gather together.
    """

    holds_all: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    in_files: ClassVar[bool] = False
    on_ranks: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()  # the attributes that say where blocks come from, which `way_back` restores
    keeps_shapes = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks: dict[str, nn.Module] = {}
        self.owner: dict[nn.Module, nn.Module] = {}
        self.names: dict[nn.Module, str] = {}
        self.device: torch.device | None = None
        self.spill_folder: str | None = None
        self.reused = 0
        self._alterations: dict[nn.Module, list[Alter]] = {}  # what is done to each block whenever it comes
        self.loaded: list[nn.Module] = []  # the block that is here; all of them within `all_here`
        self._changed = False  # whether it goes back to where it comes from
        self._note: object = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockStore":
        """Returns one without blocks: a copy of the model, as on meta, has neither files nor shards."""
        idle = object.__new__(type(self))
        memo[id(self)] = idle
        idle.blocks, idle.owner, idle.names, idle.device = {}, {}, {}, None
        return idle

    def _index(self, root: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Has some blocks of a module come and go, under the names that they have there now."""
        self.names = {module: name for name, module in root.named_modules()}
        self.blocks = {self.names[block]: block for block in blocks}
        self.owner = {module: block for block in self.blocks.values() for module in block.modules()}

    @property
    def alike(self) -> bool:
        """True if all ranks load the same blocks in the same order, which they need not within `apart`."""
        return True

    @property
    def is_open(self) -> bool:
        """True if blocks come and go now."""
        return bool(self.blocks)

    def block_of(self, parameter: str) -> nn.Module | None:
        """Returns the block that a parameter of the model is in; None if it is in none, or all are in memory."""
        return self.owner.get(self.model.get_submodule(parameter.rpartition(".")[0])) if self.owner else None

    @abstractmethod
    def on(self, device: torch.device, blocks: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Has blocks compute on a device, within: one at a time is there, with the next one on its way.

        Args:
            device: The device; what blocks give goes back to where their inputs were.
            blocks: Those of a model in memory, none within another, in the order in which they come.
        """

    def load(self, module: nn.Module) -> nn.Module | None:
        """Has the block of a module in memory, and no other, and returns it; what is in no block always is."""
        block = self.owner.get(module)
        if block is not None and block not in self.loaded:
            self.release()
            self._bring(block)
            self.loaded = [block]  # before it is altered, by what may ask for it
            self._alter(block)
        return block

    @abstractmethod
    def _bring(self, block: nn.Module) -> None:
        """Has a block in memory, where there is none."""

    def _alter(self, block: nn.Module) -> None:
        """Alters the block that has come."""
        for alter in self._alterations.get(block, ()):
            alter(block)

    @abstractmethod
    def release(self) -> None:
        """Has no block in memory; the one that was there is kept as it has changed."""

    def change(self, block: nn.Module, note: object = None) -> None:
        """Has the block that is here, which has changed, kept as it is when it goes.

        Args:
            block: The block.
            note: What a later process is to know of it, in plain data, where blocks are kept in files.
        """
        assert block in self.loaded, f"{self.names[block]} is gone: what was changed in it is lost"
        self._changed, self._note = True, note

    @contextmanager
    def changing(self, module: nn.Module) -> Iterator[None]:
        """Has the block of a module in memory, which changes within."""
        block = self.load(module)
        yield
        if block is not None:
            self.change(block)

    def is_altered(self, block: nn.Module) -> bool:
        """Tells whether values of a block are altered whenever it comes."""
        return bool(self._alterations.get(block))

    @contextmanager
    def altered(self, alter: Alter) -> Iterator[None]:
        """Has values of blocks altered whenever they come, within; one that changes and goes stays as that is."""
        self.release()
        before = self._alterations
        self._alterations = {block: [*before.get(block, ()), alter] for block in self.blocks.values()}
        try:
            yield
        finally:
            self._alterations = before
            self._changed = False  # the block that is still here was altered for this while alone
            self.release()

    def follow(self) -> None:
        """Follows the model, which has lost blocks."""
        self.release()

    def snapshot(self) -> Callable[[], None]:
        """Returns what has blocks come as they do now, once the model has the parameters again that it has now."""
        self.release()
        state = {name: copy.copy(vars(self)[name]) for name in self.kept}

        def back() -> None:
            self._changed = False
            self.release()
            vars(self).update({name: copy.copy(value) for name, value in state.items()})

        return back

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Has blocks come as before they changed, if an error is raised within."""
        back = self.snapshot()
        try:
            yield
        except BaseException:
            back()
            raise

    def apart(self, comm: Comm) -> AbstractContextManager[None]:
        """Lets ranks that share blocks load what each needs, within, however often."""
        del comm
        return nullcontext()

    def all_loaded(self) -> AbstractContextManager[None]:
        """Has all blocks in memory, within, where ranks share them."""
        return nullcontext()

    def check_can_hold_all(self, why: str) -> None:
        """Refuses, where blocks come from files, what needs all of them in memory, and says why it does."""
        del why

    @contextmanager
    def step(self, key: str, more: Callable[[], str] = str) -> Iterator[None]:
        """Begins work in which blocks change, or values are staged; after an error within, blocks come as before.

        Args:
            key: What tells this work from all other: files that an earlier process has left of the same are taken.
            more: Returns the rest of it, such as a hash of data: called only where a later process may go on.
        """
        del key, more
        yield

    def resumed(self, block: nn.Module, sizes: Mapping[str, tuple[int, ...]]) -> bool:
        """Has a block come as an earlier process has left it in the same step; False if it has left nothing.

        Args:
            block: The block.
            sizes: Those of all parameters of the model after the step, by name.
        """
        del block, sizes
        return False

    def watched(self, report: Callable[[int, int], None]) -> AbstractContextManager[None]:
        """Reports, within, how many blocks have come and gone since the last step began, and of how many."""
        del report
        return nullcontext()

    def known(self, block: nn.Module) -> tuple[LazyTensors, Any] | None:
        """Returns what an earlier process has staged of a block in the same step, with its note; None if nothing."""
        del block
        return None

    def stage(
        self, block: nn.Module | None, values: Mapping[str, Tensor], note: object = None, device: torch.device | None = None
    ) -> LazyTensors:
        """Puts new values of parameters where this store has room, and returns what reads them; the model stays as it is.

        Outside of a step they stay in memory, unless ranks share them.

        Args:
            block: The block that they are of; None if of none.
            values: By the names of parameters. With a prefix that ends in a space there may be several of one parameter.
            note: What a later process is to know of them, in plain data.
            device: Where shards of them rest; by default where those of the parameters do.
        """
        del block, note, device
        return LazyTensors.of(values)

    def holder(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns what holds the values of a parameter: itself, or where ranks share it and it is not here, its shards."""
        return parameter

    @contextmanager
    def computing_with(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Has the model compute with other values of parameters within: the one way to do so."""
        new = LazyTensors.of(values)
        with replaced({self.model.get_submodule(module): new.of_module(module) for module in new.modules}):
            yield

    @abstractmethod
    def write(self, folder: Path, transposed: Collection[str] = ()) -> None:
        """Writes config and weights of a Hugging Face model into a folder, as `save_pretrained` does.

        Weights are written, too, that the class leaves out because it makes them: they may be others, or smaller.

        Args:
            folder: The folder.
            transposed: The names of weights that are written transposed.
        """

    def settle(self, folder: Path) -> None:
        """Has blocks come from the checkpoint that was written of the model, where they come from files."""
        del folder


class MemoryStore(BlockStore):
    """The store of a model that is in memory: all blocks are there, and what is staged stays there, too.

    On another device blocks compute with copies, which come and go; the model's own parameters stay where they are.
    """

    @contextmanager
    def on(self, device: torch.device, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Has blocks compute on a device, within; see `BlockStore.on`."""
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

    def _bring(self, block: nn.Module) -> None:
        self._copies.enter(block)

    def release(self) -> None:
        """Has no block on the device; values that have changed there go home."""
        if self.loaded:
            if self._changed:
                self._copies.keep()
            self._copies.leave()
            self.loaded, self._changed = [], False

    def change(self, block: nn.Module, note: object = None) -> None:
        """Has what has changed on the device go home with the block; elsewhere it stays where it is."""
        del note
        self._changed |= block in self.loaded

    @contextmanager
    def computing_with(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Has the model compute with other values of parameters within, of which blocks take copies when they come."""
        self._renew()
        try:
            with super().computing_with(values):
                yield
        finally:
            self._renew()

    def _renew(self) -> None:
        if self.device is not None:
            self.release()
            self._copies.ahead.forget()

    def stage(
        self, block: nn.Module | None, values: Mapping[str, Tensor], note: object = None, device: torch.device | None = None
    ) -> LazyTensors:
        """Keeps new values of parameters in memory: those that were made on another device, where the model is."""
        if self.device is not None:
            home = next(self.model.parameters()).device
            values = {name: value.to(home) for name, value in values.items()}
        return super().stage(block, values, note, device)

    @contextmanager
    def altered(self, alter: Alter) -> Iterator[None]:
        """Does nothing: no block comes."""
        del alter
        yield

    def write(self, folder: Path, transposed: Collection[str] = ()) -> None:
        """Writes config and weights of a Hugging Face model; see `BlockStore.write`."""
        state = with_transposed(self.model.state_dict(), transposed) if transposed else None
        save_state(cast(PreTrainedModel, self.model), folder, state)


def with_transposed(tensors: Mapping[str, Tensor], transposed: Collection[str]) -> dict[str, Tensor]:
    """Returns tensors by name, some of them transposed."""
    return {name: tensor.T.contiguous() if name in transposed else tensor for name, tensor in tensors.items()}


def store_of(model: nn.Module) -> BlockStore:
    """Returns the store of a model, or of the one that a module holds."""
    return _opened(model) or MemoryStore(model)


def _opened(module: nn.Module) -> BlockStore | None:
    store = vars(module).get(STORE)
    if isinstance(store, BlockStore) and store.is_open:
        return store
    if isinstance(module, PreTrainedModel):  # which has the store itself, or none
        return None
    return next(filter(None, map(_opened, module.children())), None)
