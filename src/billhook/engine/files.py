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

from billhook.engine.device import DeviceCopies, Prefetcher, read_pinned
from billhook.engine.forwards import InferenceForward, LoadHook, OffloadedForward
from billhook.engine.lazy import LazyTensors
from billhook.engine.loader_internals import (
    initialize_buffers,
    load_tensors,
    made_by_class,
    names_in_model,
    save_state,
    to_file_format,
)
from billhook.engine.parts import Parts, identity_of, link_or_copy, tensor_in
from billhook.engine.sharding import Slot, parameter_slots
from billhook.engine.store import STORE, BlockStore, with_transposed
from billhook.engine.tensors import TensorFiles, renumbered, share_parameters, write_index
from billhook.engine.walk import separable_blocks
from billhook.progress import OnProgress


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
    kept = ("files", "keys", "adopted", "names", "blocks", "owner", "_lost", "_alterations")

    def __init__(self, model: PreTrainedModel, files: TensorFiles, parts: Parts | None) -> None:
        super().__init__(model)
        self.files, self.parts = files, parts
        self._copies: DeviceCopies | None = None
        self._ahead: Prefetcher[str, dict[str, Tensor]] | None = None  # on CUDA only
        self._in_step = False
        self._transposed = frozenset[str]()  # in the last checkpoint that was written
        self._overlay = LazyTensors({})  # what parameters of blocks have for values, meanwhile
        self.adopted = dict[str, Path]()
        self._report: OnProgress | None = None
        self._passed = set[str]()
        self.done = dict[str, Any]()
        self._lost = list[dict[str, str]]()  # each time that blocks were removed, the others by their names before and after
        first = next(model.parameters())  # which models ask for the device that they are on
        apart = separable_blocks(model, parameter_slots(model))
        self._index(model, [block for block in apart if all(parameter is not first for parameter in block.parameters())])
        self.keys = self._keys()
        self._origin = files.state
        setattr(model, STORE, self)

    def open(self, beside: PreTrainedModel | None = None) -> None:
        """Loads what stays in memory, except for what a model beside this one has, and has blocks come when they are called."""
        initialize_buffers(self.model, made_by_class(self.model, names_in_model(self.model, self.files).values()))
        stay = self.keys[""]
        self._load(stay if beside is None else share_parameters(self.model, beside, self.files, stay))
        # forwards are replaced, as a hook could not have the block compute without gradients
        for module in self.model.modules():
            if module not in self.owner and isinstance(module, nn.Linear):
                vars(module)["forward"] = OffloadedForward(self, module, module.forward)
        for module, block in self.owner.items():
            if module is block:
                vars(block)["forward"] = InferenceForward(self, block, block.forward)
            elif next(module.parameters(recurse=False), None) is not None:  # it may be called while its block is not
                module.register_forward_pre_hook(LoadHook(self.load, block))

    def _keys(self) -> dict[str, list[str]]:
        """Returns the names of tensors in the files, by the block that they are in, or ""."""
        block_of = dict[str, str]()  # the block of each parameter: buffers stay in memory, also those of blocks
        for (module, key), _ in parameter_slots(self.model):
            if module in self.owner:
                block_of[f"{self.names[module]}.{key}"] = self.names[self.owner[module]]
        keys: dict[str, list[str]] = {name: [] for name in ("", *self.blocks)}
        for key, parameter in names_in_model(self.model, self.files).items():
            keys[block_of.get(parameter, "")].append(key)
        return keys

    def _bring(self, block: nn.Module) -> None:
        self._check_known(block)
        name = self.names[block]
        self._load(self.keys[name], None if self._ahead is None else self._ahead.take(name))
        self._read_ahead(name)
        if self.device is not None:
            self._copies = DeviceCopies(self.device)
            self._copies.enter(block)

    def _alter(self, block: nn.Module) -> None:
        super()._alter(block)
        for name, value in self._overlay.under({self.names[module] for module in block.modules()}).items():
            parameter = self.model.get_parameter(name)
            parameter.data = value.to(parameter.device)

    def _read_ahead(self, name: str) -> None:
        """Has the tensors of the block after one read while this one computes: by a thread, or into pages of the system alone."""
        names = list(self.blocks)
        following = names[(names.index(name) + 1) % len(names)]
        keys = self.keys[following]
        # what must be fetched first is not read ahead: nobody would see why the thread waits
        if self.device is not None and following != name and DeviceCopies.prefetches(self.device) and self.files.are_local:
            self._ahead = self._ahead or Prefetcher()
            self._ahead.begin(following, partial(read_pinned, partial(self.files.read, keys), self.device))
        else:
            self.files.read_ahead(keys)

    def _forget(self, name: str | None = None) -> None:
        """Lets go of a block, or any, that was read ahead: its tensors come from elsewhere, or under other names, from now on."""
        if self._ahead is not None:
            self._ahead.forget(name)

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
            self.device, self._ahead = before, None

    def _check_known(self, block: nn.Module) -> None:
        """Refuses a block with modules that have come since the model was loaded, such as adapters; nothing is read for it."""
        for name, part in block.named_modules(prefix=self.names[block]):
            if part not in self.owner and part._parameters:
                raise ValueError(
                    f"model: {name} was added to it, and the model is streamed, so that its files alone say what a block holds: "
                    "load it with bh.load for adapters and the like"
                )

    def check_can_hold_all(self, why: str) -> None:
        """Refuses what needs all blocks in memory; see `BlockStore.check_can_hold_all`."""
        raise ValueError(f"{why}, and the model is streamed: have it in memory (bh.load)")

    @contextmanager
    def computing_with(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Has the model compute with other values within; those of parameters in blocks are read whenever these come."""
        self.release()
        before, new = self._overlay, LazyTensors.of(values)
        away = [name for name in new if self.block_of(name) is not None]
        self._overlay = before | LazyTensors({name: new.reads[name] for name in away})
        try:
            with super().computing_with(new.without(away)):
                yield
        finally:
            self._changed = False  # the block that is still here has other values for this while alone
            self.release()
            self._overlay = before

    def release(self) -> None:
        """Has no block in memory; the one that was there is written first, if it has changed."""
        if not self.loaded:
            return
        block = self.loaded[0]
        name = self.names[block]
        if self._changed:
            tensors = {key: parameter.detach() for key, parameter in block.named_parameters(prefix=name)}
            self.written.write(name, to_file_format(self.model, tensors), self._note)
        empty = dict[nn.Parameter, nn.Parameter]()  # those that are tied stay so
        for (module, key), parameter in list(parameter_slots(block)):
            if parameter not in empty:
                empty[parameter] = nn.Parameter(torch.empty_like(parameter.detach(), device="meta"), parameter.requires_grad)
            module._parameters[key] = empty[parameter]
        if self._copies is not None:
            self._copies.leave()  # buffers stay in memory
        self.loaded, self._copies = [], None
        torch.clear_autocast_cache()  # which holds what was cast of the block
        if self._changed:
            self._changed = False
            self.adopt(name)
        self._passed.add(name)
        if self._report is not None:
            self._report(len(self._passed), len(self.blocks))

    @contextmanager
    def watched(self, report: OnProgress) -> Iterator[None]:
        """Reports, within, how many blocks have come and gone since the last step began, and of how many."""
        self._passed, self._report = set(), report
        report(0, len(self.blocks))
        try:
            yield
        finally:
            self._report = None

    @contextmanager
    def step(self, key: str, more: Callable[[], str] = str) -> Iterator[None]:
        """Begins work that is written block by block; after an error blocks come as before, and what was written stays.

        Blocks that an earlier process has done are as they were before the step until they are adopted.
        """
        back, self._passed = self.snapshot(), set()
        # whatever decides the values that are written: a journal of other work must not be taken for this one's
        self.done = self.written.begin(f"{self._origin} {self._lost} {identity_of(self.model)} {self.device} {key} {more()}")
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

    def snapshot(self) -> Callable[[], None]:
        """Returns what has blocks come, under the names and in the sizes that they have now, from where they come from now."""
        restore, step = super().snapshot(), 0 if self.parts is None else self.parts.step
        sizes = {
            name: {key: tuple(parameter.shape) for key, parameter in block.named_parameters(prefix=name)}
            for name, block in self.blocks.items()
        }

        def back() -> None:
            restore()
            self._forget()
            for name, shapes in sizes.items():
                self.resize(name, shapes)
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
        then, moved, removed, keys = dict[str, str](), dict[str, str](), list[str](), {"": self.keys[""]}
        for name, block in self.blocks.items():
            if block not in now:
                removed += self.keys[name]
                continue
            then[name] = now[block]
            moved |= {key: renumbered(key, name, now[block]) for key in self.keys[name]}
            keys[now[block]] = [moved[key] for key in self.keys[name]]
        self.files.rename(moved, frozenset(removed))
        self.keys = keys
        self.adopted = {name: path for name, path in self.adopted.items() if then.get(name) == name}  # others hold old names
        self._index(self.model, [self.blocks[name] for name in then])
        self._lost.append(then)

    def adopt(self, name: str) -> None:
        """Has a block come from what was written of it, from now on."""
        if self.blocks[name] in self.loaded:
            self.release()
        self._forget(name)
        path, keys = self.written.path(name), self.written.keys(name)
        self.files.move(self.keys[name], path, keys)
        self.keys[name], self.adopted[name] = list(keys), path
        self._alterations.pop(self.blocks[name], None)

    def resize(self, name: str, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Gives the parameters of a block that is not there the sizes that they have in its file."""
        for name_in_model, parameter in list(self.blocks[name].named_parameters(prefix=name)):
            if tuple(parameter.shape) != tuple(sizes[name_in_model]):
                module, _, key = name_in_model.rpartition(".")
                empty = torch.empty(sizes[name_in_model], dtype=parameter.dtype, device="meta")
                self.model.get_submodule(module)._parameters[key] = nn.Parameter(empty, parameter.requires_grad)

    def write(self, folder: Path, transposed: Collection[str] = ()) -> None:
        """Writes config, a file for what is in no block, a file for each block, and the index; see `BlockStore.write`."""
        self.release()
        self._transposed = frozenset(transposed)
        blocks, parameter_of = len(self.blocks), names_in_model(self.model, self.files) if transposed else {}
        rest = {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta}
        save_state(self.model, folder, with_transposed(rest, transposed), max_shard_size=sys.maxsize)
        (folder / SAFE_WEIGHTS_NAME).rename(folder / _file_name(0, blocks))
        for number, name in enumerate(self.blocks, 1):
            file = folder / _file_name(number, blocks)
            keys = {key for key in self.keys[name] if parameter_of.get(key) in transposed}
            file.unlink(missing_ok=True)  # what is written over might be a link to the file of a part
            if name in self.adopted and not keys:
                link_or_copy(self.adopted[name], file)
            else:
                save_file(with_transposed(self.files.read(self.keys[name]), keys), file, {"format": "pt"})
        write_index(folder)

    def settle(self, folder: Path) -> None:
        """Has blocks come from the checkpoint that was written of the model, and removes what was written on the way."""
        self._forget()
        if self.parts is not None:
            self.parts.remove()
        self.files, self.adopted, self._lost = TensorFiles(str(folder)), {}, []
        parameter_of = names_in_model(self.model, self.files)
        self.files.transposed = frozenset(key for key, name in parameter_of.items() if name in self._transposed)
        self.keys, self._origin = self._keys(), self.files.state

    def _load(self, keys: list[str], read: Mapping[str, Tensor] | None = None) -> None:
        """Loads tensors from the files, or those that have been read; those that are tied stay so."""
        tied = defaultdict[nn.Parameter, list[Slot]](list)
        for place, parameter in parameter_slots(self.model):
            if parameter.is_meta:
                tied[parameter].append(place)
        with self.files.slices(keys) if read is None else nullcontext(read) as slices:
            load_tensors(self.model, slices)
        for places in tied.values():
            parameters = [module.get_parameter(key) for module, key in places]
            arrived = [parameter for parameter in parameters if not parameter.is_meta]
            for module, key in places if arrived else ():
                module._parameters[key] = arrived[0]

    @property
    def written(self) -> Parts:
        """Where changed blocks are written."""
        if self.parts is None:
            raise ValueError("model: it is streamed to be read only; say where it is written: bh.stream(folder, out)")
        return self.parts


def _file_name(number: int, blocks: int) -> str:
    """Names a file of the checkpoint as transformers does; the first holds what is in no block."""
    return f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors" if blocks else SAFE_WEIGHTS_NAME
