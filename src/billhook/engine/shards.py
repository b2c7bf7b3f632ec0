"""A sharded model of which one block at a time is whole: it is gathered when it computes, and goes when another one does."""

import itertools
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from billhook.engine.comm import Comm
from billhook.engine.forwards import LoadHook, TrainingForward
from billhook.engine.lazy import LazyTensors, Read
from billhook.engine.loader_internals import save_state, to_file_format
from billhook.engine.sharding import (
    Layout,
    Slot,
    free,
    full_tensor,
    has_memory,
    parameter_slots,
    unallocated,
)
from billhook.engine.state import replaced
from billhook.engine.store import STORE, BlockStore, with_transposed
from billhook.engine.tensors import add_to_file
from billhook.engine.walk import separable_blocks


class ShardStore(BlockStore):
    """Has one block of a module whole at a time, and always what is in no block, instead of shards.

    The parameters of other blocks keep their sizes, without memory: shards hold their values. A block that changes is sharded
    again when it goes. Every rank brings the same blocks in the same order, except within `apart`.

    Names of parameters are those that the Hugging Face model within gives them, if there is one.

    Args:
        root: The module; whoever computes with it takes out what FSDP does around forwards.
        gradients: Whether parameters come with their gradients.

    Attributes:
        blocks: The blocks that come and go: those that share no parameter with anything outside of them.
        owner: The block that each module within is in.
        shards: Where the values of parameters lie that are in such blocks.
    """

    holds_all = False
    on_ranks = True
    kept = ("shards", "names", "blocks", "owner", "_inside", "_alterations")

    def __init__(self, root: nn.Module, gradients: bool = False) -> None:
        super().__init__(root)
        self.root, self.gradients = root, gradients
        self._before, self._layouts, self._plain = dict[Slot, nn.Parameter](), dict[Slot, Layout](), set[Slot]()
        self._full = dict[nn.Parameter, nn.Parameter]()  # by their shards
        self._altered = set[nn.Parameter]()  # what is altered in the block that is here
        for place, parameter in parameter_slots(root):
            if not isinstance(parameter, DTensor):
                self._plain.add(place)
                continue
            self._before[place], self._layouts[place] = parameter, Layout.of(parameter)
            if parameter not in self._full:
                self._full[parameter] = unallocated(parameter)
        self.shards = {full: shard for shard, full in self._full.items()}
        self._index(root, separable_blocks(root, self._before.items()))
        around = (module for module in root.modules() if isinstance(module, PreTrainedModel) and self._has_blocks(module))
        self.model = next(around, root)
        self._filled = list[nn.Parameter]()
        self.everything = False
        self._overlay: Mapping[nn.Parameter, Read] = {}
        self._comm_apart: Comm | None = None
        self._inside = {  # the full parameters of each block
            block: [self._full[shard] for shard in block.parameters() if shard in self._full] for block in self.blocks.values()
        }
        self._installed, self._forwards = list[RemovableHandle](), dict[nn.Module, Any]()
        in_blocks = set(itertools.chain.from_iterable(self._inside.values()))
        for full in self._full.values():
            if full not in in_blocks:
                self._fill(full)
        self._filled.clear()

    @property
    def is_open(self) -> bool:
        """True if blocks come and go now, as not all of them are here."""
        return bool(self.blocks) and not self.everything

    def _has_blocks(self, module: nn.Module) -> bool:
        return not self.owner.keys().isdisjoint(module.modules())

    @property
    def alike(self) -> bool:
        """Tells whether all ranks bring the same blocks in the same order, which they need not within `apart`."""
        return self._comm_apart is None

    def begin(self) -> dict[nn.Parameter, nn.Parameter]:
        """Puts whole parameters instead of shards, and has blocks come when they are called; returns them by the shards."""
        for (module, name), shard in self._before.items():
            module._parameters[name] = self._full[shard]
        for module, block in self.owner.items():
            if module is block:
                self._forwards[block] = vars(block).get("forward")
                vars(block)["forward"] = TrainingForward(self, block, block.forward)
            elif module._parameters:  # some are called, and their block is not
                self._installed.append(module.register_forward_pre_hook(LoadHook(self.load, block)))
        for module in self.root.modules():
            if module not in self.owner and self._has_blocks(module):
                vars(module)[STORE] = self
        return self._full

    def end(self) -> None:
        """Leaves forwards and hooks as they were; blocks that have changed are sharded."""
        self.release()
        for handle in self._installed:
            handle.remove()
        for block, forward in self._forwards.items():
            del vars(block)["forward"]
            if forward is not None:
                vars(block)["forward"] = forward
        for module in self.root.modules():
            vars(module).pop(STORE, None)

    @torch.no_grad()
    def sharded(self) -> dict[nn.Parameter, nn.Parameter]:
        """Returns the shards of all parameters that the module has now, each by the whole one."""
        shards = dict[nn.Parameter, nn.Parameter]()
        for place, full in parameter_slots(self.root):
            if full not in shards and (layout := self.layout(place)) is not None:
                shards[full] = layout.shards(full) if has_memory(full) else self.shards[full]
        return shards

    def holder(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns what holds the values of a parameter, in any order of ranks: its shards, or itself."""
        return self.shards[parameter] if parameter in self.shards and not has_memory(parameter) else parameter

    def layout(self, place: Slot) -> Layout | None:
        """Returns how a parameter, also a new one, is to lie on ranks; None of one that stays whole."""
        return None if place in self._plain else self._layouts.get(place, next(iter(self._layouts.values())))

    def put_back(self) -> None:
        """Puts the shards back that there were at first."""
        for (module, name), shard in self._before.items():
            module._parameters[name] = shard

    def on(self, device: torch.device, blocks: Sequence[nn.Module]) -> NoReturn:
        """Refuses to compute elsewhere than shards are."""
        raise ValueError(f"device={str(device)!r}: the model is sharded, and its blocks compute where shards are: leave it out")

    def _bring(self, block: nn.Module) -> None:
        if self._comm_apart is None:
            self._gather(block)
        else:
            self._round(block)

    def release(self) -> None:
        """Has no block whole; those that were are sharded again if they have changed."""
        for block in self.loaded if self._changed else ():
            self._shard(block)
            self._alterations.pop(block, None)
        for full in self._filled:
            free(full)
            full.grad = None
        self._filled, self.loaded, self._altered, self._changed = [], [], set(), False
        torch.clear_autocast_cache()  # which holds what was cast of the block

    def _alter(self, block: nn.Module) -> None:
        self._altered = {parameter for alter in self._alterations.get(block, ()) for parameter in alter(block)}

    @torch.no_grad()
    def _shard(self, block: nn.Module) -> None:
        """Shards the parameters of a block that are new, or may have other values than before."""
        done = set[nn.Parameter]()
        for place, full in parameter_slots(block):
            layout, differs = self.layout(place), self.everything or full in self._altered or full not in self.shards
            if layout is not None and differs and full not in done:
                self.shards[full] = layout.shards(full)
                self._filled.append(full)
                done.add(full)
        self._inside[block] = [full for full in block.parameters() if full in self.shards]

    @contextmanager
    def computing_with(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Has the module compute with other values within; those of parameters in blocks are read when these come."""
        self.release()
        before, overlay, resident = self._overlay, dict(self._overlay), dict[nn.Module, dict[str, Tensor]]()
        for name, read in LazyTensors.of(values).reads.items():
            owner, _, key = name.rpartition(".")
            module = self.model.get_submodule(owner)
            parameter = module.get_parameter(key)
            if module in self.owner and parameter in self.shards:
                overlay[parameter] = read
            else:
                resident.setdefault(module, {})[key] = read()
        self._overlay = overlay
        try:
            with replaced(resident):
                yield
        finally:
            self.release()
            self._overlay = before

    @torch.no_grad()
    def stage(
        self, block: nn.Module | None, values: Mapping[str, Tensor], note: object = None, device: torch.device | None = None
    ) -> LazyTensors:
        """Shards the first rank's new values as the parameters are; all ranks call it together, and read them together.

        What each rank has solved for by itself may be rounded otherwise.
        """
        del block, note
        reads = dict[str, Read]()
        for name, value in values.items():
            owner, _, key = name.rpartition(" ")[2].rpartition(".")
            layout, full = self.layout((self.model.get_submodule(owner), key)), nn.Parameter(value, requires_grad=False)
            shard = full if layout is None else replace(layout, device=device or layout.device).shards(full, first=True)
            reads[name] = partial(full_tensor, shard)
        return LazyTensors(reads)

    @torch.no_grad()
    def write(self, folder: Path, transposed: Collection[str] = ()) -> None:
        """Writes config and weights, a block at a time, into the files that `save_pretrained` makes of them.

        Where blocks come to each rank apart, one rank does; see `apart`.
        """
        self.release()
        model, away = cast(PreTrainedModel, self.model), dict[nn.Module, dict[str, nn.Parameter]]()
        for name, parameter in model.named_parameters():
            if parameter in self.shards and (block := self.block_of(name)) is not None:
                away.setdefault(block, {})[name] = parameter
        inside = {parameter for named in away.values() for parameter in named.values()}
        names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter in inside}
        rest = {name: tensor for name, tensor in model.state_dict().items() if name not in names}
        save_state(model, folder, with_transposed(rest, transposed), max_shard_size=sys.maxsize)

        def in_files(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return to_file_format(model, with_transposed({name: tensor.detach() for name, tensor in named.items()}, transposed))

        def read() -> Iterator[dict[str, Tensor]]:
            for block, named in away.items():
                self.load(block)
                yield in_files(named)

        sizes = dict[str, Tensor]()
        for named in away.values():
            sizes |= in_files({name: torch.empty_like(parameter, device="meta") for name, parameter in named.items()})
        add_to_file(folder, sizes, read())
        self.release()

    @contextmanager
    def all_loaded(self) -> Iterator[None]:
        """Has all blocks whole, within."""
        self.release()
        try:
            for block in self.blocks.values():
                self._gather(block)
            self.loaded, self.everything = list(self.blocks.values()), True
            yield
        finally:
            self._changed = self.everything
            self.follow()
            self.everything = False

    @contextmanager
    def apart(self, comm: Comm) -> Iterator[None]:
        """Lets each rank bring what it needs, within, however often: all take part in what one gathers, until all have ended."""
        if self.everything or comm.size == 1:
            yield
            return
        self.release()
        self._comm_apart = comm
        try:
            yield
            self.release()
            while self._round(None):  # gathering is collective: whoever has ended takes part until all have
                pass
        finally:
            self._comm_apart = None

    def _round(self, block: nn.Module | None) -> bool:
        """Gathers what ranks ask for, and keeps what this one does; tells whether there still was a rank that had not ended."""
        assert self._comm_apart is not None
        blocks = list(self.blocks.values())
        # a count for each block of the ranks that want it, and one of the ranks that have not ended
        wanted = torch.tensor([*(other is block for other in blocks), block is not None], dtype=torch.int64)
        *counts, running = self._comm_apart(wanted).tolist()
        for other, count in zip(blocks, counts, strict=True):
            if count:
                self._gather(other, keep=other is block)
        return bool(running)

    def _gather(self, block: nn.Module, keep: bool = True) -> None:
        for full in self._inside[block]:
            self._fill(full, keep)

    @torch.no_grad()
    def _fill(self, full: nn.Parameter, keep: bool = True) -> None:
        """Gathers the values of a parameter, which keeps them if asked: where it does not, only other ranks need them."""
        shard = self.shards[full]
        values = self._overlay[full]() if full in self._overlay else full_tensor(shard)
        if keep:
            # the same storage gets memory again, as autograd may have saved it; values may have a narrower dtype
            full.untyped_storage().resize_(full.numel() * full.element_size())
            full.data.copy_(values)
            self._filled.append(full)
        if self.gradients and shard.grad is not None:
            gradient = full_tensor(shard.grad)  # also where it is not kept: gathering is collective
            full.grad = gradient if keep else None

    def follow(self) -> None:
        """Follows the module, which has lost blocks."""
        self.release()
        there = set(self.root.modules())
        self._index(self.root, [block for block in self.blocks.values() if block in there])
