"""The store of a streamed model, which loads each block from files."""

import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from billhook.engine.loader_internals import initialize_buffers, load_tensors, names_in_model, save_state, to_file_format
from billhook.engine.parts import Parts, identity_of, tensor_in
from billhook.engine.quantized import Quantization
from billhook.engine.store import STORE, BlockStore
from billhook.engine.tensors import TensorFiles, renumbered, share_parameters, write_index
from billhook.engine.trees import Sizes, parameter_slots
from billhook.engine.walk import separable_blocks
from billhook.linalg import Indices, TensorsByName
from billhook.progress import OnProgress


class FileStore(BlockStore):
    """The store of a streamed model: blocks are read from safetensors files on demand.

    Parameters outside of blocks stay in memory after `open`. So do buffers, blocks with the model's first parameter, and blocks
    that share a weight with modules outside of them.

    Args:
        model: The model, on the meta device.
        files: The tensors of its checkpoint.
        parts: Writes changed blocks. None for a read-only model.
        quantization: How the files are quantized.

    Attributes:
        blocks: The blocks that are loaded on demand, by name.
        adopted: The current file of each changed block, by block name.
        done: Notes of the blocks that an earlier process finished in the current step, by block name.
    """

    model: PreTrainedModel
    holds_all = False
    trains = False
    in_files = True
    snapshot_attributes = ("files", "keys", "adopted", "names", "blocks", "owner", "_renames", "_alterations")

    def __init__(self, model: PreTrainedModel, files: TensorFiles, parts: Parts | None, quantization: Quantization) -> None:
        super().__init__(model)
        self.files, self.parts, self.quantization = files, parts, quantization
        self._copies: DeviceCopies | None = None
        self._ahead: Prefetcher[str, dict[str, Tensor]] | None = None  # on CUDA only
        self._in_step = False
        self._overlay = LazyTensors({})  # temporary values of parameters in blocks
        self.adopted = dict[str, Path]()
        self._report: OnProgress | None = None
        self._passed = set[str]()
        self.done = dict[str, Any]()
        self._renames = list[dict[str, str]]()  # new names by old name, for each removal of blocks
        first = next(model.parameters())  # its device is the device of the model
        apart = separable_blocks(model, parameter_slots(model))
        self._index(model, [block for block in apart if all(parameter is not first for parameter in block.parameters())])
        self.keys = self._keys()
        self._origin = files.state
        setattr(model, STORE, self)

    def open(self, share_with: PreTrainedModel | None = None) -> None:
        """Loads parameters outside of blocks, and installs forwards that load blocks.

        Args:
            share_with: A model in memory. Bitwise identical parameters are shared with it instead of loaded.
        """
        initialize_buffers(self.model, self._parameter_of().values())
        stay = self.keys[""]
        self._load(stay if share_with is None else share_parameters(self.model, share_with, self.files, stay))
        # replaced forwards, not hooks: a hook cannot run the block without gradients
        for module in self.model.modules():
            if module not in self.owner and isinstance(module, nn.Linear):
                vars(module)["forward"] = OffloadedForward(self, module, module.forward)
        for module, block in self.owner.items():
            if module is block:
                vars(block)["forward"] = InferenceForward(self, block, block.forward)
            elif module._parameters:  # a module may be called without its block
                module.register_forward_pre_hook(LoadHook(self.load, block))

    def _parameter_of(self) -> dict[str, str]:
        """Returns the parameter or buffer of each tensor in the files."""
        stored = self.quantization.stored(set(self.files))
        return {key: parameter for name, parameter in names_in_model(self.model, stored).items() for key in stored[name]}

    def _keys(self) -> dict[str, list[str]]:
        """Returns the names of tensors in the files by block name, with "" for none."""
        block_of = {}  # by parameter; buffers always stay in memory
        for (module, key), _ in parameter_slots(self.model):
            if module in self.owner:
                block_of[f"{self.names[module]}.{key}"] = self.names[self.owner[module]]
        keys: dict[str, list[str]] = {name: [] for name in ("", *self.blocks)}
        for key, parameter in self._parameter_of().items():
            keys[block_of.get(parameter, "")].append(key)
        return keys

    def _load_block(self, block: nn.Module) -> None:
        name = self.names[block]
        for inside, part in block.named_modules(prefix=name):
            if part not in self.owner and part._parameters:
                raise ValueError(
                    f"model: {inside} was added to a streamed model, whose blocks are defined by their files. "
                    "Use bh.load for models with adapters or other new modules."
                )
        self._load(self.keys[name], None if self._ahead is None else self._ahead.take(name))
        names = list(self.blocks)  # the next block's tensors are read by a thread, or into the page cache
        following = names[(names.index(name) + 1) % len(names)]
        keys = self.keys[following]
        # files on the Hub are not prefetched: the thread would wait without a visible reason
        if self.device is not None and following != name and DeviceCopies.prefetches(self.device) and self.files.are_local:
            self._ahead = self._ahead or Prefetcher()
            self._ahead.begin(following, partial(read_pinned, partial(self.files.read, keys), self.device))
        else:
            self.files.read_ahead(keys)
        if self.device is not None:
            self._copies = DeviceCopies(self.device)
            self._copies.enter(block)

    def _alter(self, block: nn.Module) -> None:
        super()._alter(block)
        for module in block.modules():
            for name, value in self._overlay.of_module(self.names[module]).items():
                parameter = module.get_parameter(name)
                if module._parameters:
                    parameter.data = value.to(parameter.device)
                else:  # a view of another module's parameter
                    parameter.data.copy_(value)

    def _forget(self, name: str | None = None) -> None:
        """Discards prefetched tensors of a block (default: any) that are out of date."""
        if self._ahead is not None:
            self._ahead.forget(name)

    @contextmanager
    def on(self, device: torch.device, blocks: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Runs blocks on a device as they are read. See `BlockStore.on`."""
        self.release()
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.release()
            self._forget()
            self.device, self._ahead = before, None

    def check_can_hold_all(self, why: str, instead: str = "") -> None:
        """Raises, because not all blocks fit in memory. See `BlockStore.check_can_hold_all`."""
        raise ValueError(f"{why}, which a streamed model does not support. Load the model in memory with bh.load{instead}.")

    @contextmanager
    def computing_with(self, values: TensorsByName) -> Iterator[None]:
        """Replaces parameter values within the context. Values in blocks are read on every load."""
        self.release()
        before, new = self._overlay, LazyTensors.of(values)
        away = [name for name in new if self.block_of(name) is not None]
        self._overlay = before | LazyTensors({name: new.reads[name] for name in away})
        try:
            with super().computing_with(new.without(away)):
                yield
        finally:
            self._changed = False  # the loaded block has other values for this context only
            self.release()
            self._overlay = before

    def release(self) -> None:
        """Writes the loaded block if it has changed, and frees its memory."""
        if not self.loaded:
            return
        block = self.loaded[0]
        name = self.names[block]
        if self._changed:
            tensors = {key: parameter.detach() for key, parameter in block.named_parameters(prefix=name)}
            self.written.write(name, to_file_format(self.model, tensors), self._note)
        empty = {}  # tied weights stay tied
        for (module, key), parameter in list(parameter_slots(block)):
            if parameter not in empty:
                empty[parameter] = nn.Parameter(torch.empty_like(parameter.detach(), device="meta"), parameter.requires_grad)
            module._parameters[key] = empty[parameter]
        if self._copies is not None:
            self._copies.leave()  # buffers stay in memory
        self.loaded, self._copies = [], None
        torch.clear_autocast_cache()  # holds casts of the block
        if self._changed:
            self._changed = False
            self.adopt(name)
        self._passed.add(name)
        if self._report is not None:
            self._report(len(self._passed), len(self.blocks))

    @contextmanager
    def reporting(self, report: OnProgress) -> Iterator[None]:
        """Reports the number of processed blocks since the last step began, and their total."""
        self._passed, self._report = set(), report
        report(0, len(self.blocks))
        try:
            yield
        finally:
            self._report = None

    @contextmanager
    def step(self, key: str, more: Callable[[], str] = str) -> Iterator[None]:
        """Starts work that is written block by block. After an error, written blocks stay on disk.

        Blocks that an earlier process has done are as they were before the step until they are adopted.
        """
        restore, self._passed = self.snapshot(), set()
        # everything that decides the written values: the journal of other work must not be reused
        self.done = self.written.begin(f"{self._origin} {self._renames} {identity_of(self.model)} {self.device} {key} {more()}")
        self.reused += len(self.done)
        self._in_step = True
        try:
            yield
        except BaseException:
            restore()
            if self.parts is not None and not self.adopted:  # unless blocks of an earlier step are read from it
                self.parts.release()
            raise
        finally:
            self._in_step = False

    def read_staged(self, block: nn.Module) -> tuple[LazyTensors, Any] | None:
        """Returns the values that an earlier process wrote for a block in this step, with a note."""
        name = self.names[block]
        return (self._written(name), self.done[name]) if name in self.done else None

    def resume_block(self, block: nn.Module, sizes: Sizes) -> bool:
        """Adopts a block that an earlier process finished in this step."""
        if (name := self.names[block]) not in self.done:
            return False
        self.adopt(name)
        self.resize(name, sizes)
        return True

    def stage(
        self, block: nn.Module | None, values: TensorsByName, note: object = None, device: torch.device | None = None
    ) -> LazyTensors:
        """Writes a block's new values, unless an earlier process has. Other values stay in memory.

        So do all values outside of a step. See `BlockStore.stage`.
        """
        if block is None or not self._in_step:
            return LazyTensors.of(values)
        if (name := self.names[block]) not in self.done:
            self.written.write(name, dict(values), note)
        return self._written(name)

    def _written(self, name: str) -> LazyTensors:
        path = self.written.path(name)
        return LazyTensors({key: partial(tensor_in, path, key) for key in self.written.keys(name)})

    def snapshot(self) -> Callable[[], None]:
        """Returns a function that restores the files, names, and sizes that blocks have now."""
        restore, step = super().snapshot(), 0 if self.parts is None else self.parts.step
        sizes = {
            name: {key: tuple(parameter.shape) for key, parameter in block.named_parameters(prefix=name)}
            for name, block in self.blocks.items()
        }

        def restore_all() -> None:
            restore()
            self._forget()
            for name, shapes in sizes.items():
                self.resize(name, shapes)
            if self.parts is not None:
                self.parts.step = step

        return restore_all

    def reindex(self) -> None:
        """Renames the remaining blocks after blocks were removed from the model.

        Raises:
            ValueError: If the files do not number blocks as the model does.
        """
        self.release()
        self._forget()
        names = {module: name for name, module in self.model.named_modules()}
        new_names, renamed, removed, keys = {}, {}, [], {"": self.keys[""]}
        for name, block in self.blocks.items():
            if block not in names:
                removed += self.keys[name]
                continue
            new_names[name] = new = names[block]
            keys[new] = []
            for key in self.keys[name]:
                renamed[key] = renumbered(key, name, new)
                keys[new].append(renamed[key])
        self.files.rename(renamed, frozenset(removed))
        if self.quantization.method and (dense := self.model.config.quantization_config.get("modules_to_not_convert")):
            left = []
            for module in dense:
                name = next((name for name in self.blocks if f"{module}.".startswith(f"{name}.")), "")
                if name in {"", *new_names}:
                    left.append(new_names.get(name, "") + module.removeprefix(name))
            self.model.config.quantization_config = self.model.config.quantization_config | {"modules_to_not_convert": left}
        self.keys = keys
        # files of renamed blocks contain the old names
        self.adopted = {name: path for name, path in self.adopted.items() if new_names.get(name) == name}
        self._index(self.model, list(map(self.blocks.__getitem__, new_names)))
        self._renames.append(new_names)

    def adopt(self, name: str) -> None:
        """Reads a block from its written file from now on."""
        if self.blocks[name] in self.loaded:
            self.release()
        self._forget(name)
        path, keys = self.written.path(name), self.written.keys(name)
        self.files.move(self.keys[name], path, keys)
        self.keys[name], self.adopted[name] = list(keys), path
        self._alterations.pop(self.blocks[name], None)

    def resize(self, name: str, sizes: Sizes) -> None:
        """Gives an unloaded block the parameter sizes that its file has."""
        for name_in_model, parameter in list(self.blocks[name].named_parameters(prefix=name)):
            if tuple(parameter.shape) != tuple(sizes[name_in_model]):
                module, _, key = name_in_model.rpartition(".")
                empty = torch.empty(sizes[name_in_model], dtype=parameter.dtype, device="meta")
                self.model.get_submodule(module)._parameters[key] = nn.Parameter(empty, parameter.requires_grad)

    def check_writes_values(self) -> None:
        """Raises if the files are quantized. See `BlockStore.check_writes_values`."""
        if self.quantization.method:
            raise ValueError(
                f"model: its files are quantized ({self.quantization.method}), so only experts and blocks can be removed, "
                "without a repair. Dequantize the checkpoint first to change its weights."
            )

    def select(self, kept: Mapping[str, Mapping[int, Indices]], sizes: Sizes) -> set[str] | None:
        """Leaves out positions of parameters in quantized files. See `BlockStore.select`."""
        if not self.quantization.method:
            return None
        self.release()
        self._forget()
        renamed, removed = {}, set()
        for key, parameter in self._parameter_of().items():
            of_expert = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", key)
            for dim, positions in kept.get(parameter, {}).items():
                if of_expert is None:
                    self.files.select(key, dim, torch.from_numpy(positions))
                elif (number := int(of_expert[2])) in (left := positions.tolist()):
                    renamed[key] = f"{of_expert[1]}{left.index(number)}{of_expert[3]}"
                else:
                    removed.add(key)
        self.files.rename(renamed, removed)
        self.keys = {name: [renamed.get(key, key) for key in keys if key not in removed] for name, keys in self.keys.items()}
        for name in self.blocks:
            self.resize(name, sizes)
        return {name for name in kept if self.block_of(name) is not None}

    def write(self, folder: Path) -> None:
        """Writes the config, a file per block, and the index. See `BlockStore.write`."""
        self.release()
        blocks, parameter_of = len(self.blocks), self._parameter_of()
        if self.quantization.method:
            save_state(self.model, folder, {})  # only the config
            for number, keys in enumerate(self.keys.values()):
                save_file(self.files.read(keys), folder / _file_name(number, blocks), {"format": "pt"})
            write_index(folder)
            return
        rest = {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta}
        save_state(self.model, folder, rest, max_shard_size=sys.maxsize)
        (folder / SAFE_WEIGHTS_NAME).rename(folder / _file_name(0, blocks))
        for number, name in enumerate(self.blocks, 1):
            file = folder / _file_name(number, blocks)
            file.unlink(missing_ok=True)  # an old file may be a hard link to a block's file
            if name in self.adopted:
                try:
                    file.hardlink_to(self.adopted[name])
                except OSError:  # the file system has no hard links
                    shutil.copyfile(self.adopted[name], file)
            else:
                read = self.files.read(self.keys[name])  # in the dtypes of the source
                tensors = {key: tensor.to(self.model.get_parameter(parameter_of[key]).dtype) for key, tensor in read.items()}
                save_file(tensors, file, {"format": "pt"})
        write_index(folder)

    def reopen(self, folder: Path) -> None:
        """Reads blocks from the saved checkpoint from now on, and removes the intermediate files."""
        self._forget()
        if self.parts is not None:
            self.parts.remove()
        self.files, self.adopted, self._renames = TensorFiles(str(folder)), {}, []
        self.keys, self._origin = self._keys(), self.files.state

    def _load(self, keys: list[str], prefetched: TensorsByName | None = None) -> None:
        """Loads tensors from the files, or tensors that were read before. Tied weights stay tied."""
        slots_of = defaultdict(list)
        for slot, parameter in parameter_slots(self.model):
            if parameter.is_meta:
                slots_of[parameter].append(slot)
        with self.files.slices(keys) if prefetched is None else nullcontext(prefetched) as slices:
            load_tensors(self.model, self.quantization.dequantized(slices))
        for slots in slots_of.values():
            parameters = [module.get_parameter(key) for module, key in slots]
            arrived = [parameter for parameter in parameters if not parameter.is_meta]
            for module, key in slots if arrived else ():
                module._parameters[key] = arrived[0]

    @property
    def written(self) -> Parts:
        """The writer of changed blocks.

        Raises:
            ValueError: If there is no output folder.
        """
        self.check_writes_values()
        if self.parts is None:
            raise ValueError("out=None: the streamed model is read-only. Pass an output folder: bh.stream(folder, out).")
        return self.parts


def _file_name(number: int, blocks: int) -> str:
    """Returns a file name in the style of transformers. Number 0 is outside of blocks."""
    return f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors" if blocks else SAFE_WEIGHTS_NAME
