"""The store of a sharded model, and modules gathered while their shapes change."""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from billhook.engine.comm import Comm
from billhook.engine.forwards import LoadHook, TrainingForward
from billhook.engine.fsdp import remove_fsdp, restore_fsdp
from billhook.engine.lazy import LazyTensors, Read
from billhook.engine.loader_internals import save_state, to_file_format
from billhook.engine.sharding import Layout, free, full_tensor, has_memory, is_sharded, reshard, sharded_as, unallocated
from billhook.engine.state import replaced
from billhook.engine.store import STORE, BlockStore
from billhook.engine.tensors import add_to_file
from billhook.engine.trees import Slot, parameter_slots
from billhook.engine.walk import separable_blocks
from billhook.linalg import TensorDict, TensorsByName


class ShardStore(BlockStore):
    """The store of a sharded module, which gathers a block before it runs.

    Parameters outside of blocks are always gathered. Parameters of other blocks keep their sizes, but have no memory: shards hold
    their values. A changed block is sharded again on release. All ranks load the same blocks in the same order, except within
    `independently`. Parameters are named as in the Hugging Face model inside the module, if there is one.

    Args:
        root: The module. Callers must remove FSDP's forward hooks (see `unsharded`).
        gradients: Whether gradients are gathered with their parameters.

    Attributes:
        blocks: The blocks that are gathered on demand: blocks that share no parameter with modules outside of them.
        owner: The block that contains each module.
        shards: The shards of parameters in blocks, by full parameter.
    """

    holds_all = False
    on_ranks = True
    snapshot_attributes = ("shards", "names", "blocks", "owner", "_block_parameters", "_alterations")

    def __init__(self, root: nn.Module, gradients: bool = False) -> None:
        super().__init__(root)
        self.root, self.gradients = root, gradients
        self._original, self._unsharded = dict[Slot, Any](), set[Slot]()  # parameters that were shards, and all other slots
        self._full = dict[nn.Parameter, nn.Parameter]()  # by their shards
        self.shards = dict[nn.Parameter, nn.Parameter]()
        self._altered = set[nn.Parameter]()  # altered parameters of the loaded block
        for slot, parameter in parameter_slots(root):
            if not isinstance(parameter, DTensor):
                self._unsharded.add(slot)
                continue
            self._original[slot] = parameter
            if parameter not in self._full:
                self._full[parameter] = full = unallocated(parameter)
                self.shards[full] = parameter
        self._index(root, separable_blocks(root, self._original.items()))
        containers = (module for module in root.modules() if isinstance(module, PreTrainedModel) and self._has_blocks(module))
        self.model = next(containers, root)
        self._gathered = list[nn.Parameter]()
        self.all_gathered = False
        self._overlay: Mapping[nn.Parameter, Read] = {}
        self._round_comm: Comm | None = None
        self._block_parameters = dict[nn.Module, list[nn.Parameter]]()  # the full parameters of each block
        self._installed, self._forwards = list[RemovableHandle](), dict[nn.Module, Any]()
        in_blocks = set()
        for block in self.blocks.values():
            self._block_parameters[block] = [self._full[shard] for shard in block.parameters() if shard in self._full]
            in_blocks.update(self._block_parameters[block])
        for full in self.shards:
            if full not in in_blocks:
                self._gather_parameter(full)
        self._gathered.clear()

    @property
    def is_open(self) -> bool:
        """True if blocks are gathered on demand now, as not all of them are in memory."""
        return bool(self.blocks) and not self.all_gathered

    def _has_blocks(self, module: nn.Module) -> bool:
        return not self.owner.keys().isdisjoint(module.modules())

    def begin(self) -> dict[nn.Parameter, nn.Parameter]:
        """Replaces shards by full parameters and installs hooks; returns parameters by shard."""
        for (module, name), shard in self._original.items():
            module._parameters[name] = self._full[shard]
        for module, block in self.owner.items():
            if module is block:
                self._forwards[block] = vars(block).get("forward")
                vars(block)["forward"] = TrainingForward(self, block, block.forward)
            elif module._parameters:  # a module may be called without its block
                self._installed.append(module.register_forward_pre_hook(LoadHook(self.load, block)))
        for module in self.root.modules():
            if module not in self.owner and self._has_blocks(module):
                vars(module)[STORE] = self
        return self._full

    def end(self) -> None:
        """Removes hooks and forwards, and shards blocks that have changed."""
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
        """Returns the shards of all parameters that the module has now, by full parameter."""
        shards = {}
        for slot, full in parameter_slots(self.root):
            if full not in shards and (layout := self.layout(slot)) is not None:
                shards[full] = layout.shards(full) if has_memory(full) else self.shards[full]
        return shards

    def holder(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns the tensor with the values of a parameter: its shards, or itself."""
        return self.shards[parameter] if parameter in self.shards and not has_memory(parameter) else parameter

    def layout(self, slot: Slot) -> Layout | None:
        """Returns the layout of a parameter. None if it is not sharded."""
        if slot in self._unsharded:
            return None
        return Layout.of(self._original.get(slot, next(iter(self._original.values()))))

    def restore_shards(self) -> None:
        """Restores the original shards as parameters."""
        for (module, name), shard in self._original.items():
            module._parameters[name] = shard

    def on(self, device: torch.device, blocks: Sequence[nn.Module]) -> NoReturn:
        """Refuses a device, because blocks of a sharded model run where their shards are."""
        raise ValueError(
            f"device={str(device)!r} is not supported for a sharded model, whose blocks run where their shards are. Omit device."
        )

    def _load_block(self, block: nn.Module) -> None:
        if self._round_comm is None:
            self._gather(block)
        else:
            self._gather_round(block)

    def release(self) -> None:
        """Frees gathered blocks, and shards them again if they have changed."""
        for block in self.loaded if self._changed else ():
            self._shard(block)
            self._alterations.pop(block, None)
        for full in self._gathered:
            free(full)
            full.grad = None
        self._gathered, self.loaded, self._altered, self._changed = [], [], set(), False
        torch.clear_autocast_cache()  # holds casts of the block

    def _alter(self, block: nn.Module) -> None:
        self._altered = {parameter for alter in self._alterations.get(block, ()) for parameter in alter(block)}

    @torch.no_grad()
    def _shard(self, block: nn.Module) -> None:
        """Shards parameters of a block that are new or may have new values."""
        done = set()
        for slot, full in parameter_slots(block):
            layout, differs = self.layout(slot), self.all_gathered or full in self._altered or full not in self.shards
            if layout is not None and differs and full not in done:
                self.shards[full] = layout.shards(full)
                self._gathered.append(full)
                done.add(full)
        self._block_parameters[block] = [full for full in block.parameters() if full in self.shards]

    @contextmanager
    def computing_with(self, values: TensorsByName) -> Iterator[None]:
        """Replaces parameter values within the context. Values in blocks are read on loading."""
        self.release()
        before, overlay, resident = self._overlay, dict(self._overlay), dict[nn.Module, TensorDict]()
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
        self, block: nn.Module | None, values: TensorsByName, note: object = None, device: torch.device | None = None
    ) -> LazyTensors:
        """Shards the first rank's new values as the parameters are. All ranks call it together.

        Values that each rank has computed for itself may be rounded differently. All ranks also read the result together. See
        `BlockStore.stage`.
        """
        reads = {}
        for name, value in values.items():
            owner, _, key = name.rpartition(" ")[2].rpartition(".")
            layout, full = self.layout((self.model.get_submodule(owner), key)), nn.Parameter(value, requires_grad=False)
            shard = full if layout is None else replace(layout, device=device or layout.device).shards(full, first=True)
            reads[name] = partial(full_tensor, shard)
        return LazyTensors(reads)

    @torch.no_grad()
    def write(self, folder: Path) -> None:
        """Writes config and weights block by block, into the files of `save_pretrained`.

        Within `independently`, only one rank may call it.
        """
        self.release()
        model, by_block = cast(PreTrainedModel, self.model), dict[nn.Module, dict[str, nn.Parameter]]()
        in_blocks, outside = set(), model.state_dict()
        for name, parameter in model.named_parameters():
            if parameter in self.shards and (block := self.block_of(name)) is not None:
                by_block.setdefault(block, {})[name] = parameter
                in_blocks.add(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in in_blocks:
                outside.pop(name, None)
        save_state(model, folder, outside, max_shard_size=sys.maxsize)

        def in_files(named: TensorsByName) -> TensorDict:
            return to_file_format(model, {name: tensor.detach() for name, tensor in named.items()})

        def read() -> Iterator[TensorDict]:
            for block, named in by_block.items():
                self.load(block)
                yield in_files(named)

        sizes = TensorDict()
        for named in by_block.values():
            sizes |= in_files({name: torch.empty_like(parameter, device="meta") for name, parameter in named.items()})
        add_to_file(folder, sizes, read())
        self.release()

    @contextmanager
    def all_loaded(self) -> Iterator[None]:
        """Keeps all blocks gathered within the context."""
        self.release()
        try:
            for block in self.blocks.values():
                self._gather(block)
            self.loaded, self.all_gathered = list(self.blocks.values()), True
            yield
        finally:
            self._changed = self.all_gathered
            self.reindex()
            self.all_gathered = False

    @contextmanager
    def independently(self, comm: Comm) -> Iterator[None]:
        """Lets each rank load different blocks within the context, until all ranks have ended."""
        if self.all_gathered or comm.size == 1:
            yield
            return
        self.release()
        self._round_comm = comm
        try:
            yield
            self.release()
            while self._gather_round(None):  # gathering is collective: a rank that has ended takes part until all have
                pass
        finally:
            self._round_comm = None

    def _gather_round(self, block: nn.Module | None) -> bool:
        """Gathers the blocks that ranks request. False if all ranks have ended."""
        assert self._round_comm is not None
        blocks = list(self.blocks.values())
        # per block the number of ranks that request it; last, the number of ranks that have not ended
        wanted = torch.tensor([*(other is block for other in blocks), block is not None], dtype=torch.int64)
        *counts, running = self._round_comm(wanted).tolist()
        for other, count in zip(blocks, counts, strict=True):
            if count:
                self._gather(other, keep=other is block)
        return bool(running)

    def _gather(self, block: nn.Module, keep: bool = True) -> None:
        for full in self._block_parameters[block]:
            self._gather_parameter(full, keep)

    @torch.no_grad()
    def _gather_parameter(self, full: nn.Parameter, keep: bool = True) -> None:
        """Gathers a parameter. Without `keep`, this rank takes part only for others."""
        shard = self.shards[full]
        values = self._overlay[full]() if full in self._overlay else full_tensor(shard)
        if keep:
            # reallocate the same storage, as autograd may have saved it; values may have a narrower dtype
            full.untyped_storage().resize_(full.numel() * full.element_size())
            full.data.copy_(values)
            self._gathered.append(full)
        if self.gradients and shard.grad is not None:
            gradient = full_tensor(shard.grad)  # also without keep: gathering is collective
            full.grad = gradient if keep else None

    def reindex(self) -> None:
        """Updates the blocks after blocks were removed from the module."""
        self.release()
        modules = set(self.root.modules())
        self._index(self.root, [block for block in self.blocks.values() if block in modules])


@contextmanager
def gathered(module: nn.Module, optimizers: Collection[Optimizer], gradients: bool, blockwise: bool = False) -> Iterator[None]:
    """Gathers a sharded module within, then shards it as before, also after an error.

    Optimizer state stays sharded.

    Args:
        module: The module.
        optimizers: The optimizers of the module.
        gradients: If True, keeps gradients; otherwise drops them.
        blockwise: If True, gathers one block at a time, when it is accessed; see `ShardStore`.
    """
    if not is_sharded(module):
        yield
        return
    reshard(module)
    store = ShardStore(module, gradients)  # gathering may fail, so it comes before any change
    shardings = remove_fsdp(module)
    full_parameters = store.begin()
    _follow(optimizers, full_parameters)
    if not gradients:
        for shard in full_parameters:
            shard.grad = None
    del full_parameters
    try:
        with nullcontext() if blockwise else store.all_loaded():
            yield
    finally:
        store.end()
        shards = store.sharded()
        restore_fsdp(module, shardings, shards)
        _follow(optimizers, shards)


def _follow(optimizers: Collection[Optimizer], new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Replaces parameters in optimizers, and shards optimizer state like its parameter."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [new.get(parameter, parameter) for parameter in group["params"]]
        for old, parameter in new.items():
            if old in optimizer.state:
                optimizer.state[parameter] = {key: _as(value, parameter) for key, value in optimizer.state.pop(old).items()}


def _as(value: object, like: nn.Parameter) -> object:
    """Shards optimizer state like its parameter, if it has the same shape."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or value.shape != like.shape or not value.ndim:
        return value
    if isinstance(value, DTensor) and value.placements != like.placements:
        return value.redistribute(placements=like.placements)
    return sharded_as(value, like)
