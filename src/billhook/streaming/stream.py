"""A model of which one block at a time is in memory: each comes from files when it computes, and goes when another one does."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from billhook.bar import Told
from billhook.model.transformers_internals import (
    as_in_files,
    everything_saved,
    initialize_buffers,
    is_joined_unevenly,
    load_some,
    named_in,
)
from billhook.running.walk import blocks_of
from billhook.streaming.files import Files, write_index
from billhook.streaming.parts import Parts, link

STREAM = "_billhook_stream"
"""The attribute of a model that holds its stream."""


class Stream:
    """Where the blocks of a model on meta come from, and where changed ones go; nothing is read before it is opened.

    All that is in no block then stays in memory, and so do buffers, and blocks that hold the model's first parameter or share a
    weight with something outside of them.

    Args:
        model: The model, on meta.
        files: The tensors of its checkpoint.
        parts: Where changed blocks are written; None for a model that is only read.
    """

    def __init__(self, model: PreTrainedModel, files: Files, parts: Parts | None) -> None:
        self.model, self.files, self.parts = model, files, parts
        self.here: nn.Module | None = None
        self._changed = False
        self._note: object = None
        self._adopted = dict[str, Path]()  # the files that hold blocks as they are now
        self._told: Told | None = None
        self._passed = set[str]()
        self.names = names = {module: name for name, module in model.named_modules()}
        self.blocks: dict[str, nn.Module] = {names[block]: block for block in blocks_of(model) if self._is_apart(block)}
        self.owner = {part: block for block in self.blocks.values() for part in block.modules()}
        self.keys = self._keys()
        self._origin = files.state
        setattr(model, STREAM, self)

    def open(self) -> None:
        """Loads what stays in memory, and has blocks come when they are called."""
        initialize_buffers(self.model)
        self._load(self.keys[""])
        for module, block in self.owner.items():
            if module is block:
                vars(block)["forward"] = partial(self._compute, block, block.forward)
            elif any(own is not None for own in module._parameters.values()):  # some are called, and their block is not
                module.register_forward_pre_hook(partial(self._before, block))

    def _keys(self) -> dict[str, list[str]]:
        """Returns the names of tensors in the files, by the block that they are in, or ""."""
        names = self.names
        of = {f"{names[part]}.{key}": names[block] for part, block in self.owner.items() for key in part._parameters}
        found: dict[str, list[str]] = {name: [] for name in ("", *self.blocks)}
        for key, own in named_in(self.model, self.files).items():
            found[of.get(own, "")].append(key)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "Stream":
        """Returns one without blocks: a copy of the model, as on meta, has no files."""
        idle = object.__new__(Stream)
        memo[id(self)] = idle
        idle.blocks, idle.owner, idle.here = {}, {}, None
        return idle

    def _is_apart(self, block: nn.Module) -> bool:
        """Tells whether only a block itself ever needs its parameters."""
        inside = set(block.modules())
        own = {id(parameter) for parameter in block.parameters()}
        others = (module for module in self.model.modules() if module not in inside)
        if id(next(self.model.parameters())) in own:  # which models ask for the device that they are on
            return False
        return bool(own) and not any(id(one) in own for module in others for one in module._parameters.values())

    def _compute(self, block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever it takes
        self.bring(block)
        return forward(*args, **kwargs)

    def _before(self, block: nn.Module, *_: object) -> None:
        self.bring(block)

    def bring(self, module: nn.Module) -> nn.Module | None:
        """Has the block of a module in memory, and no other, and returns it; what is outside of blocks is always there."""
        block = self.owner.get(module)
        if block is not None and block is not self.here:
            self.leave()
            self._load(self.keys[self.names[block]])
            self.here = block
        return block

    def change(self, block: nn.Module, note: object = None) -> None:
        """Has the block that is here, which has changed, written when it goes, with a note in plain data."""
        assert block is self.here, f"{self.names[block]} is gone: what was changed in it is lost"
        self._changed, self._note = True, note

    def leave(self) -> None:
        """Has no block in memory; the one that was there is written first, if it has changed."""
        if self.here is None:
            return
        block, name = self.here, self.names[self.here]
        if self._changed:
            tensors = {own: parameter.detach() for own, parameter in _named_in(block, name)}
            self._written.write(name, as_in_files(self.model, tensors), self._note)
        gone = dict[int, nn.Parameter]()
        for part in block.modules():
            for key, own in part._parameters.items():
                if own is not None:
                    part._parameters[key] = gone.setdefault(id(own), _gone(own))
        self.here = None
        if self._changed:
            self._changed = False
            self.adopt(name)
        self._passed.add(name)
        if self._told is not None:
            self._told(len(self._passed), len(self.blocks))

    @contextmanager
    def watched(self, told: Told) -> Iterator[None]:
        """Tells, within, how many blocks have come and gone, and of how many."""
        self._passed, self._told = set(), told
        told(0, len(self.blocks))
        try:
            yield
        finally:
            self._told = None

    def begin(self, key: str) -> dict[str, Any]:
        """Begins a step in which blocks change; returns those that an earlier process has done, with its notes.

        They are as they were before the step until they are adopted.
        """
        self.leave()
        sizes = {name: {own: tuple(one.shape) for own, one in _named_in(block, name)} for name, block in self.blocks.items()}
        self._earlier = self.files.copy(), dict(self.keys), dict(self._adopted), sizes
        return self._written.begin(f"{self._origin} {key}")

    @contextmanager
    def undone_by_errors(self) -> Iterator[None]:
        """Has blocks come from where they came from before the step, if an error is raised within; what was written stays."""
        try:
            yield
        except BaseException:
            self._changed = False
            self.leave()
            self.files, self.keys, self._adopted, sizes = self._earlier
            for name, own in sizes.items():
                self.resize(name, own)
            self._written.go_back()
            raise

    def adopt(self, name: str) -> None:
        """Has a block come from what was written of it, from now on."""
        if self.blocks[name] is self.here:
            self.leave()
        path, keys = self._written.path(name), self._written.keys(name)
        self.files.move(self.keys[name], path, keys)
        self.keys[name], self._adopted[name] = list(keys), path

    def resize(self, name: str, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Gives the parameters of a block that is not there the sizes that they have in its file."""
        for own, parameter in list(_named_in(self.blocks[name], name)):
            owner, _, key = own.rpartition(".")
            empty = torch.empty(sizes[own], dtype=parameter.dtype, device="meta")
            self.model.get_submodule(owner)._parameters[key] = nn.Parameter(empty, parameter.requires_grad)

    def write(self, folder: Path) -> None:
        """Writes the checkpoint: config, a file for what is in no block, a file for each block, and the index."""
        self.leave()
        rest = {name: tensor for name, tensor in self.model.state_dict().items() if not tensor.is_meta}
        with everything_saved(self.model):
            self.model.save_pretrained(
                folder, state_dict=rest, max_shard_size=sys.maxsize, save_original_format=not is_joined_unevenly(self.model)
            )
        (folder / SAFE_WEIGHTS_NAME).rename(folder / _named(0, len(self.blocks)))
        for number, name in enumerate(self.blocks, 1):
            file = folder / _named(number, len(self.blocks))
            if name in self._adopted:
                link(self._adopted[name], file)
            else:
                save_file(self.files.read(self.keys[name]), file, {"format": "pt"})
        write_index(folder)

    def settle(self, folder: Path) -> None:
        """Has blocks come from the checkpoint that was written of the model, and removes what was written on the way."""
        if self.parts is not None:
            self.parts.remove()
        self.files, self._adopted = Files(str(folder)), {}
        self.keys, self._origin = self._keys(), self.files.state

    def _load(self, keys: list[str]) -> None:
        """Loads tensors from the files; those that are tied stay so."""
        tied = defaultdict[int, list[tuple[nn.Module, str]]](list)
        for module in self.model.modules():
            for key, own in module._parameters.items():
                if own is not None and own.is_meta:
                    tied[id(own)].append((module, key))
        with self.files.slices(keys) as slices:
            load_some(self.model, slices)
        for places in tied.values():
            found = [own for module, key in places if (own := module._parameters[key]) is not None and not own.is_meta]
            for module, key in places if found else ():
                module._parameters[key] = found[0]

    @property
    def _written(self) -> Parts:
        if self.parts is None:
            raise ValueError("model: it is streamed to be read only; say where it is written: bh.stream(folder, out)")
        return self.parts


def _named(number: int, blocks: int) -> str:
    """Names a file of the checkpoint as transformers does; the first holds what is in no block."""
    return f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors" if blocks else SAFE_WEIGHTS_NAME


def _named_in(block: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters of a block, once each, by the names that its model gives them."""
    return block.named_parameters(prefix=name)


def _gone(parameter: nn.Parameter) -> nn.Parameter:
    """Returns a parameter on meta in the place of one that goes."""
    return nn.Parameter(torch.empty_like(parameter.detach(), device="meta"), parameter.requires_grad)


def stream_of(model: nn.Module) -> Stream | None:
    """Returns the stream of a model, or of the one that a module holds; None of one that is in memory as a whole."""
    if isinstance(model, PreTrainedModel):
        own = vars(model).get(STREAM)
        return own if isinstance(own, Stream) and own.blocks else None
    return next((found for child in model.children() if (found := stream_of(child)) is not None), None)


def bring(model: nn.Module, module: nn.Module) -> None:
    """Has the block of a module in memory, if the model is streamed."""
    if (stream := stream_of(model)) is not None:
        stream.bring(module)


@contextmanager
def changing(model: nn.Module, module: nn.Module) -> Iterator[bool]:
    """Has the block of a module in memory, which changes; yields whether it was streamed."""
    stream = stream_of(model)
    block = None if stream is None else stream.bring(module)
    yield stream is not None
    if stream is not None and block is not None:
        stream.change(block)


def each_parameter(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters of a model once each; of one that is streamed, block by block."""
    stream = stream_of(model)
    blocks = {} if stream is None else stream.blocks
    inside = {id(parameter) for block in blocks.values() for parameter in block.parameters()}
    yield from (parameter for parameter in model.parameters() if id(parameter) not in inside)
    for block in blocks.values():
        assert stream is not None
        stream.bring(block)
        yield from block.parameters()
