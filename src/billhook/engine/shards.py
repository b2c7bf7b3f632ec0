"""A sharded model of which one block at a time is whole: it is gathered when it computes, and goes when another one does."""

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from billhook.engine.forwards import Before, ComingAgain
from billhook.engine.lazy import LazyTensors, Read
from billhook.engine.loader_internals import as_in_files, save_state
from billhook.engine.sharding import (
    Lies,
    Place,
    free,
    has_memory,
    places_of,
    whole,
    without_memory,
)
from billhook.engine.state import replaced
from billhook.engine.store import STORE, Alter, BlockStore, turned_in
from billhook.engine.tensors import add_to_file
from billhook.engine.walk import blocks_of


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

    def __init__(self, root: nn.Module, gradients: bool = False) -> None:
        super().__init__(root)
        self.root, self.gradients = root, gradients
        sharded = [(place, own) for place, own in places_of(root) if isinstance(own, DTensor)]
        self._before: dict[Place, nn.Parameter] = dict(sharded)
        self._lies = {place: Lies.of(own) for place, own in sharded}
        self._plain = {place for place, _ in places_of(root)} - self._lies.keys()
        self._new: dict[nn.Parameter, nn.Parameter] = {own: without_memory(own) for _, own in sharded}
        self.shards = {new: own for own, new in self._new.items()}
        self.names = names = {module: name for name, module in root.named_modules()}
        self.blocks = {names[block]: block for block in blocks_of(root) if self._is_apart(block)}
        self.owner = {part: block for block in self.blocks.values() for part in block.modules()}
        around = (module for module in root.modules() if isinstance(module, PreTrainedModel) and self._holds(module))
        self.model = next(around, root)
        self._filled = list[nn.Parameter]()
        self._here, self._altered = list[nn.Module](), set[nn.Parameter]()
        self._changed = self.everything = False
        self._alterations = defaultdict[nn.Module, list[Alter]](list)
        self._reads: Mapping[nn.Parameter, Read] = {}
        self._apart: Comm | None = None
        inside = {block: dict.fromkeys(block.parameters()) for block in self.blocks.values()}
        self._inside = {block: [self._new[own] for own in every if own in self._new] for block, every in inside.items()}
        self._installed, self._forwards = list[RemovableHandle](), dict[nn.Module, Any]()
        within = {own for every in self._inside.values() for own in every}
        for new in self._new.values():
            if new not in within:
                self._fill(new)
        self._filled.clear()

    @property
    def is_open(self) -> bool:
        """True if blocks come and go now, as not all of them are here."""
        return bool(self.blocks) and not self.everything

    def _holds(self, module: nn.Module) -> bool:
        """Tells whether blocks are in a module."""
        return not self.owner.keys().isdisjoint(module.modules())

    def _is_apart(self, block: nn.Module) -> bool:
        inside = set(block.modules())
        own = {parameter for place, parameter in self._before.items() if place[0] in inside}
        return bool(own) and own.isdisjoint(one for place, one in self._before.items() if place[0] not in inside)

    @property
    def alike(self) -> bool:
        """Tells whether all ranks bring the same blocks in the same order, which they need not within `apart`."""
        return self._apart is None

    def begin(self) -> dict[nn.Parameter, nn.Parameter]:
        """Puts whole parameters instead of shards, and has blocks come when they are called; returns them by the shards."""
        for (part, name), own in self._before.items():
            part._parameters[name] = self._new[own]
        for module, block in self.owner.items():
            if module is block:
                self._forwards[block] = vars(block).get("forward")
                vars(block)["forward"] = ComingAgain(self, block, block.forward)
            elif module._parameters:  # some are called, and their block is not
                self._installed.append(module.register_forward_pre_hook(Before(self.load, block)))
        for module in self.root.modules():
            if module not in self.owner and self._holds(module):
                vars(module)[STORE] = self
        return self._new

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
        found = dict[nn.Parameter, nn.Parameter]()
        for place, own in places_of(self.root):
            if own not in found and (lies := self.lies(place)) is not None:
                found[own] = lies.shards(own) if has_memory(own) else self.shards[own]
        return found

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns what holds the values of a parameter, in any order of ranks: its shards, or itself."""
        return self.shards[parameter] if parameter in self.shards and not has_memory(parameter) else parameter

    def lies(self, place: Place) -> Lies | None:
        """Returns how the parameter at a place is to lie on ranks; None of one that stays whole."""
        return None if place in self._plain else self._lies.get(place, next(iter(self._lies.values())))

    def put_back(self) -> None:
        """Puts the shards back that there were at first."""
        for (part, name), own in self._before.items():
            part._parameters[name] = own

    def on(self, device: torch.device, blocks: Sequence[nn.Module]) -> NoReturn:
        """Refuses to compute elsewhere than shards are."""
        raise ValueError(f"device={str(device)!r}: the model is sharded, and its blocks compute where shards are: leave it out")

    def load(self, module: nn.Module) -> nn.Module | None:
        """Gathers the block of a module, in the place of the one that was whole; see `BlockStore.load`."""
        block = self.owner.get(module)
        if block is not None and block not in self._here:
            self.release()
            if self._apart is None:
                self._gather(block)
            else:
                self._round(block)
            self._here = [block]
            self._altered = {own for alter in self._alterations.get(block, ()) for own in alter(block)}
        return block

    def change(self, block: nn.Module, note: object = None) -> None:
        """Has the block that is here, which has new parameters or altered values, sharded again when it goes."""
        assert block in self._here, "the block is gone: what was changed in it is lost"
        self._changed = True

    def is_altered(self, block: nn.Module) -> bool:
        """Tells whether values of a block are altered whenever it comes."""
        return bool(self._alterations.get(block))

    def release(self) -> None:
        """Has no block whole; those that were are sharded again if they have changed."""
        for block in self._here if self._changed else ():
            self._shard(block)
            self._alterations.pop(block, None)
        for own in self._filled:
            free(own)
            own.grad = None
        self._filled, self._here, self._altered, self._changed = [], [], set(), False
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _shard(self, block: nn.Module) -> None:
        """Shards the parameters of a block that are new, or may have other values than before."""
        done = set[nn.Parameter]()
        for place, own in places_of(block):
            again = self.everything or own in self._altered or own not in self.shards
            if (lies := self.lies(place)) is not None and own not in done and again:
                self.shards[own] = lies.shards(own)
                self._filled.append(own)
                done.add(own)
        self._inside[block] = [own for own in block.parameters() if own in self.shards]

    @contextmanager
    def altered(self, alter: Alter) -> Iterator[None]:
        """Has values of blocks altered whenever they come, within; one that changes and goes stays as that is."""
        self.release()
        before = self._alterations
        self._alterations = defaultdict(list, {block: [*before.get(block, ()), alter] for block in self.blocks.values()})
        try:
            yield
        finally:
            self._alterations, self._changed = before, False
            self.release()

    @contextmanager
    def computing_with(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Has the module compute with other values within; those of parameters in blocks are read when these come."""
        self.release()
        before, here, reads = self._reads, dict[nn.Module, dict[str, Tensor]](), dict(self._reads)
        for name, read in LazyTensors.of(values).reads.items():
            owner, _, part = name.rpartition(".")
            module = self.model.get_submodule(owner)
            parameter = module.get_parameter(part)
            if module in self.owner and parameter in self.shards:
                reads[parameter] = read
            else:
                here.setdefault(module, {})[part] = read()
        self._reads = reads
        try:
            with replaced(here):
                yield
        finally:
            self.release()
            self._reads = before

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
            owner, _, part = name.rpartition(" ")[2].rpartition(".")
            lies, full = self.lies((self.model.get_submodule(owner), part)), nn.Parameter(value, requires_grad=False)
            shard = full if lies is None else replace(lies, device=device or lies.device).shards(full, first=True)
            reads[name] = partial(whole, shard)
        return LazyTensors(reads)

    @torch.no_grad()
    def write(self, folder: Path, turned: Collection[str] = ()) -> None:
        """Writes config and weights, a block at a time, into the files that `save_pretrained` makes of them.

        Where blocks come to each rank apart, one rank does; see `apart`.
        """
        self.release()
        model, away = cast(PreTrainedModel, self.model), dict[nn.Module, dict[str, nn.Parameter]]()
        for name, own in model.named_parameters():
            if own in self.shards and (block := self.block_of(name)) is not None:
                away.setdefault(block, {})[name] = own
        inside = {own for named in away.values() for own in named.values()}
        names = {name for name, own in model.named_parameters(remove_duplicate=False) if own in inside}
        rest = {name: one for name, one in model.state_dict().items() if name not in names}
        save_state(model, folder, turned_in(rest, turned), max_shard_size=sys.maxsize)

        def in_files(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return as_in_files(model, turned_in({name: own.detach() for name, own in named.items()}, turned))

        def read() -> Iterator[dict[str, Tensor]]:
            for block, named in away.items():
                self.load(block)
                yield in_files(named)

        sizes = dict[str, Tensor]()
        for named in away.values():
            sizes |= in_files({name: torch.empty_like(own, device="meta") for name, own in named.items()})
        add_to_file(folder, sizes, read())
        self.release()

    @contextmanager
    def all_here(self) -> Iterator[None]:
        """Has all blocks whole, within."""
        self.release()
        try:
            for block in self.blocks.values():
                self._gather(block)
            self._here, self.everything = list(self.blocks.values()), True
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
        self._apart = comm
        try:
            yield
            self.release()
            while self._round(None):
                pass
        finally:
            self._apart = None

    def _round(self, block: nn.Module | None) -> bool:
        """Gathers what ranks ask for, and keeps what this one does; tells whether there still was a rank that had not ended."""
        assert self._apart is not None
        asked = torch.tensor([*(one is block for one in self.blocks.values()), block is not None], dtype=torch.int64)
        *counts, going = self._apart(asked).tolist()
        for one, count in zip(self.blocks.values(), counts, strict=True):
            if count:
                self._gather(one, keep=one is block)
        return bool(going)

    def _gather(self, block: nn.Module, keep: bool = True) -> None:
        for own in self._inside[block]:
            self._fill(own, keep)

    @torch.no_grad()
    def _fill(self, own: nn.Parameter, keep: bool = True) -> None:
        """Gathers the values of a parameter, which keeps them if asked."""
        shard = self.shards[own]
        values = self._reads[own]() if own in self._reads else whole(shard)
        if keep:
            own.untyped_storage().resize_(own.numel() * own.element_size())  # values may have a narrower dtype
            own.data.copy_(values)
            self._filled.append(own)
        if self.gradients and shard.grad is not None:
            gradient = whole(shard.grad)
            own.grad = gradient if keep else None

    def follow(self) -> None:
        """Follows the module, which has lost blocks."""
        self.release()
        self.names = {module: name for name, module in self.root.named_modules()}
        self.blocks = {self.names[block]: block for block in self.blocks.values() if block in self.names}

    def way_back(self) -> Callable[[], None]:
        """Returns what has blocks come as they are now, once the module has the parameters again that it has now."""
        self.release()
        shards, alterations = dict(self.shards), self._alterations.copy()
        blocks, names, inside = dict(self.blocks), dict(self.names), dict(self._inside)

        def back() -> None:
            self._changed = False
            self.release()
            self.shards, self._alterations, self._inside = dict(shards), alterations.copy(), dict(inside)
            self.blocks, self.names = dict(blocks), dict(names)

        return back
