"""A model of which one block at a time is in memory: each comes from files when it computes, and goes when another one does."""

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from billhook.bar import Told
from billhook.engine.device import Copies, NextBlock
from billhook.engine.forwards import Before, ComingOnce, Visiting
from billhook.engine.lazy import LazyTensors
from billhook.engine.loader_internals import (
    as_in_files,
    initialize_buffers,
    load_some,
    made_by_class,
    named_in,
    save_state,
)
from billhook.engine.parts import Parts, identity_of, link, tensor_in
from billhook.engine.store import STORE, Alter, BlockStore, turned_in
from billhook.engine.tensors import Files, renumbered, share, write_index
from billhook.engine.walk import blocks_of


class FileStore(BlockStore):
    """The store of a model on meta: blocks are read from files, and changed ones written; nothing is read before it is opened.

    All that is in no block then stays in memory, and so do buffers, and blocks that hold the model's first parameter or share a
    weight with something outside of them.

    Args:
        model: The model, on meta.
        files: The tensors of its checkpoint.
        parts: Where changed blocks are written; None for a model that is only read.

    Attributes:
        blocks: The blocks that come and go, by name.
        adopted: The files that hold blocks as they are now, by the name of the block.
        done: The blocks that an earlier process has left of the step that goes on, with its notes.
    """

    model: PreTrainedModel
    holds_all = False
    trains = False
    in_files = True

    def __init__(self, model: PreTrainedModel, files: Files, parts: Parts | None) -> None:
        super().__init__(model)
        self.files, self.parts = files, parts
        self.here: nn.Module | None = None
        self._copies: Copies | None = None
        self._next: NextBlock | None = None  # of a store whose blocks compute on a device that takes them ahead
        self._changed = self._in_step = False
        self._note: object = None
        self._turned = frozenset[str]()  # what the last checkpoint that was written has transposed
        self._instead = LazyTensors({})  # what parameters of blocks have for values, meanwhile
        self.adopted = dict[str, Path]()
        self._told: Told | None = None
        self._passed = set[str]()
        self._alterations = dict[str, list[Alter]]()  # what is done to blocks whenever they come
        self.done = dict[str, Any]()
        self._lost = list[dict[str, str]]()  # each time that blocks were removed, the others by their names before and after
        self.names = names = {module: name for name, module in model.named_modules()}
        self.blocks: dict[str, nn.Module] = {names[block]: block for block in blocks_of(model) if self._is_apart(block)}
        self.owner = {part: block for block in self.blocks.values() for part in block.modules()}
        self.keys = self._keys()
        self._origin = files.state
        setattr(model, STORE, self)

    def open(self, beside: PreTrainedModel | None = None) -> None:
        """Loads what stays in memory, except for what a model beside this one has, and has blocks come when they are called."""
        initialize_buffers(self.model, made_by_class(self.model, named_in(self.model, self.files).values()))
        stay = self.keys[""]
        self._load(stay if beside is None else share(self.model, beside, self.files, stay))
        for module in self.model.modules():
            if module not in self.owner and isinstance(module, nn.Linear):
                vars(module)["forward"] = Visiting(self, module, module.forward)
        for module, block in self.owner.items():
            if module is block:
                vars(block)["forward"] = ComingOnce(self, block, block.forward)
            elif any(own is not None for own in module._parameters.values()):  # some are called, and their block is not
                module.register_forward_pre_hook(Before(self.load, block))

    def _keys(self) -> dict[str, list[str]]:
        """Returns the names of tensors in the files, by the block that they are in, or ""."""
        names = self.names
        of = {f"{names[part]}.{key}": names[block] for part, block in self.owner.items() for key in part._parameters}
        found: dict[str, list[str]] = {name: [] for name in ("", *self.blocks)}
        for key, own in named_in(self.model, self.files).items():
            found[of.get(own, "")].append(key)
        return found

    def _is_apart(self, block: nn.Module) -> bool:
        """Tells whether only a block itself ever needs its parameters."""
        inside = set(block.modules())
        own = {id(parameter) for parameter in block.parameters()}
        others = (module for module in self.model.modules() if module not in inside)
        if id(next(self.model.parameters())) in own:  # which models ask for the device that they are on
            return False
        return bool(own) and not any(id(one) in own for module in others for one in module._parameters.values())

    def load(self, module: nn.Module) -> nn.Module | None:
        """Reads the block of a module, in the place of the one that was there; see `BlockStore.load`."""
        block = self.owner.get(module)
        if block is not None and block is not self.here:
            self._check_known(block)
            self.release()
            name = self.names[block]
            self._load(self.keys[name], None if self._next is None else self._next.take(name))
            self._read_ahead(name)
            if self.device is not None:
                self._copies = Copies(self.device)
                self._copies.enter(block)
            self.here = block
            for alter in self._alterations.get(self.names[block], ()):
                alter(block)
            for name, value in self._instead.under({self.names[part] for part in block.modules()}).items():
                parameter = self.model.get_parameter(name)
                parameter.data = value.to(parameter.device)
        return block

    def _read_ahead(self, name: str) -> None:
        """Has the tensors of the block after one read while this one computes: by a thread, or into pages of the system alone."""
        names = list(self.blocks)
        following = names[(names.index(name) + 1) % len(names)]
        keys = self.keys[following]
        if self.device is not None and following != name and Copies.sends_ahead(self.device) and self.files.are_here:
            self._next = self._next or NextBlock(self.device)
            self._next.read(following, partial(self.files.read, keys))
        else:
            self.files.read_ahead(keys)

    def _forget(self, name: str | None = None) -> None:
        """Lets go of a block, or any, that was read ahead: its tensors come from elsewhere, or under other names, from now on."""
        if self._next is not None:
            self._next.forget(name)

    @contextmanager
    def on(self, device: torch.device, blocks: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Has blocks compute on a device, within, as they come from the files; see `BlockStore.on`."""
        self.release()
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.release()
            self._forget()
            self.device, self._next = before, None

    def _check_known(self, block: nn.Module) -> None:
        """Refuses a block with modules that have come since the model was loaded, such as adapters; nothing is read for it."""
        for name, part in block.named_modules(prefix=self.names[block]):
            if part not in self.owner and part._parameters:
                raise ValueError(
                    f"model: {name} was added to it, and the model is streamed, so that its files alone say what a block holds: "
                    "load it with bh.load for adapters and the like"
                )

    def is_altered(self, block: nn.Module) -> bool:
        """Tells whether values of a block are altered whenever it comes."""
        return bool(self._alterations.get(self.names[block]))

    def check_can_hold_all(self, why: str) -> None:
        """Refuses what needs all blocks in memory; see `BlockStore.check_can_hold_all`."""
        raise ValueError(f"{why}, and the model is streamed: have it in memory (bh.load)")

    @contextmanager
    def altered(self, alter: Alter) -> Iterator[None]:
        """Has values of blocks altered in memory whenever they come, within; one that is written and adopted stays as that is."""
        self.release()
        before = self._alterations
        self._alterations = {name: [*before.get(name, ()), alter] for name in self.blocks}
        try:
            yield
        finally:
            self._alterations = before
            self._changed = False
            self.release()

    @contextmanager
    def computing_with(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Has the model compute with other values within; those of parameters in blocks are read whenever these come."""
        self.release()
        before, new = self._instead, LazyTensors.of(values)
        away = [name for name in new if self.block_of(name) is not None]
        self._instead = before | LazyTensors({name: new.reads[name] for name in away})
        try:
            with super().computing_with(new.without(away)):
                yield
        finally:
            self._changed = False
            self.release()
            self._instead = before

    def change(self, block: nn.Module, note: object = None) -> None:
        """Has the block that is here, which has changed, written when it goes, with a note in plain data."""
        assert block is self.here, f"{self.names[block]} is gone: what was changed in it is lost"
        self._changed, self._note = True, note

    def release(self) -> None:
        """Has no block in memory; the one that was there is written first, if it has changed."""
        if self.here is None:
            return
        block, name = self.here, self.names[self.here]
        if self._changed:
            tensors = {own: parameter.detach() for own, parameter in _named_in(block, name)}
            self.written.write(name, as_in_files(self.model, tensors), self._note)
        gone = dict[int, nn.Parameter]()
        for part in block.modules():
            for key, own in part._parameters.items():
                if own is not None:
                    part._parameters[key] = gone.setdefault(id(own), _gone(own))
        if self._copies is not None:
            self._copies.leave()  # buffers stay in memory
        self.here = self._copies = None
        torch.clear_autocast_cache()  # which holds what was cast of the block
        if self._changed:
            self._changed = False
            self.adopt(name)
        self._passed.add(name)
        if self._told is not None:
            self._told(len(self._passed), len(self.blocks))

    @contextmanager
    def watched(self, told: Told) -> Iterator[None]:
        """Tells, within, how many blocks have come and gone since the last step began, and of how many."""
        self._passed, self._told = set(), told
        told(0, len(self.blocks))
        try:
            yield
        finally:
            self._told = None

    @contextmanager
    def step(self, key: str, more: Callable[[], str] = str) -> Iterator[None]:
        """Begins work that is written block by block; after an error blocks come as before, and what was written stays.

        Blocks that an earlier process has done are as they were before the step until they are adopted.
        """
        back, self._passed = self.way_back(), set()
        told_apart = f"{self._origin} {self._lost} {identity_of(self.model)} {self.device} {key} {more()}"
        self.done = self.written.begin(told_apart)
        self.reused += len(self.done)
        self._in_step = True
        try:
            yield
        except BaseException:
            back()
            if self.parts is not None and not self.adopted:  # or the blocks of an earlier step come from there
                self.parts.release()
            raise
        finally:
            self._in_step = False

    def known(self, block: nn.Module) -> tuple[LazyTensors, Any] | None:
        """Returns what an earlier process has written of a block in this step, with its note."""
        name = self.names[block]
        return (self._written(name), self.done[name]) if name in self.done else None

    def resumed(self, block: nn.Module, sizes: Mapping[str, tuple[int, ...]]) -> bool:
        """Has a block come as an earlier process has left it in this step; see `BlockStore.resumed`."""
        if (name := self.names[block]) not in self.done:
            return False
        self.adopt(name)
        self.resize(name, sizes)
        return True

    def stage(
        self, block: nn.Module | None, values: Mapping[str, Tensor], note: object = None, device: torch.device | None = None
    ) -> LazyTensors:
        """Writes new values of a block's parameters, unless an earlier process has; of what is in no block they stay here.

        Outside of a step they stay here, too.
        """
        del device
        if block is None or not self._in_step:
            return LazyTensors.of(values)
        if (name := self.names[block]) not in self.done:
            self.written.write(name, dict(values), note)
        return self._written(name)

    def _written(self, name: str) -> LazyTensors:
        path = self.written.path(name)
        return LazyTensors({key: partial(tensor_in, path, key) for key in self.written.keys(name)})

    def way_back(self) -> Callable[[], None]:
        """Returns what has blocks come, under the names that they have now, from where they come from now."""
        self.release()
        step = 0 if self.parts is None else self.parts.step
        files, keys, adopted, lost = self.files.copy(), dict(self.keys), dict(self.adopted), list(self._lost)
        alterations = dict(self._alterations)
        names, blocks, owner = dict(self.names), dict(self.blocks), dict(self.owner)
        sizes = {name: {own: tuple(one.shape) for own, one in _named_in(block, name)} for name, block in blocks.items()}

        def back() -> None:
            self._changed = False
            self.release()
            self._forget()
            self.files, self.keys, self.adopted, self._lost = files, keys, adopted, lost
            self.names, self.blocks, self.owner, self._alterations = names, blocks, owner, alterations
            for name, own in sizes.items():
                self.resize(name, own)
            if self.parts is not None:
                self.parts.step = step

        return back

    def follow(self) -> None:
        """Follows the model, which has lost blocks: the others come under the names that they have now.

        Raises:
            ValueError: If the names in the files do not number the blocks as the model does.
        """
        self.release()
        self._forget()
        now = {module: name for name, module in self.model.named_modules()}
        then = {name: now[block] for name, block in self.blocks.items() if block in now}
        moved = {key: renumbered(key, name, then[name]) for name in then for key in self.keys[name]}
        self.files.rename(moved, [key for name in self.blocks.keys() - then.keys() for key in self.keys[name]])
        self.keys = {"": self.keys[""]} | {new: [moved[key] for key in self.keys[name]] for name, new in then.items()}
        self.adopted = {name: path for name, path in self.adopted.items() if then.get(name) == name}  # others hold old names
        self.blocks = {new: self.blocks[name] for name, new in then.items()}
        self.names, self.owner = now, {part: block for block in self.blocks.values() for part in block.modules()}
        self._lost.append(then)

    def adopt(self, name: str) -> None:
        """Has a block come from what was written of it, from now on."""
        if self.blocks[name] is self.here:
            self.release()
        self._forget(name)
        path, keys = self.written.path(name), self.written.keys(name)
        self.files.move(self.keys[name], path, keys)
        self.keys[name], self.adopted[name] = list(keys), path
        self._alterations.pop(name, None)

    def resize(self, name: str, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Gives the parameters of a block that is not there the sizes that they have in its file."""
        for own, parameter in list(_named_in(self.blocks[name], name)):
            if tuple(parameter.shape) == tuple(sizes[own]):
                continue
            owner, _, key = own.rpartition(".")
            empty = torch.empty(sizes[own], dtype=parameter.dtype, device="meta")
            self.model.get_submodule(owner)._parameters[key] = nn.Parameter(empty, parameter.requires_grad)

    def write(self, folder: Path, turned: Collection[str] = ()) -> None:
        """Writes config, a file for what is in no block, a file for each block, and the index; see `BlockStore.write`."""
        self.release()
        self._turned = frozenset(turned)
        blocks, called = len(self.blocks), named_in(self.model, self.files) if turned else {}
        rest = {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta}
        save_state(self.model, folder, turned_in(rest, turned), max_shard_size=sys.maxsize)
        (folder / SAFE_WEIGHTS_NAME).rename(folder / _named(0, blocks))
        for number, name in enumerate(self.blocks, 1):
            file, keys = folder / _named(number, blocks), {key for key in self.keys[name] if called.get(key) in turned}
            file.unlink(missing_ok=True)  # what is written over might be a link to the file of a part
            if name in self.adopted and not keys:
                link(self.adopted[name], file)
            else:
                save_file(turned_in(self.files.read(self.keys[name]), keys), file, {"format": "pt"})
        write_index(folder)

    def settle(self, folder: Path) -> None:
        """Has blocks come from the checkpoint that was written of the model, and removes what was written on the way."""
        self._forget()
        if self.parts is not None:
            self.parts.remove()
        self.files, self.adopted, self._lost = Files(str(folder)), {}, []
        self.files.turned = frozenset(key for key, own in named_in(self.model, self.files).items() if own in self._turned)
        self.keys, self._origin = self._keys(), self.files.state

    def _load(self, keys: list[str], read: Mapping[str, Tensor] | None = None) -> None:
        """Loads tensors from the files, or those that have been read; those that are tied stay so."""
        tied = defaultdict[int, list[tuple[nn.Module, str]]](list)
        for module in self.model.modules():
            for key, own in module._parameters.items():
                if own is not None and own.is_meta:
                    tied[id(own)].append((module, key))
        with self.files.slices(keys) if read is None else nullcontext(read) as slices:
            load_some(self.model, slices)
        for places in tied.values():
            found = [own for module, key in places if (own := module._parameters[key]) is not None and not own.is_meta]
            for module, key in places if found else ():
                module._parameters[key] = found[0]

    @property
    def written(self) -> Parts:
        """Where changed blocks are written."""
        if self.parts is None:
            raise ValueError("model: it is streamed to be read only; say where it is written: bh.stream(folder, out)")
        return self.parts


def _named_in(block: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters of a block, once each, by the names that its model gives them."""
    return block.named_parameters(prefix=name)


def _gone(parameter: nn.Parameter) -> nn.Parameter:
    """Returns a parameter on meta in the place of one that goes."""
    return nn.Parameter(torch.empty_like(parameter.detach(), device="meta"), parameter.requires_grad)


def _named(number: int, blocks: int) -> str:
    """Names a file of the checkpoint as transformers does; the first holds what is in no block."""
    return f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors" if blocks else SAFE_WEIGHTS_NAME
